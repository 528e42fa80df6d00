"""What a prefill with token selection costs, beside the plain one: tokens a layer, operations, cache bytes, a picture.

Multiply-adds of a layer with n tokens, d the width, h and g the query and key heads of size e, m the gated FFN's width:

    2 n d e (h + g) + 2 n^2 h e + 3 n d m            (4 n d^2 + 2 n^2 d + 3 n d m where g = h and h e = d)
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError
from gossamer.parts.token_layouts import Layout
from gossamer.parts.token_selection import Decoder, Run

if TYPE_CHECKING:
    from PIL.Image import Image


def layer_operations(config: Any, tokens: int) -> int:
    """Multiply-adds of one decoder layer of the text ``config`` with this many tokens."""
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    projections = 2 * tokens * width * size * (heads + keys)
    return int(projections + 2 * tokens**2 * heads * size + 3 * tokens * width * config.intermediate_size)


def ranking_operations(config: Any, tokens: int, queries: int = 1) -> int:
    """Multiply-adds of scoring ``tokens`` by the attention of ``queries`` tokens: keys, queries and their products."""
    heads, keys, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or width // heads
    return int(tokens * width * keys * size + queries * (width * heads * size + tokens * heads * size))


def costs(run: Run | None, decoder: Decoder, where: str) -> dict[str, Any]:
    """Report of a prefill: ``tokens`` and ``visual`` [rows][layers], ``operations``, ``cache_bytes``, both also plain.

    Operations count real tokens, row by row; bytes count what the cache stores, padding included.
    """
    if run is None:
        raise InputError(f"{where}.report", must="follow a prefill", got="none yet", do="run the model first")
    layers = len(decoder.layers)
    seen = [run.layouts[run.start(layer)] for layer in range(layers)]
    tokens = torch.stack([layout.mask.sum(1) for layout in seen], dim=1).tolist()
    visual = torch.stack([layout.of(run.image).sum(1) for layout in seen], dim=1).tolist()
    plain = run.real.sum(1).tolist()
    return {
        "tokens": tokens,
        "visual": visual,
        "operations": sum(layer_operations(decoder.config, n) for row in tokens for n in row),
        "operations_plain": sum(layers * layer_operations(decoder.config, n) for n in plain),
        "cache_bytes": sum(_bytes(decoder, layer, layout) for layer, layout in enumerate(seen)),
        "cache_bytes_plain": sum(_bytes(decoder, layer, seen[0]) for layer in range(layers)),
    }


def median_ms(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns; the first round does not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, use in contenders.items():
            start = time.perf_counter()
            use()
            if turn:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def kept_maps(run: Run, row: int) -> list[tuple[int, Tensor]]:
    """For each stage of a row: its first layer, and which of the row's image tokens are in it, bool [n]."""
    found = []
    for first, layout in sorted(run.layouts.items()):
        present = torch.zeros_like(run.image[row]).index_put(
            (layout.origin[row][layout.mask[row]],), torch.tensor(True)
        )
        found.append((first, present[run.image[row]]))
    return found


def draw_kept(image: Image, maps: Sequence[tuple[int, Tensor]]) -> Image:
    """One panel a stage, side by side; patches that have left are dark. The image's tokens must be a square grid."""
    from PIL import Image as Pillow

    count = len(maps[0][1])
    side = math.isqrt(count)
    if side == 0 or side * side != count:
        must, do = "be one image in a square of patches", "draw the tiles of a tiled image from kept_maps"
        raise InputError("map of kept tokens", must=must, got=f"{count} image tokens", do=do)
    picture = image.convert("RGB")
    canvas = Pillow.new("RGB", (picture.width * len(maps), picture.height))
    for place, (_, kept) in enumerate(maps):
        light = Pillow.fromarray((kept.reshape(side, side).cpu().numpy() * 200 + 55).astype("uint8"))
        dark = Pillow.new("RGB", picture.size)
        panel = Pillow.composite(picture, dark, light.resize(picture.size, Pillow.Resampling.NEAREST))
        canvas.paste(panel, (picture.width * place, 0))
    return canvas


def _bytes(decoder: Decoder, layer: int, layout: Layout) -> int:
    """Keys and values that the dynamic cache of a layer holds after the prefill."""
    config, stored = decoder.config, layout.mask.shape[1]
    if decoder.kinds[layer] == "sliding_attention":
        stored = min(stored, config.sliding_window - 1)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = torch.empty(0, dtype=decoder.text.dtype).element_size()
    return int(2 * layout.mask.shape[0] * stored * config.num_key_value_heads * size * element)
