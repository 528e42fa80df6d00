"""Unstructured pruning without training: magnitude, random, Wanda, SparseGPT, each alone or as N:M.

For a linear layer W [out, in] with inputs X [tokens, in] a score S says what each weight is worth:

    magnitude   S = |W|                       compared within the whole matrix
    random      S drawn evenly                compared within the whole matrix
    wanda       S_ij = |W_ij| ||X_j||_2       compared within each output row; ||X_j||^2 is the mean over tokens
    sparsegpt   S_ij = W_ij^2 / U_jj^2        compared within 128 columns; those still to come make up for what goes

The ``ratio`` of lowest scores becomes zero. With ``pattern`` "N:M" the N lowest of each M neighbouring inputs of a row
do, for every method; a matrix whose inputs M does not divide is refused. U comes from the inputs' Hessian
(:mod:`gossamer.parts.sparse_obs`).

Blocks are pruned in order. The inputs of a layer are collected while calibration tokens run through the model as it is
by then, with all blocks before it pruned. Layers of one block see the same pass. Only linear
layers inside decoder blocks are touched: embeddings, a tied head, norms, and routers stay. The result keeps its dense
shape: zeros save no bytes here, they are what formats and kernels for sparse weights start from.

Han et al. 1506.02626 (magnitude); Sun et al. 2306.11695 (Wanda), without the variant that searches over cumulative
scores; Frantar and Alistarh 2301.00774 (SparseGPT).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Compressed, Compression, CompressionReport, MatrixRow, held_bytes
from gossamer.parts.calibration import InputStatistics, block_by_block
from gossamer.parts.hidden_states import decoder_blocks
from gossamer.parts.injection import is_transposed, widths
from gossamer.parts.sparse_obs import prune_columns

CARD = Card(
    title="Unstructured pruning",
    claim="at equal sparsity, perplexity by Wanda's scores is below that by magnitude, and random pruning is far above",
    requires=("float_weights",),
    forbids=("adapter_attached", "pruned"),
    provides=("pruned",),
    families=("llama", "gemma3", "gpt2"),
    traits=("sparse",),
    limits="no speed is gained without kernels for sparse weights",
    builtin=True,
)
_CALIBRATED = ("wanda", "sparsegpt")
_MARK = "gossamer_pruning"  # in the model's config: method and pattern


class PruningConfig(Config):
    method: str = option("wanda", "how a weight is scored", choices=("magnitude", "random", "wanda", "sparsegpt"))
    ratio: float = option(0.5, "share of the weights of each matrix that become zero", ge=0, lt=1)
    pattern: str | None = option(
        None, "N of each M neighbouring weights become zero; the ratio is then 0.5", choices=("1:2", "2:4", "4:8")
    )
    skip: tuple[str, ...] = option(("router", "gate"), "ends of names of layers that are left alone")


class Pruning(Compression):
    """Zeros in place. ``data``: token batches (mappings with input_ids [b, t]); Wanda and SparseGPT need them."""

    config_class = PruningConfig
    config: PruningConfig

    @property
    def calibrates(self) -> bool:
        return self.config.method in _CALIBRATED

    def check(self, model: nn.Module, data: Any = None) -> None:
        super().check(model, data)
        done = getattr(getattr(model, "config", None), _MARK, None)
        if done is not None:
            got = f"one pruned by {done['method']}"
            raise InputError(f"{self.name}.compress", must="get an unpruned model", got=got, do="load the dense one")
        pattern_of(self.config.pattern, self.config.ratio)
        if self.calibrates and not data:
            must, do = f"get calibration data for {self.config.method}", "give token batches, or choose magnitude"
            raise InputError(f"{self.name}.compress", must=must, got="none", do=do)

    @torch.no_grad()
    def compress(self, model: Any, data: Any = None) -> Compressed:
        config, before = self.config, held_bytes(model)
        pattern = pattern_of(config.pattern, config.ratio)
        generator = torch.Generator().manual_seed(self.seed)
        rows: list[MatrixRow] = []
        zeros = counted = 0
        for number, layers, statistics in self._blocks(model, data):
            for name, layer in layers.items():
                weight = layer.weight.t() if is_transposed(layer) else layer.weight
                where = f"{number}.{name}"
                if config.method == "sparsegpt":
                    pruned, _ = prune_columns(weight, statistics[name].hessian, ratio=config.ratio, pattern=pattern)
                else:
                    scores = _scores(config.method, weight, statistics.get(name), generator)
                    mask = lowest(scores, config.ratio, pattern, by_row=config.method == "wanda", where=where)
                    pruned = weight.detach().float().masked_fill(mask, 0)
                error = float((pruned - weight.float()).norm() / weight.float().norm().clamp(min=1e-30))
                weight.copy_(pruned)
                rows.append(_row(where, weight, error))
                zeros, counted = zeros + int((weight == 0).sum()), counted + weight.numel()
        if not rows:
            raise InputError(f"{self.name}.compress", must="find linear layers in the blocks", got="none")
        setattr(model.config, _MARK, {"method": config.method, "pattern": config.pattern or "", "ratio": config.ratio})
        values = {"sparsity": zeros / counted, "method": config.method, "pattern": config.pattern or "unstructured"}
        return Compressed(model, CompressionReport(before, held_bytes(model), rows, values))

    def _blocks(
        self, model: nn.Module, data: Any
    ) -> Iterator[tuple[int, dict[str, Any], Mapping[str, InputStatistics]]]:
        """Number, layers and, where the method asks for them, what is known of each layer's inputs, block by block."""
        blocks = list(decoder_blocks(model))
        layers = [
            {name: layer for name, layer in _layers(block) if not name.endswith(self.config.skip)} for block in blocks
        ]
        if not self.calibrates:
            for number, named in enumerate(layers):
                yield number, named, {}
            return
        full = self.config.method == "sparsegpt"
        for step in block_by_block(model, data, blocks, [list(named) for named in layers], full=full):
            yield step.index, layers[step.index], step.statistics


