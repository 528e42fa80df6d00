"""Round-to-nearest weight quantisation at one width and one group size for all matrices.

The plain baseline of weight quantisation, with the quantiser, kernels and checkpoint format that FineQuant uses: per
group of ``B`` weights along the input axis ``s = max|w| / (2^(b-1) - 1)``, ``w_hat = s round(w / s)``; with
``symmetric: false`` the grid runs from the smallest to the largest weight of the group. A group size that does not
divide a row is replaced by the largest divisor above its half, else by the whole row; the report says where.
"""

from __future__ import annotations

from typing import Any

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Choice, Compressed, Compression, pack_model
from gossamer.parts.quant_format import Packing, find_matrices
from gossamer.parts.quantiser import PER_TENSOR, divisor_below

CARD = Card(
    title="Round to nearest",
    claim="the naive baseline of weight quantisation: 8 bits per channel keep perplexity within 1 %",
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("quantised",),
    removes=("float_weights",),
    registers=("quantizer:gossamer",),
    families=("llama", "gemma3", "gpt2"),
    limits="embeddings, norms, routers and the head stay float",
    builtin=True,
)


class RoundingConfig(Config):
    bits: int = option(8, "bits of a weight", ge=2, le=8)
    group: int = option(0, "weights that share a scale; 0 is an output channel, -1 the whole matrix", ge=-1)
    symmetric: bool = option(True, "a grid around zero, without minima to store")
    skip: tuple[str, ...] = option(
        ("lm_head", "embed", "wte", "router", "shared_expert_gate"), "parts of names of modules that stay float"
    )
    dtype: str = option(
        "auto", "dtype of the scales; auto: the model's, if it has 16 bits", choices=("auto", "bfloat16", "float16")
    )


class Rounding(Compression):
    """Packs every linear layer at the same bits and group."""

    config_class = RoundingConfig

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Needs no data. Works in place; :class:`InputError` where there is nothing to pack."""
        config = self.config
        matrices, left = find_matrices(model, config.skip)
        if not matrices:
            raise InputError(f"{self.name}.compress", must="find linear layers", got="none", do=f"left float: {left}")
        choices = []
        for matrix in matrices:
            group = config.group if config.group <= 0 else divisor_below(matrix.columns, config.group)
            note = "" if group == config.group else f"{config.group} does not divide {matrix.columns}: {group} used"
            choices.append(Choice(matrix, Packing(config.bits, group, config.symmetric), note))
        scope = {PER_TENSOR: "tensor", 0: "channel"}.get(config.group, str(config.group))
        return pack_model(model, choices, left, config.dtype, {"group": scope})
