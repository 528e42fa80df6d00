"""A causal model of transformers read into a flat description that can be run without its modules.

A block is one of two shapes, where ``N`` are norms (``N2``, ``N4`` only in Gemma) and ``A`` attention:

    x = x + N2(A(N1 x))        x = x + N4(W_down (act(W_gate N3 x) * W_up N3 x))      or  W_down act(W_up N3 x)

:func:`read_plan` knows the classes in ``_READERS`` and nothing else. Whatever could make the description differ from
the model (another class at some place, a hook, an adapter, a replaced ``forward``, rotary angles that change with the
length) raises :class:`NotPlanned` with the reason, and the caller runs the model itself.

Feed-forward blocks that are not dense (Mixtral's experts) are kept as modules and called. What structured surgery took
out of a block (:mod:`gossamer.parts.surgery`) is not there: its line of the equation is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.core.errors import InputError
from gossamer.parts.quant_linear import QuantEmbedding, QuantLinear, TiedQuantLinear
from gossamer.parts.surgery_blocks import NoAttention, Nothing

_NO_HEAD = 16  # places of a head that is not there
_LOOKING = "transformers.utils.output_capturing"
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")
_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class NotPlanned(InputError):
    """The model's blocks are not known well enough to be run without its own code."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """``gain * x / rms(x)``, or with ``kind`` "layer" the usual layer norm. ``late``: x is rounded to the dtype of the
    activations before the gain (Llama), not after it (Gemma)."""

    kind: Literal["rms", "layer"]
    gain: Tensor  # float32 [n]
    bias: Tensor | None
    eps: float
    late: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return torch.nn.functional.layer_norm(x, self.gain.shape, self.gain.to(x.dtype), bias, self.eps)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.gain.to(x.dtype) * wide.to(x.dtype) if self.late else (wide * self.gain).to(x.dtype)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """Linear modules of one input, their outputs joined in this order."""

    parts: tuple[nn.Module, ...]


@dataclasses.dataclass(frozen=True)
class Attention:
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None  # a query at p sees keys at p - window + 1 .. p
    rope: str | None  # key in Plan.ropes
    qkv: Matrix
    out: Matrix
    q_norm: Norm | None = None
    k_norm: Norm | None = None


@dataclasses.dataclass(frozen=True)
class Feed:
    up: Matrix  # the gate first where there is one
    down: Matrix
    act: Callable[[Tensor], Tensor]
    act_name: str  # silu, gelu, gelu_tanh or "" for another
    gated: bool


@dataclasses.dataclass(frozen=True)
class Layer:
    """``None`` where the block has none; the norms before attention and feed are there with them."""

    attention: Attention | None
    feed: Feed | nn.Module | None
    before_attention: Norm | None = None
    before_feed: Norm | None = None
    after_attention: Norm | None = None
    after_feed: Norm | None = None

    @property
    def cached(self) -> tuple[int, int]:
        """Key-value heads, and places of a head."""
        return (0, _NO_HEAD) if self.attention is None else (self.attention.kv_heads, self.attention.head_dim)


@dataclasses.dataclass(frozen=True)
class Plan:
    """``ropes[key](positions, dtype)`` gives cos and sin [n, head_dim]; ``positions`` is GPT-2's table."""

    family: str
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix
    embed: Callable[[Tensor], Tensor]  # ids [n] -> [n, d]
    width: int
    ropes: dict[str, Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]]
    tied_scale: float | None = None  # of embeddings that are the rows of the head; None where they are not
    positions: Tensor | None = None
    softcap: float | None = None

    @property
    def own_feeds(self) -> int:
        """How many layers call the model's own feed-forward module."""
        return sum(isinstance(layer.feed, nn.Module) for layer in self.layers)

    def describe(self) -> list[str]:
        """A line a layer."""
        return [f"{number}: {_attends(layer)}, {_feeds(layer)}" for number, layer in enumerate(self.layers)]


def read_plan(model: Any) -> Plan:
    """The plan of ``model``; :class:`NotPlanned` says what it has that is not known."""
    name = type(model).__name__
    if name not in _READERS or getattr(transformers, name, None) is not type(model):
        _refuse(name, f"be one of {', '.join(sorted(_READERS))}", f"{type(model).__module__}.{name}")
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        # those that transformers leaves behind when it was asked for hidden states only look
        if any(getattr(hook, "__module__", "") != _LOOKING for hook in hooks) or "forward" in vars(module):
            _refuse(path or name, "run its class's forward without hooks", "a hook or a replaced forward")
    text = model.model.language_model if name == "LlavaForConditionalGeneration" else model.base_model
    if text.config._attn_implementation not in (*_ATTENTION, None):
        _refuse(name, "attend in the usual way", text.config._attn_implementation)
    return _READERS[name](model, text)


