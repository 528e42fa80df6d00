"""Mixture of Shards: LoRA whose rows are put together from shards in a pool that all layers share.

For each projection type (name and widths d_in -> d_out) with L layers, budget e, private part p, shards per vector l:

    pools     PA: [e L l, d_in / l]   PB: [e L l, d_out / l]      e L (d_in + d_out) numbers, as LoRA of rank e
    indices   i_A(k), i_B(k): [r l]   layer k: (r - p) l of the first (e - p) L l rows at random without replacement
                                      (subset selection), A and B apart (pair dissociation), then its own p l of the
                                      last p L l rows (shard privatization); drawn once from the seed, never trained
    factors   A_k: [r, d_in]          row j is the concatenation of PA[i_A(k)[j l]], ..., PA[i_A(k)[j l + l - 1]]
              B_k: [d_out, r]         its columns likewise from PB (vector sharding)
    layer     y = W x + (alpha / r) B_k A_k dropout(x)

PA starts Kaiming-uniform with the fan-in of the whole vector (bound 1 / sqrt(d_in)), PB at zero. The four strategies
are switched off by rank = p + (e - p) L (every layer takes all public shards), pair_dissociation = false, shards = 1
and private = 0; rank = e L, private 0, shards 1 without dissociation is pure sharing: the same update in every layer.
private = budget = rank, shards = 1 is LoRA.

A type is the path with the layer numbers starred, so towers of one model do not share; the official code derives
key and value widths from the head count, here pools follow the real widths. A pool stands in the first layer of its
type, the others refer to it: the checkpoint and the optimizer have it once. Not for FSDP, which frees a layer's
parameters outside that layer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from torch import Tensor, nn

from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import TunerAdapter
from gossamer.parts.injection import (
    Projection,
    check_divisor,
    check_rank,
    grouped,
    projections,
    target_names,
    task_type,
)
from gossamer.parts.lora import lora_parameters
from gossamer.parts.tuners import LinearTuner, LowRankLayer, register_tuner

CARD = Card(
    title="Mixture of Shards",
    paper="2410.00938",
    year=2024,
    modality=("text", "image"),
    claim="at the trainable count of LoRA rank 2, held-out loss below LoRA rank 2's",
    traits=("identity_at_init", "mergeable", "lora_exportable"),
    provides=("adapter_attached",),
    forbids=("adapter_attached",),
    registers=("peft:mos",),
    limits="benchmark scores of 7B models and GPU memory with many adapters are not measured",
)


class MoSConfig(Config):
    rank: int = option(8, "rank r that each layer uses", ge=1)
    budget: int = option(2, "rank e of the plain LoRA with the same trainable count", ge=1)
    private: int = option(1, "part p of the budget that no two layers share", ge=0)
    shards: int = option(4, "pieces l that each vector is put together from", ge=1)
    alpha: float = option(16.0, "the update is scaled by alpha / rank", gt=0)
    dropout: float = option(0.1, "share of a layer's inputs dropped before A, in training", ge=0, lt=1)
    target_modules: str | tuple[str, ...] = option("all-linear", '"all-linear", names of layers, or a path expression')
    pair_dissociation: bool = option(True, "draw the indices of A and B apart")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ranks(self.rank, self.budget, self.private)


class MoS(TunerAdapter):
    """Mixture of Shards as a PEFT tuner; the seed draws the indices."""

    config_class = MoSConfig
    config: MoSConfig

    def peft_config(self, model: nn.Module) -> MoSPeftConfig:
        options = self.config.as_dict() | {"target_modules": target_names(model, self.config.target_modules)}
        return MoSPeftConfig(**options, seed=self.seed, task_type=task_type(model))

    def parameter_report(self, model: Any) -> dict[str, int]:
        """Numbers in an attached model: trained, frozen indices, and plain LoRA of rank e and of rank r beside it."""
        found = projections(model.get_base_model(), self.config.target_modules)
        return {
            "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
            "indices": 2 * self.config.rank * self.config.shards * len(found),
            "lora_of_budget": lora_parameters(found, self.config.budget),
            "lora_of_rank": lora_parameters(found, self.config.rank),
        }


@dataclasses.dataclass
class MoSPeftConfig(PeftConfig):
    """PEFT's side of :class:`MoSConfig`. ``layers`` is written on first use: number of layers by projection type."""

    target_modules: Any = "all-linear"
    rank: int = 8
    budget: int = 2
    private: int = 1
    shards: int = 4
    alpha: float = 16.0
    dropout: float = 0.1
    pair_dissociation: bool = True
    seed: int = 0
    layers: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOS")
        if isinstance(self.target_modules, list | tuple):
            self.target_modules = set(self.target_modules)
        _check_ranks(self.rank, self.budget, self.private)


@dataclasses.dataclass
class _Type:
    """A projection type: rows of its pools, and the layer that holds them once that layer exists."""

    rows: int
    home: MoSLinear | None = None


@dataclasses.dataclass
class _Place:
    """One layer's share of the plan: its type and its two index vectors [r l]."""

    type: _Type
    index_a: Tensor
    index_b: Tensor


class MoSLinear(LowRankLayer):
    """A linear layer with MoS adapters. ``mos_A`` and ``mos_B`` have entries only in the first layer of a type."""

    adapter_layer_names = ("mos_A", "mos_B")
    other_param_names = (*LowRankLayer.other_param_names, "mos_index_A", "mos_index_B", "mos_home")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        super().__init__(base_layer, adapter_name)
        self.mos_A = nn.ParameterDict()
        self.mos_B = nn.ParameterDict()
        self.mos_index_A = BufferDict(persistent=True)
        self.mos_index_B = BufferDict(persistent=True)
        self.mos_home: dict[str, MoSLinear] = {}

    def add_adapter(self, name: str, config: MoSPeftConfig, plan: _Place) -> None:
        if plan.type.home is None:
            plan.type.home = self
            bound = self.d_in**-0.5  # Kaiming-uniform with a = sqrt 5 and fan-in d_in
            self.mos_A[name] = nn.Parameter(
                torch.empty(plan.type.rows, self.d_in // config.shards).uniform_(-bound, bound)
            )
            self.mos_B[name] = nn.Parameter(torch.zeros(plan.type.rows, self.d_out // config.shards))
        self.mos_home[name] = plan.type.home
        self.mos_index_A[name] = plan.index_a
        self.mos_index_B[name] = plan.index_b
        self.added(
            name,
            scaling=config.alpha / config.rank,
            dropout=config.dropout,
            inference_mode=config.inference_mode,
        )

    def lora_factors(self, name: str) -> tuple[Tensor, Tensor]:
        home = self.mos_home[name]
        a = _gather(home.mos_A[name], self.mos_index_A[name], self.d_in)
        b = _gather(home.mos_B[name], self.mos_index_B[name], self.d_out)
        return a, b.T


class MoSModel(LinearTuner):
    """The tuner: groups the layers, draws the indices, and checks what is loaded."""

    prefix = "mos_"
    tuner_layer_cls = MoSLinear

    def plan(self, config: MoSPeftConfig, found: list[Projection]) -> dict[str, _Place]:
        check_divisor("mos.shards", config.shards, found)
        check_rank("mos.rank", config.rank, found)
        groups = grouped(found)
        _check_layers(config, {group: len(members) for group, members in groups.items()})
        generator = torch.Generator().manual_seed(config.seed)
        places: dict[str, _Place] = {}
        for members in groups.values():
            shared = _Type(rows=config.budget * len(members) * config.shards)
            for projection, (index_a, index_b) in zip(
                members, draw_indices(config, len(members), generator), strict=True
            ):
                places[projection.path] = _Place(shared, index_a, index_b)
        return places

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for key, mine in model.state_dict().items():
            path, found, _ = key.rpartition(".mos_")
            if not found or not key.endswith(f".{adapter_name}"):
                continue
            given = remapped.get(key)
            if given is None or given.shape != mine.shape:
                raise InputError(
                    f"loading {key}",
                    must=f"find a tensor of shape {tuple(mine.shape)}",
                    got="none" if given is None else tuple(given.shape),
                    do="load it into the model that it was trained on",
                )
            if ".mos_index_" in key:
                rows = model.get_submodule(path).mos_home[adapter_name].mos_A[adapter_name].shape[0]
                if given.is_floating_point() or given.min() < 0 or given.max() >= rows:
                    raise InputError(
                        f"loading {key}",
                        must=f"be whole numbers from 0 to {rows - 1}",
                        got=f"{given.dtype} up to {given.max().item()}",
                        do="load the files that save_pretrained wrote",
                    )
        return remapped


def draw_indices(config: MoSPeftConfig, layers: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """(i_A, i_B), each [r l] int32, for every layer of a type: public rows at random, then the layer's private rows."""
    public = (config.budget - config.private) * layers * config.shards
    chosen = (config.rank - config.private) * config.shards
    own = config.private * config.shards
    indices = []
    for layer in range(layers):
        private = torch.arange(public + layer * own, public + (layer + 1) * own)
        index_a, index_b = (
            torch.cat([torch.randperm(public, generator=generator)[:chosen], private]).int() for _ in range(2)
        )
        indices.append((index_a, index_b if config.pair_dissociation else index_a.clone()))
    return indices


def _gather(pool: Tensor, index: Tensor, width: int) -> Tensor:
    return pool.index_select(0, index.to(pool.device)).view(-1, width).to(index.device)


def _check_ranks(rank: int, budget: int, private: int) -> None:
    if private > budget:
        raise OptionError("mos.private", must=f"be at most the budget {budget}", got=private, do="lower it")
    if rank < private:
        raise OptionError("mos.rank", must=f"be at least the private part {private}", got=rank, do="raise it")
    if private == budget and rank != budget:
        raise OptionError(
            "mos.rank",
            must=f"be the budget {budget} where all of it is private",
            got=rank,
            do="lower private, so that layers share shards",
        )


def _check_layers(config: MoSPeftConfig, layers: dict[str, int]) -> None:
    for group, count in layers.items():
        public = (config.budget - config.private) * count
        if config.rank - config.private > public:
            raise OptionError(
                "mos.rank",
                must=f"be at most {config.private + public} for the {count} layers of {group}",
                got=config.rank,
                do="lower it, raise the budget, or leave these layers out with target_modules",
            )
    if config.layers is None:
        config.layers = layers
    for group in sorted(set(layers) | set(config.layers)):
        if layers.get(group, 0) != config.layers.get(group, 0):
            raise InputError(
                "mos: the model for this adapter",
                must=f"have {config.layers.get(group, 0)} layers of {group}",
                got=layers.get(group, 0),
                do="load it into the model that it was trained on",
            )


register_tuner("mos", MoSPeftConfig, MoSModel)
