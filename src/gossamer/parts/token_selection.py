"""Token selection inside the layers of a vision-language decoder: tokens leave between two layers of the prefill.

Before layer r a policy names the tokens of each row that stay, from the hidden states X [b, t, d] that layer r is about
to read. They are gathered, and layer r and all deeper ones get masks, rotary angles and cache lengths of their own:

    X' [b, t', d] = the kept rows of X, padded on the left        t' = the longest row that is left
    p' = p (positions kept) or p_first + 0, 1, 2 ... (renumbered, as a prompt of that length would be)

The deeper layers cache t' keys. A token decoded later has in them the position p - (tokens that left), or p, and a mask
over their own keys. At the end every place of the input gets the state of the last kept token at or before it (zeros
where there is none), so logits, labels and ``logits_to_keep`` keep their places, and a loss over labels that ignore the
image is the loss over gathered labels.

It works by hooks on the decoder and its layers and around the model's forward: no weight and no attention function
changes, and removing them leaves nothing behind. What one forward pass decides travels with it as a keyword argument,
what later calls need stays on the cache. Image tokens are found by the config's image token id, wherever and however
many they are.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from gossamer.core.errors import InputError
from gossamer.parts.token_layouts import Layout, extend, restore, select, whole

IGNORED = -100  # label of a token that bears no loss
_RUN, _KEPT_ON_CACHE, _ON_MODEL = "token_selection", "token_layouts", "_token_selection"


@dataclasses.dataclass
class Run:
    """One forward pass. ``image``, ``prompt`` and ``asks`` are bool [b, T] over its input.

    ``prompt`` are the tokens before the first label, or all; ``asks`` those from which an answer is predicted: the one
    before each run of labels, or without labels the last.
    """

    image: Tensor
    real: Tensor
    prompt: Tensor
    asks: Tensor
    prefill: bool
    layouts: dict[int, Layout] = dataclasses.field(default_factory=dict)  # by the first layer of the stage
    arguments: dict[tuple[int, str], dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)  # the policy's own

    def start(self, layer: int) -> int:
        """The first layer of the stage that ``layer`` is in."""
        return max(first for first in self.layouts if first <= layer)


Policy = Callable[[int, Tensor, Layout, Run], Tensor | None]
"""(layer, its input [b, t, d], its tokens, the run) -> tokens that stay, bool [b, t]; None for all of them."""


class Decoder:
    """The language model inside ``model``: its layers, and what each of them takes.

    Raises InputError for a model that has no image token id, or whose text model is not a stack of rotary layers with
    separate query and key projections (Llama, Mistral, Qwen 2 and 3, Gemma 3).
    """

    def __init__(self, model: Any) -> None:
        model = _inner(model)
        self.model: Any = model
        self.text: Any = getattr(getattr(model, "model", None), "language_model", None)
        got, do = type(model).__name__, "give a LLaVA-type model"
        if self.text is None or getattr(model.config, "image_token_id", None) is None:
            raise InputError("token selection", must="get a model with an image token and a text model", got=got, do=do)
        self.layers: Any = getattr(self.text, "layers", None)
        first = self.layers[0].self_attn if self.layers else None
        if not (hasattr(first, "q_proj") and hasattr(first, "k_proj") and hasattr(self.text, "rotary_emb")):
            got = type(self.text).__name__
            raise InputError(
                "token selection", must="get a text model of rotary layers with q_proj and k_proj", got=got
            )
        self.config = self.text.config
        if "mrope_section" in str(getattr(self.config, "rope_parameters", "")):
            must, got = "get a text model with one position a token", "positions in three dimensions"
            raise InputError("token selection", must=must, got=got, do=do)
        window = getattr(self.config, "sliding_window", None)
        same = ["sliding_attention" if window else "full_attention"] * self.config.num_hidden_layers
        self.kinds: list[str] = getattr(self.config, "layer_types", None) or same
        self._angles_by_kind = "layer_type" in inspect.signature(self.text.rotary_emb.forward).parameters

    def angles(self, layer: int, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [b, t, head] at ``positions`` [b, t], in the rotation of this layer."""
        extra = (self.kinds[layer],) if self._angles_by_kind else ()
        found: tuple[Tensor, Tensor] = self.text.rotary_emb(like, positions, *extra)
        return found

    def arguments(self, layer: int, hidden: Tensor, layout: Layout, cache: Any = None) -> dict[str, Any]:
        """Mask, positions and angles for ``hidden``, the last tokens [b, q, d] of ``layout``, at ``layer``."""
        given: dict[str, Any] = {
            "config": self.config, "inputs_embeds": hidden, "attention_mask": layout.mask, "past_key_values": cache,
            "layer_idx": layer,
        }  # fmt: skip
        if self.kinds[layer] != "sliding_attention":
            mask = create_causal_mask(**given)
        elif not layout.gaps:
            mask = create_sliding_window_causal_mask(**given)
        elif "flash" in str(self.config._attn_implementation):
            must, do = "have full attention where positions have gaps", "use attn_implementation='sdpa'"
            raise InputError("token selection", must=must, got="a sliding window under flash attention", do=do)
        else:  # places no longer tell distances: the window goes by positions
            mask = create_causal_mask(**given, and_mask_function=_within(layout.positions, self.config.sliding_window))
        positions = layout.positions[:, -hidden.shape[1] :]
        return {
            "attention_mask": mask, "position_ids": positions,
            "position_embeddings": self.angles(layer, hidden, positions),
        }  # fmt: skip

    @torch.no_grad()
    def attention(self, layer: int, hidden: Tensor, layout: Layout, places: Tensor) -> Tensor:
        """Attention float32 [b, m, t] that the tokens at ``places`` [b, m] pay at ``layer``, mean over heads.

        It is computed from the layer's own norm and projections, so any attention function may run the model. All
        tokens up to the place are seen, also beyond the window of a sliding layer.
        """
        block = self.layers[layer]
        attention, x = block.self_attn, block.input_layernorm(hidden)
        asked = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
        cos, sin = self.angles(layer, x, layout.positions)
        q, k = self._heads(attention, "q", asked), self._heads(attention, "k", x)
        k = _rotate(k, cos[:, None], sin[:, None])
        index = places[..., None].expand(-1, -1, cos.shape[-1])
        q = _rotate(q, cos.gather(1, index)[:, None], sin.gather(1, index)[:, None])
        q = q.unflatten(1, (k.shape[1], -1))  # [b, key heads, queries that share them, m, head]
        scores = (q @ k[:, :, None].transpose(-1, -2)).float() * attention.scaling
        cap = getattr(attention, "attn_logit_softcapping", None)
        scores = torch.tanh(scores / cap) * cap if cap else scores
        seen = layout.mask[:, None] & (torch.arange(x.shape[1], device=x.device) <= places[..., None])
        scores = scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
        return scores.softmax(-1).mean((1, 2))

    def forward_from(self, layer: int, hidden: Tensor, layout: Layout) -> Tensor:
        """Run ``hidden`` [b, t, d] through ``layer`` and all after it and the last norm, without a cache."""
        made: dict[str, dict[str, Any]] = {}
        for index in range(layer, len(self.layers)):
            kind = self.kinds[index]
            made[kind] = made.get(kind) or self.arguments(index, hidden, layout)
            hidden = self.layers[index](hidden, **made[kind], past_key_values=None, use_cache=False)
        normed: Tensor = self.text.norm(hidden)
        return normed

    def _heads(self, attention: Any, which: str, x: Tensor) -> Tensor:
        """[b, t, d] -> [b, heads, t, head], normalised where the layer does so."""
        projected = getattr(attention, f"{which}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{which}_norm", None)
        return (projected if norm is None else norm(projected)).transpose(1, 2)


