"""Small copy: a pruned model that stands for the whole one while a LoRA is trained, and remembers what of it stayed.

It is not meant to be used itself. What is trained on it is brought back to the whole model by its record
(:mod:`gossamer.parts.small_copies`). The publisher's part of LoRAM (2502.13533), with its four ways of pruning:

    rand    structured   units at random
    stru    structured   units by the first-order Taylor score of LLM-Pruner: with G the gradient of the mean next-token
                         loss over the calibration texts, the sum of |w G| over all weights of the unit
    semi    4:8          SparseGPT: mask and remaining weights by the Hessian of the inputs, block after block
    unst    any place    the same without a pattern

Units are FFN neurons and head groups, as :mod:`gossamer.parts.surgery` has them: neuron i is row i of gate and up and
column i of down; a head group is a key-value head with its query heads, or where one key-value head serves all, a query
head. Each pruned block loses the same share. Hidden width, norms, embeddings and head stay whole. Structured copies are
smaller; the others keep their shape with zeros in it, which save memory only in a format for sparse weights.

``compensate: false`` drops, in semi and unst, the smallest weights and leaves the others, without data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Compressed, Compression, CompressionReport, held_bytes
from gossamer.parts.calibration import Batch, block_by_block, check_batches, moved, without_cache
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.injection import is_transposed, widths
from gossamer.parts.small_copies import Kept, SmallCopy, read_record, write_record
from gossamer.parts.sparse_obs import Pattern, lowest, prune_columns
from gossamer.parts.surgery import Block, Keep, cut, find_blocks

CARD = Card(
    title="Small copy",
    claim="at equal size, loss of the copy by Taylor scores is below that of a random one",
    requires=("float_weights",),
    forbids=("adapter_attached", "small_copy"),
    provides=("pruned", "small_copy"),
    registers=("widths:gossamer_widths",),
    families=("llama", "gemma3", "gpt2"),
    limits="sparse copies save no memory here",
    builtin=True,
)
STRUCTURED = ("rand", "stru")
_PATTERN: Pattern = (4, 8)


class SmallCopyConfig(Config):
    method: str = option("stru", "what goes", choices=("rand", "stru", "semi", "unst"))
    ratio: float = option(0.5, "share of the units, or weights, of a pruned block that goes; 0.5 with semi", ge=0, lt=1)
    attention: bool = option(True, "prune attentions too, not FFNs alone")
    protect_first: int | None = option(
        None, "blocks at the start that stay whole; null: 2, fewer of few, more of many", ge=0
    )
    protect_last: int | None = option(
        None, "blocks at the end that stay whole; null: 1, none of few, more of many", ge=0
    )
    compensate: bool = option(True, "semi and unst: by Hessian, the rest made to fit; false: by size alone")
    damp: float = option(0.01, "added to Hessians, in means of their diagonals", gt=0)


class SmallCopyMaker(Compression):
    """Prunes in place. ``data``: token batches, a handful for stru, 128 texts for semi and unst; rand needs none."""

    config_class = SmallCopyConfig
    calibrates = True
    stands_in = True

    def check(self, model: nn.Module, data: Any = None) -> None:
        super().check(model, data)
        if read_record(model) is not None:
            got, do = "a small copy", "give the whole model"
            raise InputError(f"{self.name}.compress", must="get a whole model", got=got, do=do)
        if self.config.method == "semi" and self.config.ratio != _PATTERN[0] / _PATTERN[1]:
            do = "leave it out, or choose the method unst"
            raise OptionError(f"{self.name}.ratio", must="be 0.5 with semi (4 of 8)", got=self.config.ratio, do=do)

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """InputError for unknown blocks, nothing left to prune, a ratio that leaves no unit, or unfit data."""
        before, count, origin = held_bytes(model), _count(model), fingerprint(model)
        blocks = find_blocks(model)
        chosen = self._chosen(blocks)
        if self.config.method in STRUCTURED:
            record = self._cut(model, blocks, chosen, data, origin)
        else:
            record = self._thin(model, blocks, chosen, data, origin)
        write_record(model, record)
        values = {
            "method": self.config.method,
            "pruned_blocks": len(chosen),
            "parameters_before": count,
            "parameters_after": _count(model),
            "zeros": record.zeros,
        }
        return Compressed(model, CompressionReport(before, held_bytes(model), values=values))

    def _chosen(self, blocks: Sequence[Block]) -> list[Block]:
        """The blocks that are not protected."""
        depth = len(blocks)
        first, last = self.config.protect_first, self.config.protect_last
        first = max(depth // 20, min(2, depth // 6)) if first is None else first
        last = max(depth // 40, min(1, depth // 6)) if last is None else last
        if first + last >= depth:
            do = "protect fewer"
            raise InputError(
                f"{self.name}: {first} + {last} protected blocks", must=f"leave some of the {depth}", got="none", do=do
            )
        return list(blocks[first : depth - last])

    def _cut(
        self, model: nn.Module, blocks: Sequence[Block], chosen: Sequence[Block], data: Any, origin: str
    ) -> SmallCopy:
        if self.config.method == "stru":
            scores = taylor_scores(model, chosen, check_batches(data, self.name))
        else:
            generator = torch.Generator().manual_seed(self.seed)
            draw = [torch.rand(block.head_groups + block.neurons, generator=generator) for block in chosen]
            scores = [
                (row[: block.head_groups], row[block.head_groups :]) for row, block in zip(draw, chosen, strict=True)
            ]
        heads: list[Kept | None] = [None] * len(blocks)
        neurons: list[Kept | None] = [None] * len(blocks)
        for block, (of_heads, of_neurons) in zip(chosen, scores, strict=True):
            if self.config.attention and block.has_attention:
                heads[block.index] = self._best(of_heads, f"{block.path}: head groups")
            if block.has_ffn:
                neurons[block.index] = self._best(of_neurons, f"{block.path}: neurons")
        cut(
            model,
            {block.index: Keep(_indices(heads[block.index]), _indices(neurons[block.index])) for block in chosen},
        )
        return SmallCopy(origin, self.config.method, tuple(heads), tuple(neurons))

    def _best(self, scores: Tensor, where: str) -> Kept:
        count = len(scores)
        stay = int(count * (1 - self.config.ratio) + 0.5)
        if not stay:
            do = "lower the ratio, or set attention: false"
            raise InputError(where, must=f"keep one of {count}", got=f"none at ratio {self.config.ratio:g}", do=do)
        best = scores.sort(descending=True, stable=True).indices[:stay]
        return Kept(count, tuple(sorted(best.tolist())))

    def _thin(
        self, model: nn.Module, blocks: Sequence[Block], chosen: Sequence[Block], data: Any, origin: str
    ) -> SmallCopy:
        pattern = _PATTERN if self.config.method == "semi" else None
        layers = {block.index: self._layers(block) for block in chosen}
        if self.config.compensate:
            names = [list(layers.get(block.index, ())) for block in blocks]
            for step in block_by_block(model, check_batches(data, self.name), [b.module for b in blocks], names):
                for name, statistics in step.statistics.items():
                    weight = _table(layers[step.index][name])
                    found, _ = prune_columns(
                        weight, statistics.hessian, ratio=self.config.ratio, pattern=pattern, damp=self.config.damp
                    )
                    _fill(layers[step.index][name], found)
        else:
            for layer in (layer for inside in layers.values() for layer in inside.values()):
                weight = _table(layer)
                _fill(layer, weight.masked_fill(lowest(weight.abs(), self.config.ratio, pattern), 0.0))
        weights = [layer.weight for inside in layers.values() for layer in inside.values()]
        zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
        nothing = (None,) * len(blocks)
        paths = tuple(f"{block.path}.{name}" for block in chosen for name in layers[block.index])
        return SmallCopy(origin, self.config.method, nothing, nothing, zeros, paths)

    def _layers(self, block: Block) -> dict[str, Any]:
        inside = [block.layout.queries, *block.layout.pairs, block.layout.out] if self.config.attention else []
        inside = inside if block.has_attention else []
        return {
            name: block.module.get_submodule(name)
            for name in (*inside, *((*block.layout.ins, block.layout.down) if block.has_ffn else ()))
        }


def taylor_scores(model: Any, blocks: Sequence[Block], batches: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    """(head groups, neurons) of each block: sum of ``|w G|`` over the weights of a unit, biases left out.

    ``G`` is the gradient of the next-token loss, mean over all tokens of ``batches``. The model stays as it is.
    InputError for a model without next-token logits.
    """
    layers = [
        layer
        for block in blocks
        for layer in block.module.modules()
        if widths(layer) is not None and isinstance(layer.weight, nn.Parameter)
    ]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = [layer.weight for layer in layers]
    modes = {module: module.training for module in model.modules()}
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    try:
        model.eval().requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                loss = _next_token_loss(model, batch)
                for total, found in zip(sums, torch.autograd.grad(loss, weights), strict=True):
                    total += found
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)
        for module, mode in modes.items():
            module.training = mode
    worth = {layer: (layer.weight.detach().float() * total).abs() for layer, total in zip(layers, sums, strict=True)}
    return [(_head_scores(block, worth), _neuron_scores(block, worth)) for block in blocks]


def _next_token_loss(model: Any, batch: Batch) -> Tensor:
    """Summed over the real tokens: gradients of batches then add up to that of the mean, but for a factor."""
    given = moved(batch, model)
    logits = getattr(model(**given, **without_cache(model)), "logits", None)
    if logits is None or logits.ndim != 3:
        do = "load the causal language model, with its head"
        raise InputError("Taylor scores", must="have logits for the next token", got=type(model).__name__, do=do)
    labels = given["input_ids"]
    if given.get("attention_mask") is not None:
        labels = labels.masked_fill(given["attention_mask"] == 0, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")


def _neuron_scores(block: Block, worth: dict[Any, Tensor]) -> Tensor:
    if not block.has_ffn:
        return torch.zeros(0)
    found = [_outputs(block, name, worth) for name in block.layout.ins]
    return torch.stack([*found, _inputs(block, block.layout.down, worth)]).sum(0)


def _head_scores(block: Block, worth: dict[Any, Tensor]) -> Tensor:
    if not block.has_attention:
        return torch.zeros(0)
    layout, groups = block.layout, block.head_groups
    total = _inputs(block, layout.out, worth).reshape(groups, -1).sum(1)
    fused = 1 if layout.pairs else 3
    total = total + _outputs(block, layout.queries, worth).reshape(fused, groups, -1).sum((0, 2))
    for name in layout.pairs if block.kv_heads == groups else ():
        total = total + _outputs(block, name, worth).reshape(groups, -1).sum(1)
    return total


def _outputs(block: Block, name: str, worth: dict[Any, Tensor]) -> Tensor:
    layer = block.module.get_submodule(name)
    return worth[layer].sum(0 if is_transposed(layer) else 1)


def _inputs(block: Block, name: str, worth: dict[Any, Tensor]) -> Tensor:
    layer = block.module.get_submodule(name)
    return worth[layer].sum(1 if is_transposed(layer) else 0)


def _table(layer: Any) -> Tensor:
    """The weight as ``[out, in]`` in float32."""
    weight = layer.weight.detach().float()
    return weight.T if is_transposed(layer) else weight


@torch.no_grad()
def _fill(layer: Any, table: Tensor) -> None:
    layer.weight.copy_(table.T if is_transposed(layer) else table)


def _indices(kept: Kept | None) -> tuple[int, ...] | None:
    return None if kept is None else kept.indices


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