def _read_llama(model: Any, text: Any) -> Plan:
    """Llama and those that differ from it in norms of queries and keys, windows, biases or experts."""
    config, family = text.config, type(text).__name__.removesuffix("TextModel").removesuffix("Model")
    everywhere = getattr(config, "sliding_window", None) if family in ("Mistral", "Mixtral") else None
    gemma = family == "Gemma3"
    if gemma and (config.use_bidirectional_attention or config.attn_logit_softcapping is not None):
        _refuse(family, "look back only, without a cap on scores", "bidirectional attention or attn_logit_softcapping")
    norm_class = getattr(__import__(type(text).__module__, fromlist=["x"]), f"{family}RMSNorm")
    layers = []
    for number, block in enumerate(text.layers[: config.num_hidden_layers]):
        _exact(f"layers.{number}", block, f"{family}DecoderLayer")
        attention, mlp = _left(block.self_attn), _left(block.mlp)
        if attention is not None:
            _exact(f"layers.{number}.self_attn", attention, f"{family}Attention")
        names = ("before_attention", "after_attention", "before_feed", "after_feed") if gemma else (
            "before_attention", "before_feed")  # fmt: skip
        modules: tuple[Any, ...] = (block.input_layernorm, block.post_attention_layernorm)
        if gemma:
            modules += (block.pre_feedforward_layernorm, block.post_feedforward_layernorm)
        there = {"attention": attention, "feed": mlp}
        norms: dict[str, Any] = {
            key: _rms(module, norm_class, gemma)
            for key, module in zip(names, modules, strict=True)
            if there[key.partition("_")[2]] is not None
        }
        window = everywhere if everywhere is not None else getattr(attention, "sliding_window", None)
        mixing = None if attention is None else _attention(attention, window, norm_class, gemma)
        layers.append(Layer(mixing, None if mlp is None else _feed(mlp, family), **norms))
    return Plan(
        family=family,
        layers=tuple(layers),
        norm=_rms(text.norm, norm_class, gemma),
        head=_matrix("lm_head", model.lm_head),
        embed=text.embed_tokens,
        width=config.hidden_size,
        ropes=_ropes(text.rotary_emb, config, gemma),
        tied_scale=_tied_scale(text.embed_tokens, model.lm_head),
        softcap=getattr(model.config, "final_logit_softcapping", None) if gemma else None,
    )


def _read_gpt2(model: Any, text: Any) -> Plan:
    config = text.config
    if config.add_cross_attention:
        _refuse("GPT2", "have no cross-attention", "add_cross_attention=True")
    layers = []
    for number, block in enumerate(text.h):
        _exact(f"h.{number}", block, "GPT2Block")
        attention, mlp = _left(block.attn), _left(block.mlp)
        mixing = feed = None
        if attention is not None:
            _exact(f"h.{number}.attn", attention, "GPT2Attention")
            heads = attention.num_heads
            mixing = Attention(heads, heads, attention.head_dim, attention.scaling, None, None,
                               _matrix("c_attn", attention.c_attn), _matrix("c_proj", attention.c_proj))  # fmt: skip
        if mlp is not None:
            _exact(f"h.{number}.mlp", mlp, "GPT2MLP")
            feed = Feed(_matrix("c_fc", mlp.c_fc), _matrix("mlp.c_proj", mlp.c_proj), mlp.act,
                        _ACTIVATIONS.get(config.activation_function, ""), False)  # fmt: skip
        layers.append(
            Layer(
                mixing,
                feed,
                None if attention is None else _layer_norm(block.ln_1),
                None if mlp is None else _layer_norm(block.ln_2),
            )
        )
    return Plan(
        family="GPT2",
        layers=tuple(layers),
        norm=_layer_norm(text.ln_f),
        head=_matrix("lm_head", model.lm_head),
        embed=text.wte,
        width=config.hidden_size,
        ropes={},
        tied_scale=_tied_scale(text.wte, model.lm_head),
        positions=text.wpe.weight.detach(),
    )


_READERS: dict[str, Callable[[Any, Any], Plan]] = {
    "LlamaForCausalLM": _read_llama,
    "MistralForCausalLM": _read_llama,
    "MixtralForCausalLM": _read_llama,
    "Qwen2ForCausalLM": _read_llama,
    "Qwen3ForCausalLM": _read_llama,
    "Gemma3ForCausalLM": _read_llama,
    "LlavaForConditionalGeneration": _read_llama,
    "GPT2LMHeadModel": _read_gpt2,
}


def _left(module: Any) -> Any:
    """``module``, or ``None`` where surgery dropped it."""
    return None if type(module) in (NoAttention, Nothing) else module


def _attends(layer: Layer) -> str:
    a = layer.attention
    if a is None:
        return "no attention"
    return f"{a.heads}/{a.kv_heads} heads of {a.head_dim}, {'full' if a.window is None else f'window {a.window}'}"