class TokenSelection:
    """Puts a policy on a model: ``install()``; ``TokenSelection.take_off(model)`` leaves the model as it was.

    The policy is asked before each layer but the first, in every forward pass of more than one token that brings image
    tokens. In training mode it is asked where ``trains``; then labels must tell where the prompt ends. ``last`` is the
    run of the last prefill.
    """

    def __init__(self, model: Any, policy: Policy, *, renumber: bool, trains: bool = False) -> None:
        self.decoder, self.policy, self.renumber, self.trains = Decoder(model), policy, renumber, trains
        self.last: Run | None = None
        self._signature = inspect.signature(type(self.decoder.model).forward)
        self._hooks: list[Any] = []

    def install(self) -> None:
        model = self.decoder.model
        model.forward = _Forward(self, model.forward)
        self._hooks = [self.decoder.text.register_forward_hook(self._restore, with_kwargs=True)]
        for index, layer in enumerate(self.decoder.layers):
            hook = _LayerHook(self, index)
            self._hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        setattr(model, _ON_MODEL, self)

    @staticmethod
    def take_off(model: Any) -> None:
        """Remove what ``install`` put on ``model``; nothing happens where nothing is on it."""
        model = _inner(model)
        selection = vars(model).pop(_ON_MODEL, None)
        if selection is not None:
            del model.forward
            for hook in selection._hooks:
                hook.remove()

    def begin(self, args: Any, kwargs: Any) -> dict[str, Any]:
        """The keyword arguments of a call of the model, with what it holds added."""
        model = self.decoder.model
        if model.training and not self.trains:
            return dict(kwargs)
        given = self._signature.bind(model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        stored = given["past_key_values"].get_seq_length() if given.get("past_key_values") is not None else 0
        run = read_call(model, given, prefill=not stored)
        if stored and bool(run.image.any()):
            raise InputError(
                "token selection",
                must="get all images in the first call of a cache",
                got=f"image tokens after {stored} cached ones",
                do="start with a new cache, and without prefill_chunk_size",
            )
        if model.training and given.get("labels") is None:
            must = "get labels in training, which tell where the prompt ends"
            raise InputError("token selection", must=must, got="none", do="pass labels, -100 at the prompt")
        if run.prefill:
            self.last = run
        return {**kwargs, _RUN: run}

    def before_layer(self, index: int, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        run: Run | None = kwargs.pop(_RUN, None)
        if run is None:
            return None
        hidden, cache = args[0], kwargs.get("past_key_values")
        if index == 0:
            self._first(hidden, kwargs["position_ids"], cache, run)
            return None
        if run.prefill and bool(run.image.any()):
            hidden = self._select(index, hidden, run)
        first = run.start(index) if run.layouts else 0
        if first == 0:
            return None
        kind = self.decoder.kinds[index]
        if (first, kind) not in run.arguments:
            run.arguments[first, kind] = self.decoder.arguments(index, hidden, run.layouts[first], cache)
        return (hidden, *args[1:]), {**kwargs, **run.arguments[first, kind]}

    def _first(self, hidden: Tensor, positions: Tensor, cache: Any, run: Run) -> None:
        """Before the first layer: the tokens of a prefill, or those of the cache with the new ones."""
        positions = positions.expand(hidden.shape[0], -1)
        if run.prefill:
            run.layouts[0] = whole(run.real, positions)
            if cache is not None:
                setattr(cache, _KEPT_ON_CACHE, run.layouts)
            return
        kept: dict[int, Layout] = getattr(cache, _KEPT_ON_CACHE, {})
        for first in kept:
            stored = cache.get_seq_length(first)  # shorter than before where a cache was cropped
            kept[first] = extend(kept[first], stored, run.real, positions)
        run.layouts = kept

    def _select(self, index: int, hidden: Tensor, run: Run) -> Tensor:
        layout = run.layouts[run.start(index)]
        keep = self.policy(index, hidden.detach(), layout, run)
        if keep is None or bool((keep | ~layout.mask).all()):
            return hidden
        hidden, run.layouts[index] = select(hidden, layout, keep & layout.mask, renumber=self.renumber)
        return hidden

    def _restore(self, text: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """After the decoder: states at the places of the input."""
        run: Run | None = kwargs.get(_RUN)
        if run is not None and run.prefill and max(run.layouts) > 0:
            output.last_hidden_state = restore(output.last_hidden_state, run.layouts[max(run.layouts)], run.image)
        return output


class _Forward:
    """In the place of a model's ``forward``: PEFT calls that one, past all hooks. A copied model gets its own."""

    def __init__(self, selection: TokenSelection, plain: Callable[..., Any]) -> None:
        self.selection, self.plain = selection, plain
        self.__signature__ = inspect.signature(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain(*args, **self.selection.begin(args, kwargs))


@dataclasses.dataclass(frozen=True)
class _LayerHook:
    selection: TokenSelection
    index: int

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        return self.selection.before_layer(self.index, args, kwargs)


def _inner(model: Any) -> Any:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_call(model: Any, given: dict[str, Any], *, prefill: bool = True) -> Run:
    """What a call of ``model`` with these arguments holds; InputError where there is an image and no place for it."""
    ids, embeds, token = given.get("input_ids"), given.get("inputs_embeds"), model.config.image_token_id
    if ids is not None:
        image = ids == token
    elif embeds is not None:
        marker = model.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        image = (embeds == marker).all(-1)
    else:
        raise InputError("token selection", must="get input_ids or inputs_embeds", got="neither")
    seen = given.get("pixel_values") is not None or (given.get("mm_encoder_outputs") or {}).get("image") is not None
    if seen and not bool(image.any()):
        do = "use the processor that belongs to the model"
        raise InputError("token selection", must=f"find image tokens (id {token})", got="an image and none", do=do)
    mask = given.get("attention_mask")
    if isinstance(mask, dict) or (mask is not None and mask.ndim != 2):
        got = "prepared masks" if isinstance(mask, dict) else f"{mask.ndim} dimensions"
        do = "let the model build its masks; a static cache prepares them, use the dynamic one"
        raise InputError("token selection: attention_mask", must="be [rows, tokens]", got=got, do=do)
    real = torch.ones_like(image) if mask is None else mask[:, -image.shape[1] :].bool()
    return Run(image & real, real, *_prompt(real, given.get("labels")), prefill and image.shape[1] > 1)


def _prompt(real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens of the prompt, and those from which an answer is predicted, bool [b, t] each."""
    places = torch.arange(real.shape[1], device=real.device)
    last = places == (real * places).amax(1, keepdim=True)
    if labels is None:
        return real, last & real
    answer = (labels != IGNORED) & real
    starts = answer & ~nn.functional.pad(answer, (1, -1))
    asks = nn.functional.pad(starts, (-1, 1)) & real
    before = real & (answer.long().cumsum(1) == 0)
    return before, torch.where(asks.any(1, keepdim=True), asks, last & real)


def _within(positions: Tensor, window: int) -> Callable[[Any, Any, Any, Any], Any]:
    def inside(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return positions[batch, query] - positions[batch, key] < window

    return inside


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on [b, heads, t, head]: the halves are pairs."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin
