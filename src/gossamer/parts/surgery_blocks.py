"""The blocks of a transformers model as structured surgery sees them: which there are, and what they have left.

Blocks are known by their parts: a stack is a list of modules, each of which has the children of one of :data:`LAYOUTS`
and no others, with linear layers where the layout has them. BERT-type encoders, GPT-2, Llama-type decoders (Llama,
Mistral, Qwen 2 and 3 ...) and those with norms on both sides (Gemma 2 and 3). What was dropped before is seen as such.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.parts.injection import widths


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names inside of a block. A dropped module takes the norms of ``attention_norms`` or ``ffn_norms`` with it."""

    name: str
    children: frozenset[str]
    attention: str
    attention_parts: frozenset[str]
    queries: str
    pairs: tuple[str, ...]  # keys and values; empty where the queries' layer is fused with them
    out: str
    ffn: str
    ffn_parts: frozenset[str]
    ins: tuple[str, ...]
    down: str
    attention_norms: tuple[str, ...]
    ffn_norms: tuple[str, ...]
    post_norm: bool = False


_LLAMA = Layout(
    name="llama", children=frozenset(("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")),
    attention="self_attn", attention_parts=frozenset(("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    queries="self_attn.q_proj", pairs=("self_attn.k_proj", "self_attn.v_proj"), out="self_attn.o_proj",
    ffn="mlp", ffn_parts=frozenset(("gate_proj", "up_proj", "down_proj", "act_fn")),
    ins=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj",
    attention_norms=("input_layernorm",), ffn_norms=("post_attention_layernorm",),
)  # fmt: skip
LAYOUTS = (
    _LLAMA,
    dataclasses.replace(
        _LLAMA, name="gemma", children=_LLAMA.children | {"pre_feedforward_layernorm", "post_feedforward_layernorm"},
        attention_norms=("input_layernorm", "post_attention_layernorm"),
        ffn_norms=("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
    Layout(
        name="gpt2", children=frozenset(("ln_1", "attn", "ln_2", "mlp")),
        attention="attn", attention_parts=frozenset(("c_attn", "c_proj", "attn_dropout", "resid_dropout")),
        queries="attn.c_attn", pairs=(), out="attn.c_proj",
        ffn="mlp", ffn_parts=frozenset(("c_fc", "c_proj", "act", "dropout")), ins=("mlp.c_fc",), down="mlp.c_proj",
        attention_norms=("ln_1",), ffn_norms=("ln_2",),
    ),
    Layout(
        name="bert", children=frozenset(("attention", "intermediate", "output")),
        attention="attention.self", attention_parts=frozenset(("query", "key", "value", "dropout")),
        queries="attention.self.query", pairs=("attention.self.key", "attention.self.value"),
        out="attention.output.dense", ffn="intermediate", ffn_parts=frozenset(("dense", "intermediate_act_fn")),
        ins=("intermediate.dense",), down="output.dense", attention_norms=(), ffn_norms=(), post_norm=True,
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Block:
    """One block as it is now; counts are read from its weights."""

    index: int
    path: str  # in the model that was searched
    module: Any
    layout: Layout

    @property
    def out_path(self) -> str:
        """Dotted name of the attention's output layer in the model."""
        return f"{self.path}.{self.layout.out}"

    @property
    def down_path(self) -> str:
        """Dotted name of the FFN's output layer in the model."""
        return f"{self.path}.{self.layout.down}"

    @property
    def has_attention(self) -> bool:
        return not isinstance(self.module.get_submodule(self.layout.attention), NoAttention)

    @property
    def has_ffn(self) -> bool:
        return not isinstance(deepest(self.module, self.layout.down), Nothing)

    @property
    def head_width(self) -> int:
        """``d_h``, also of an attention that is gone."""
        attention = self.module.get_submodule(self.layout.attention)
        return int(getattr(attention, "head_dim", None) or attention.attention_head_size)

    @property
    def heads(self) -> int:
        """Query heads."""
        return shape_of(self.module, self.layout.out)[0] // self.head_width if self.has_attention else 0

    @property
    def kv_heads(self) -> int:
        if not self.has_attention or not self.layout.pairs:
            return self.heads
        return shape_of(self.module, self.layout.pairs[0])[1] // self.head_width

    @property
    def neurons(self) -> int:
        return shape_of(self.module, self.layout.down)[0] if self.has_ffn else 0

    @property
    def head_groups(self) -> int:
        """How many groups of heads can go one by one."""
        return self.heads if self.kv_heads in (1, self.heads) else self.kv_heads

    @property
    def group_width(self) -> int:
        """Columns of ``W_o`` in a head group."""
        return self.heads // self.head_groups * self.head_width if self.head_groups else 0


def find_blocks(model: nn.Module) -> list[Block]:
    """The blocks of ``model`` in order. InputError where there are none of a known layout, with what was looked for,
    or where only some of a stack are."""
    stacks = [
        (path, found)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
        and any(found := [_layout(block) for block in module])
    ]  # fmt: skip
    if len(stacks) != 1 or not all(stacks[0][1]):
        raise InputError(
            f"surgery on {type(model).__name__}",
            must="find one stack of blocks of a known layout: " + "; ".join(map(_described, LAYOUTS)),
            got=_found(model, stacks),
            do="prune another model, or leave the structure as it is and quantise it",
        )
    path, layouts = stacks[0]
    blocks = [
        Block(index, f"{path}.{index}", module, layout)
        for index, (module, layout) in enumerate(zip(model.get_submodule(path).children(), layouts, strict=True))
        if layout is not None
    ]
    for block in blocks:
        _check(block)
    return blocks


class Nothing(nn.Module):
    """Stands where a module was dropped whose output is added to the residual: a zero without shape."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.new_zeros(())


class NoAttention(nn.Module):
    """Stands where an attention was dropped. In the cache it keeps one zero for each token, since the number of tokens
    seen is read off there (of the first layer, by most code)."""

    def __init__(self, head_dim: int, layer_idx: int | None, *, passes: bool) -> None:
        super().__init__()
        self.head_dim, self.layer_idx, self.passes = head_dim, layer_idx, passes

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if past_key_values is not None:
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            seen = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(seen, seen, self.layer_idx)
        return hidden_states if self.passes else hidden_states.new_zeros(()), None


def _layout(block: nn.Module) -> Layout | None:
    children = frozenset(name for name, _ in block.named_children())
    return next((layout for layout in LAYOUTS if layout.children == children and _has_parts(block, layout)), None)


def _has_parts(block: nn.Module, layout: Layout) -> bool:
    try:
        attention, ffn = block.get_submodule(layout.attention), block.get_submodule(layout.ffn)
        gone = isinstance(attention, NoAttention), isinstance(deepest(block, layout.down), Nothing)
        linear = [] if gone[0] else [layout.queries, *layout.pairs, layout.out]
        linear += [] if gone[1] else [*layout.ins, layout.down]
        fits = all(widths(block.get_submodule(name)) is not None for name in linear)
    except AttributeError:
        return False
    fits &= gone[0] or {name for name, _ in attention.named_children()} <= layout.attention_parts
    return fits and (gone[1] or {name for name, _ in ffn.named_children()} <= layout.ffn_parts)


def _check(block: Block) -> None:
    """Refuse attentions whose parts do not divide into heads, and norms over all heads at once."""
    if not block.has_attention:
        return
    attention = block.module.get_submodule(block.layout.attention)
    for name in ("q_norm", "k_norm"):
        for weight in getattr(attention, name).parameters() if hasattr(attention, name) else ():
            if weight.numel() != block.head_width:
                must, got = f"have the width {block.head_width} of a head", weight.numel()
                raise InputError(f"{block.path}: {name}", must=must, got=got, do="its heads cannot be cut apart")
    kinds = [shape_of(block.module, name)[1] for name in (block.layout.queries, *block.layout.pairs)]
    expected = block.heads * block.head_width * (1 if block.layout.pairs else 3)
    if kinds[0] != expected or len(set(kinds[1:])) > 1 or block.heads % max(1, block.kv_heads):
        raise InputError(
            f"{block.path}: attention", must=f"have {block.heads} query heads of {block.head_width}", got=kinds
        )


def _described(layout: Layout) -> str:
    return f"{layout.name} ({', '.join(sorted(layout.children))})"


def _found(model: nn.Module, stacks: list[tuple[str, list[Layout | None]]]) -> str:
    if stacks:
        return ", ".join(f"{path} with {sum(map(bool, found))} of {len(found)} known" for path, found in stacks)
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and module]
    seen = [
        f"{path} of {type(blocks[0]).__name__} ({', '.join(dict(blocks[0].named_children()))})"
        for path, blocks in lists
    ]
    return "; ".join(seen) or "no list of modules"


def deepest(block: nn.Module, path: str) -> nn.Module:
    """The module at ``path``, or the one before it that stands for a dropped whole."""
    module = block
    for name in path.split("."):
        module = getattr(module, name)
        if isinstance(module, Nothing | NoAttention):
            break
    return module


def shape_of(block: nn.Module, name: str) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer inside of a block."""
    found = widths(block.get_submodule(name))
    assert found is not None, name
    return found