def _feeds(layer: Layer) -> str:
    feed = layer.feed
    if isinstance(feed, Feed):
        return "gated feed" if feed.gated else "feed"
    return "no feed" if feed is None else type(feed).__name__


def _attention(module: Any, window: int | None, norm_class: type, gemma: bool) -> Attention:
    head_dim = module.head_dim
    heads, kv_heads = _outputs(module.q_proj) // head_dim, _outputs(module.k_proj) // head_dim
    if heads != kv_heads * module.num_key_value_groups or _outputs(module.v_proj) != kv_heads * head_dim:
        _refuse("attention", "share each key head among equally many queries", f"{heads} and {kv_heads} heads")
    q_norm, k_norm = getattr(module, "q_norm", None), getattr(module, "k_norm", None)
    return Attention(
        heads,
        kv_heads,
        head_dim,
        module.scaling,
        window,
        module.layer_type if gemma else "all",
        _matrix("qkv", module.q_proj, module.k_proj, module.v_proj),
        _matrix("o_proj", module.o_proj),
        None if q_norm is None else _rms(q_norm, norm_class, gemma),
        None if k_norm is None else _rms(k_norm, norm_class, gemma),
    )


def _feed(module: Any, family: str) -> Feed | nn.Module:
    if type(module).__name__ != f"{family}MLP":
        _exact("mlp", module, f"{family}SparseMoeBlock")
        return module
    config = module.config
    name = getattr(config, "hidden_activation", None) or config.hidden_act
    up = _matrix("gate_up", module.gate_proj, module.up_proj)
    return Feed(up, _matrix("down_proj", module.down_proj), module.act_fn, _ACTIVATIONS.get(name, ""), True)


def _ropes(module: Any, config: Any, gemma: bool) -> dict[str, Any]:
    kinds = module.rope_type if gemma else {"all": module.rope_type}
    for kind in kinds.values():
        if kind not in _STATIC_ROPES:
            _refuse("rotary embedding", f"be one of {', '.join(_STATIC_ROPES)}", kind)

    def reader(*layer_type: str) -> Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]:
        def angles(positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            like = torch.empty(0, dtype=dtype, device=positions.device)
            cos, sin = module(like, positions[None], *layer_type)
            return cos[0], sin[0]

        return angles

    ropes = {key: reader(*([key] if gemma else [])) for key in kinds}
    for angles in ropes.values():
        width = angles(torch.arange(1, device=_device(module)), torch.float32)[0].shape[-1]
        if width != getattr(config, "head_dim", config.hidden_size // config.num_attention_heads):
            _refuse("rotary embedding", "turn whole heads", f"{width} places of a head")
    return ropes


def _rms(module: Any, expected: type, gemma: bool) -> Norm:
    if type(module) is not expected:
        _refuse("norm", f"be a {expected.__name__}", type(module).__name__)
    gain = module.weight.detach().float()
    return Norm("rms", 1.0 + gain if gemma else gain, None, module.eps if gemma else module.variance_epsilon, not gemma)


def _layer_norm(module: Any) -> Norm:
    if type(module) is not nn.LayerNorm:
        _refuse("norm", "be a LayerNorm", type(module).__name__)
    bias = None if module.bias is None else module.bias.detach().float()
    return Norm("layer", module.weight.detach().float(), bias, module.eps)


def _matrix(name: str, *modules: Any) -> Matrix:
    for module in modules:
        if type(module) not in (nn.Linear, Conv1D, QuantLinear, TiedQuantLinear):
            _refuse(name, "be a linear layer, Conv1D or packed layer", type(module).__name__)
    return Matrix(modules)


def _outputs(module: Any) -> int:
    _matrix("projection", module)
    return int(module.nf if isinstance(module, Conv1D) else module.out_features)


def _tied_scale(embedding: Any, head: Any) -> float | None:
    if isinstance(embedding, QuantEmbedding) and isinstance(head, TiedQuantLinear):
        return embedding.scale
    known = type(embedding) is nn.Embedding or type(embedding).__name__ == "Gemma3TextScaledWordEmbedding"
    if not known or getattr(head, "weight", None) is not embedding.weight:
        return None
    return float(getattr(embedding, "embed_scale", 1.0))


def _exact(path: str, module: Any, name: str) -> None:
    if type(module).__name__ != name or not type(module).__module__.startswith("transformers.models."):
        _refuse(path, f"be a {name} of transformers", type(module).__name__)


def _device(module: Any) -> Any:
    return next((buffer.device for buffer in module.buffers()), torch.device("cpu"))


def _refuse(where: str, must: str, got: str) -> None:
    raise NotPlanned(where, must=must, got=got, do="run the model itself")
