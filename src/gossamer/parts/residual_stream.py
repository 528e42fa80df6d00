"""The residual stream of a decoder: what writes to it, what reads it, and the same model with fewer channels in it.

A pre-norm decoder carries a state h [t, d] through its layers:

    h = E[ids] * s;    h = h + P(W_o ...),  h = h + P(W_down ...)      writers: embedding, o_proj, down_proj
    q, k, v, gate, up = W N(h);    logits = W_head N(h)                readers, behind an RMSNorm N
    N(x) = g x / sqrt(S / d + eps),  S = sum of x_i^2                  P: nothing, or an RMSNorm (Gemma 2 and 3)

Where the channels outside a set K of d' are zero in every writer's output, the model with the rows (writers), columns
(readers) and gains of K alone computes the same, once the means over d' are those over d. With c = sqrt(d' / d):

    writers times c                  then S / d and eps keep their ratio, so that eps stays; P has c / c = 1 to change
    N: gain times 1 / c              N(c x) over d' channels = c N(x) over d
    embedding times c s / s'         s' is the scale of the narrow class (Gemma: sqrt(d'))

With a head that is tied to the embedding the last gain takes the embedding's factor too. One could leave the writers
and multiply eps by d / d' instead; but the config's eps is also that of the norms on queries and keys (Qwen 3,
Gemma 3), which must not change. Gains stored as 1 + w are found by trying the norm.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from gossamer.core.errors import InputError

WRITERS = ("self_attn.o_proj", "mlp.down_proj")
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# norms of a layer: those that readers stand behind, and those that stand behind writers
NORMS = (
    (("input_layernorm", "post_attention_layernorm"), ()),
    (
        ("input_layernorm", "pre_feedforward_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ),
)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Paths of the modules on the residual stream of ``width`` channels, in the order of the computation."""

    width: int
    embedding: str
    writers: tuple[str, ...]  # linear layers, the embedding not among them
    readers: tuple[str, ...]  # linear layers, the head not among them
    norms: tuple[str, ...]  # before readers; the last one is before the head
    after_norms: tuple[str, ...]  # behind writers
    head: str
    tied: bool


def residual_stream(model: Any, where: str) -> Stream:
    """The stream of a causal Llama-, Mistral-, Qwen- or Gemma-type model.

    Raises InputError, in the name of ``where``, for any other build: unknown modules, norms that are no RMSNorm.
    """
    decoder, head = _decoder(model, where)
    paths = {id(module): path for path, module in model.named_modules()}
    base = paths[id(decoder)]
    layers = [f"{base}.layers.{index}" for index in range(len(decoder.layers))]
    before, after = _norm_names(decoder.layers[0], where)
    stream = Stream(
        width=decoder.embed_tokens.embedding_dim,
        embedding=f"{base}.embed_tokens",
        writers=tuple(f"{layer}.{name}" for layer in layers for name in WRITERS),
        readers=tuple(f"{layer}.{name}" for layer in layers for name in READERS),
        norms=(*(f"{layer}.{name}" for layer in layers for name in before), f"{base}.norm"),
        after_norms=tuple(f"{layer}.{name}" for layer in layers for name in after),
        head=paths[id(head)],
        tied=head.weight is decoder.embed_tokens.weight,
    )
    _check_linears(model, stream, where)
    _check_all_known(model, stream, [f"{layer}.{name}" for layer in layers for name in HEAD_NORMS], where)
    for path in (*stream.norms, *stream.after_norms):
        _gain_offset(model.get_submodule(path), path, stream.width, where)
    return stream


@torch.no_grad()
def narrow(model: Any, keep: Tensor, where: str, *, gain: float = 1.0) -> Any:
    """A new model of the same class whose stream has the channels ``keep`` (int [d'], ascending, no two alike) alone.

    Equal to ``model`` where no writer writes to the other channels. Where they are not empty, ``gain`` = sqrt(d' / d),
    a further factor of the gains before readers, leaves what stays at its size. Weights are computed in float32 and
    rounded once; class, dtype, device, mode and what requires gradients stay. Raises InputError where the class refuses
    the width.
    """
    stream = residual_stream(model, where)
    small = _empty(model, stream, len(keep), where)
    c = math.sqrt(len(keep) / stream.width)
    old, new = (each.get_submodule(stream.embedding) for each in (model, small))
    lifted = c * _embedding_scale(old) / _embedding_scale(new)
    factors = dict.fromkeys(stream.norms, gain / c)
    if stream.tied:
        factors[stream.norms[-1]] /= lifted
    state = dict(model.state_dict())
    keep = keep.to(old.weight.device)

    def put(name: str, value: Tensor) -> None:
        state[name] = value.to(state[name].dtype)

    put(f"{stream.embedding}.weight", lifted * old.weight.float()[:, keep])
    for path in stream.writers:
        layer = model.get_submodule(path)
        put(f"{path}.weight", c * layer.weight.float()[keep])
        if layer.bias is not None:
            put(f"{path}.bias", c * layer.bias.float()[keep])
    for path in stream.readers:
        put(f"{path}.weight", model.get_submodule(path).weight[:, keep])
    head = f"{stream.head}.weight"
    put(head, state[f"{stream.embedding}.weight"] if stream.tied else state[head][:, keep])
    for path in (*stream.norms, *stream.after_norms):
        norm = model.get_submodule(path)
        offset = _gain_offset(norm, path, stream.width, where)
        put(f"{path}.weight", (norm.weight.float()[keep] + offset) * factors.get(path, 1.0) - offset)
    small.load_state_dict(state)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(wanted[name])
    return small.train(model.training)


