"""PyramidDrop: image tokens leave the decoder in steps, shallow layers see all of them and deep layers few.

Before layer r_s of the prefill (r_s layers done), for each row with n_0 image tokens:

    a = mean over heads of softmax(q K^T / sqrt(d_h) + causal mask)     q, K of layer r_s, from its own input
    keep the n_s = max(1, int(n_0 rho_s)) image tokens with the largest a, in their order; all text stays

q is that of the last token of the prompt; where labels are given (training, scoring), of the token before each answer,
averaged. rho_s = lambda^s by default, always of the original count. Deeper layers run on what is left, renumbered from
the row's first position on, and cache only that. Nothing is dropped while single tokens are decoded.

With ``train`` the same happens in training mode, so that the model is trained as it will run: no further loss, labels
of image tokens ignored as always. Otherwise training mode is untouched.

Different from the paper: rows may be padded on either side and may hold several images (one ranking over all their
tokens); a last token that is itself an image token stays. ``score`` "random" and a single entry in ``layers`` give the
baselines of the experiment. Without a cache, each step of ``generate`` asks its own last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.acceleration import Acceleration
from gossamer.parts.selection_costs import costs, draw_kept, kept_maps, ranking_operations
from gossamer.parts.token_layouts import Layout, places_of
from gossamer.parts.token_selection import Decoder, Run, TokenSelection

if TYPE_CHECKING:
    from PIL.Image import Image

CARD = Card(
    title="PyramidDrop",
    paper="2410.17247",
    year=2024,
    modality=("text", "image"),
    claim="at equal operations, answers nearer the full model's than one early cut and than random dropping",
    families=("llava",),
    limits="public benchmarks and 7B models are not shown here",
)


class PyramidDropConfig(Config):
    layers: tuple[float, ...] = option(
        (0.25, 0.5, 0.75), "layers done before each drop: a share of all (below 1) or a number of layers", gt=0
    )
    keep: float = option(0.5, "share of image tokens that each stage keeps of the stage before (lambda)", gt=0, le=1)
    ratios: tuple[float, ...] | None = option(
        None, "shares of the original image tokens after each drop, in place of keep; the last holds on", gt=0, le=1
    )
    query: str = option(
        "pre_answer", "who ranks: the token before each answer where labels show it, or the last token",
        choices=("pre_answer", "last"),
    )  # fmt: skip
    score: str = option(
        "next_layer_qk", "what ranks: attention of the next layer, or a fixed random order (a baseline)",
        choices=("next_layer_qk", "random"),
    )  # fmt: skip
    reindex_positions: bool = option(True, "number the remaining tokens anew; else they keep their positions")
    train: bool = option(False, "drop tokens in training mode too; labels must be given")


class PyramidDrop(Acceleration):
    config_class = PyramidDropConfig
    config: PyramidDropConfig
    _selection: TokenSelection | None = None

    def accelerate(self, model: Any, processor: Any = None) -> tuple[Any, Any]:
        known = getattr(processor, "image_token_id", None)
        wanted = getattr(model.config, "image_token_id", None)
        if known is not None and known != wanted:
            do = "use the processor that belongs to the model"
            raise InputError(f"{self.name}: processor", must=f"write image tokens as {wanted}", got=known, do=do)
        renumber = self.config.reindex_positions
        selection = TokenSelection(model, self._policy, renumber=renumber, trains=self.config.train)
        self._schedule = schedule(self.config, len(selection.decoder.layers))
        selection.install()
        self._selection = selection
        return model, processor

    def release(self, model: Any) -> Any:
        self.released(model)
        TokenSelection.take_off(model)
        return model

    def report(self) -> dict[str, Any]:
        """As :func:`gossamer.parts.selection_costs.costs`; operations include those of the ranking."""
        decoder, run = self._last()
        found = costs(run, decoder, self.name)
        asked = int(places_of(run.asks)[0].shape[1]) if self.config.query == "pre_answer" else 1
        ranking = 0
        if self.config.score != "random":
            for layer in run.layouts.keys() - {0}:
                before = [row[layer - 1] for row in found["tokens"]]
                ranking += sum(ranking_operations(decoder.config, n, asked) for n in before)
        return {**found, "operations": found["operations"] + ranking, "ranking_operations": ranking}

    def kept(self, row: int = 0) -> list[tuple[int, Tensor]]:
        """Of the last prefill: for each stage of a row its first layer and which image tokens are in it, bool [n]."""
        return kept_maps(self._last()[1], row)

    def overlay(self, image: Image, row: int = 0) -> Image:
        """``image`` once for each stage of the last prefill, with the patches that have left darkened."""
        return draw_kept(image, self.kept(row))

    def _last(self) -> tuple[Decoder, Run]:
        if self._selection is None or self._selection.last is None:
            do = "accelerate a model and run it on a prompt"
            raise InputError(f"{self.name}.report", must="follow a prefill", got="none yet", do=do)
        return self._selection.decoder, self._selection.last

    def _policy(self, layer: int, hidden: Tensor, layout: Layout, run: Run) -> Tensor | None:
        """bool [b, t]: text, and the best image tokens of each row."""
        if layer not in self._schedule:
            return None
        asks = self._asks(run)
        candidates = layout.of(run.image & ~asks)
        count = (run.image.sum(1) * self._schedule[layer] + 1e-6).long().clamp(min=1) - (run.image & asks).sum(1)
        scores = self._scores(layer, hidden, layout, run, asks).masked_fill(~candidates, -torch.inf)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return layout.mask & (~candidates | (rank < count[:, None]))

    def _asks(self, run: Run) -> Tensor:
        if self.config.query == "pre_answer":
            return run.asks
        places = torch.arange(run.real.shape[1], device=run.real.device)
        return (places == (run.real * places).amax(1, keepdim=True)) & run.real

    def _scores(self, layer: int, hidden: Tensor, layout: Layout, run: Run, asks: Tensor) -> Tensor:
        """[b, t]; without regard to who is an image token."""
        if self.config.score == "random":
            # by a token's number within its row, so that company and padding do not matter
            order = torch.rand(run.image.shape[1], generator=torch.Generator().manual_seed(self.seed))
            number = (run.image.long().cumsum(1) - 1).clamp(min=0)
            return order.to(hidden.device)[number].gather(1, layout.origin)
        assert self._selection is not None
        places, real = places_of(layout.of(asks))
        attention = self._selection.decoder.attention(layer, hidden, layout, places)
        weight = real.float() / real.sum(1, keepdim=True).clamp(min=1)
        return (attention * weight[..., None]).sum(1)


def schedule(config: PyramidDropConfig, layers: int) -> dict[int, float]:
    """Layer before which tokens leave -> share of the original image tokens that stays."""
    where = [round(value * layers) if value < 1 else int(value) for value in config.layers]
    whole = all(value < 1 or value == int(value) for value in config.layers)
    if not whole or list(where) != sorted(set(where)) or not where or where[0] < 1 or where[-1] >= layers:
        must, do = f"rise and lie from 1 to {layers - 1}", "give shares below 1, or numbers of layers"
        raise OptionError("pyramiddrop.layers", must=must, got=f"{config.layers} as {where}", do=do)
    return dict(zip(where, _ratios(config, len(where)), strict=True))


def _ratios(config: PyramidDropConfig, stages: int) -> Sequence[float]:
    if config.ratios is None:
        return [config.keep ** (stage + 1) for stage in range(stages)]
    given = config.ratios
    if not given or len(given) > stages or list(given) != sorted(given, reverse=True):
        must = f"be one to {stages} shares, none above the one before"
        raise OptionError("pyramiddrop.ratios", must=must, got=given, do="they are shares of the original count")
    return [*given, *[given[-1]] * (stages - len(given))]