def pattern_of(text: str | None, ratio: float) -> tuple[int, int] | None:
    """(N, M) of "N:M"; :class:`OptionError` where the ratio is not the pattern's."""
    if text is None:
        return None
    n, m = map(int, text.split(":"))
    if ratio != n / m:
        raise OptionError(
            "pruning.ratio", must=f"be {n / m} with the pattern {text}", got=ratio, do="leave one of them"
        )
    return n, m


def lowest(
    scores: Tensor, ratio: float, pattern: tuple[int, int] | None, *, by_row: bool, where: str = "weight"
) -> Tensor:
    """True for the weights to drop: of ``scores`` [out, in], by row, over the whole, or in groups of M inputs."""
    if pattern is not None:
        n, m = pattern
        if scores.shape[1] % m:
            raise InputError(where, must=f"have inputs that {m} divides", got=scores.shape[1], do="use another pattern")
        return lowest(scores.reshape(-1, m), n / m, None, by_row=True).reshape(scores.shape)
    table = scores if by_row else scores.reshape(1, -1)
    count = int(table.shape[1] * ratio + 1e-9)
    # a stable order: of equal scores the first go, and the count is exact
    places = table.sort(dim=1, stable=True).indices[:, :count]
    mask = torch.zeros_like(table, dtype=torch.bool).scatter_(1, places, True)
    return mask.reshape(scores.shape)


def sparsity(model: nn.Module) -> dict[str, float]:
    """Share of zeros of every linear layer of the decoder blocks, counted: ``{"0.mlp.up_proj": 0.5, ...}``."""
    return {
        f"{number}.{name}": float((layer.weight == 0).float().mean())
        for number, block in enumerate(decoder_blocks(model))
        for name, layer in _layers(block)
    }


def _layers(block: nn.Module) -> list[tuple[str, Any]]:
    named = [(name, module) for name, module in block.named_modules() if widths(module) is not None]
    return [(name, module) for name, module in named if isinstance(getattr(module, "weight", None), nn.Parameter)]


def _scores(method: str, weight: Tensor, inputs: InputStatistics | None, generator: torch.Generator) -> Tensor:
    if method == "random":
        return torch.rand(weight.shape, generator=generator)
    scores = weight.detach().float().abs()
    return scores if inputs is None else scores * inputs.mean_square.sqrt().float()


def _row(name: str, weight: Tensor, error: float) -> MatrixRow:
    """Bits are those of the dense form."""
    bits = 8 * weight.element_size()
    zeros = float((weight == 0).float().mean())
    return MatrixRow(name, tuple(weight.shape), bits, 0, float(bits), error, note=f"{zeros:.1%} zeros")