@torch.no_grad()
def untie(model: Any) -> None:
    """Give the head a weight of its own, in the config too."""
    head = model.get_output_embeddings()
    trains = head.weight.requires_grad
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=trains)
    model.config.tie_word_embeddings = False


def width_multiple(model: Any) -> int:
    """What a width has to be a multiple of: several config classes refuse one that the heads do not divide."""
    return int(model.config.num_attention_heads)


def _decoder(model: Any, where: str) -> tuple[Any, Any]:
    try:
        decoder, head = model.get_decoder(), model.get_output_embeddings()
        whole = all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")) and head is not None
    except (AttributeError, NotImplementedError):
        whole = False
    if not whole or not len(decoder.layers) or model.config.get_text_config() is not model.config:
        raise InputError(
            f"{where}: model",
            must="be a causal decoder of text alone, with embed_tokens, layers, norm and a head",
            got=type(model).__name__,
            do="use a Llama-, Mistral-, Qwen- or Gemma-type model",
        )
    return decoder, head


def _norm_names(layer: nn.Module, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    found = {name for name, _ in layer.named_children() if "norm" in name}
    for before, after in NORMS:
        if found == {*before, *after}:
            return before, after
    raise InputError(
        f"{where}: layers of {type(layer).__name__}",
        must="have the norms " + " or ".join(str(sorted({*before, *after})) for before, after in NORMS),
        got=sorted(found),
        do="use a Llama-, Mistral-, Qwen- or Gemma-type model",
    )


def _check_linears(model: Any, stream: Stream, where: str) -> None:
    for path in (*stream.writers, *stream.readers, stream.head):
        try:
            layer = model.get_submodule(path)
        except AttributeError:
            layer = None
        wide = getattr(layer, "out_features" if path in stream.writers else "in_features", None)
        if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point() or wide != stream.width:
            raise InputError(
                f"{where}: {path}",
                must=f"be a linear layer with float weights on the {stream.width} channels of the residual stream",
                got="nothing" if layer is None else type(layer).__name__,
                do="use a dense Llama-, Mistral-, Qwen- or Gemma-type model that is not quantised",
            )


def _check_all_known(model: Any, stream: Stream, head_norms: list[str], where: str) -> None:
    """A parameter that is none of the stream's could depend on its width in a way that is not known here."""
    known = {*stream.writers, *stream.readers, *stream.norms, *stream.after_norms, *head_norms}
    known |= {stream.embedding, stream.head}
    own = (name for name, _ in model.named_parameters() if not name.startswith("gossamer_adapter."))
    unknown = sorted(name for name in own if name.rpartition(".")[0] not in known)
    if unknown:
        raise InputError(
            f"{where}: {type(model).__name__}",
            must="have the weights of a dense decoder alone",
            got=f"{len(unknown)} others, {unknown[:2]} among them",
            do="use a Llama-, Mistral-, Qwen- or Gemma-type model",
        )


@torch.no_grad()
def _gain_offset(norm: Any, path: str, width: int, where: str) -> float:
    """0 where the gain is the weight w, 1 where it is 1 + w, by what the norm makes of the vector of ones."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if weight is not None and eps is not None and weight.shape == (width,):
        gain = norm(torch.ones(1, width, dtype=torch.float32, device=weight.device)).float()[0] * math.sqrt(1 + eps)
        for offset in (0.0, 1.0):
            if torch.allclose(gain, weight.float() + offset, rtol=0.02, atol=1e-4):
                return offset
    raise InputError(
        f"{where}: {path}",
        must="be an RMSNorm: another norm, such as LayerNorm, which takes off the mean, mixes channels",
        got=type(norm).__name__,
        do="use a Llama-, Mistral-, Qwen- or Gemma-type model",
    )


@torch.no_grad()
def _embedding_scale(embedding: Any) -> float:
    """The factor between rows of the table and what the embedding gives, over rows enough to even out rounding."""
    weight = embedding.weight.detach()
    rows = torch.arange(min(64, len(weight)), device=weight.device)
    table, given = weight[rows].double(), embedding(rows).double()
    square = float(table.square().sum())
    return float((table * given).sum()) / square if square else 1.0


def _empty(model: Any, stream: Stream, width: int, where: str) -> Any:
    """A model of the class with ``width`` channels, its weights not yet those of ``model``."""
    config = copy.deepcopy(model.config)
    config.head_dim = model.get_submodule(stream.readers[0]).out_features // config.num_attention_heads
    config.hidden_size = width
    config.tie_word_embeddings = stream.tied
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    try:
        with torch.random.fork_rng(devices=[]):
            small = type(model)._from_config(
                type(config).from_dict(config.to_dict()),
                attn_implementation=model.config._attn_implementation,
                dtype=dtype,
            )
    except (ValueError, StrictDataclassError) as error:
        raise InputError(
            f"{where}: width {width}",
            must=f"be one that {type(model).__name__} takes",
            got=str(error).splitlines()[-1].strip(),
            do=f"keep a multiple of {width_multiple(model)} channels",
        ) from error
    small.generation_config = copy.deepcopy(model.generation_config)
    return small.to(device)
