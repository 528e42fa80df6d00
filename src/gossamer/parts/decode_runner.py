"""The decoding runner: a causal model of transformers bound once, then stepped without its modules.

    runner = Runner(model, weights="int8")
    state = runner.open()
    logits = runner.prefill(state, ids)             # [V], of the last place
    logits = runner.step(state, token)              # [V]
    out = runner.verify(state, tokens, parents)     # logits [n, V] of a tree; then state.keep(path)
    tokens = runner.generate(ids, max_new_tokens=64)

All of these are :meth:`Runner.run` over :class:`Chunk` s: any requests in any company, each with its own number of new
tokens. Linear layers see the rows of all of them as one matrix; attention goes request by request; so nothing is padded
and a server batches by handing over the requests that are due.

Greedy text in float32 is that of ``model.generate``. Keys that a sliding layer no longer sees are kept, not read.
Models whose blocks are not known (see :mod:`~gossamer.parts.decode_plan`) run their own forward behind the same
interface, on the weights that they hold; ``runner.plan`` is then None and ``runner.reason`` says why.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.parts.decode_native import NativeHalf, NativeWeight, load_native
from gossamer.parts.decode_native_step import NativeStep, is_half, native_fits
from gossamer.parts.decode_own import OwnForward
from gossamer.parts.decode_plan import Feed, Matrix, NotPlanned, Plan, read_plan
from gossamer.parts.decode_state import Chunk, Output, chain, tree_from
from gossamer.parts.decode_step import TorchStep
from gossamer.parts.decode_weights import (
    Codes,
    IntegerWeight,
    TorchIntegerWeight,
    Weight,
    check_format,
    compute_dtype,
    float_weight,
    integer_form,
)
from gossamer.parts.requests import Choice

NATIVE = ("auto", "never", "require", "reference")
BLOCK = 512  # prompt tokens that are run at a time
MAX_LENGTH = 4096


class Runner:
    """A bound model.

    ``weights``: "float32", "bfloat16", "int8", "int4" (groups of 32), or "stored": as the model holds them, packed
    matrices staying integers. Packed matrices keep their codes under "int8" and "int4" as well. ``head``: the same for
    the output matrix, by default as ``weights``. ``max_length``: tokens that a request may have. ``native``: "auto"
    compiles the integer kernels and falls back to torch's operators, warning once, where that fails; "require" raises;
    "never" takes torch's operators; "reference" the plain torch form of the very same arithmetic.

    The model itself is not changed. Afterwards only its expert modules and its embedding are needed, and the embedding
    not where it is the head and the head holds integers: its rows are then restored from those.
    """

    def __init__(
        self,
        model: Any,
        *,
        weights: str = "stored",
        head: str | None = None,
        max_length: int | None = None,
        native: str = "auto",
    ) -> None:
        check_format(weights, "weights")
        check_format(head or weights, "head")
        if native not in NATIVE:
            raise OptionError(f"native {native!r}", must="be known", do=did_you_mean(native, NATIVE))
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise InputError("Runner", must="get a causal language model", got=type(model).__name__)
        self.max_length = _max_length(model, max_length)
        self.plan: Plan | None = None
        self.reason = ""
        try:
            self.plan = read_plan(model)
        except NotPlanned as refusal:
            self.reason = str(refusal)
        self.native, self.library = "", None
        if self.plan is None:
            if weights != "stored":
                warnings.warn(f"weights={weights!r} is not used: {self.reason}", stacklevel=2)
            self._backend: Any = OwnForward(model, self.max_length)
            return
        self.dtype = compute_dtype(weights, model)
        self._reference = native == "reference"
        wanted = list(_matrices(self.plan, weights, head or weights))
        codes = {id(matrix): integer_form(matrix, form) for matrix, form in wanted}
        floats = {
            id(matrix): float_weight(matrix, form, self.dtype) for matrix, form in wanted if codes[id(matrix)] is None
        }
        compiles = any(codes.values()) or any(map(is_half, floats.values()))
        self.library = load_native(native) if compiles and native in ("auto", "require") else None
        matrices: dict[int, Weight] = {
            key: floats[key] if form is None else self._integers(form) for key, form in codes.items()
        }
        if self.library is not None and native_fits(self.plan, matrices):
            for key, weight in matrices.items():
                if is_half(weight):
                    matrices[key] = NativeHalf(weight.weight, weight.bias, self.library)
            self.dtype = torch.float32
        self._head = matrices[id(self.plan.head)]
        self.nbytes = sum(weight.nbytes for weight in matrices.values())
        rows, scale = getattr(self._head, "rows", None), self.plan.tied_scale
        if rows is not None and scale is not None:
            self.plan = dataclasses.replace(self.plan, embed=lambda ids: rows(ids) * scale)
        if self.library is not None and native_fits(self.plan, matrices):
            self.native = self.library.name  # which path, where whole steps run on the kernels
            self._backend = NativeStep(self.plan, matrices, self.max_length, self.library)
        else:
            self._backend = TorchStep(self.plan, matrices, self.max_length, self.dtype, model.device)

    def open(self) -> Any:
        """A new request: ``length``, ``room``, ``crop(n)``, ``keep(indices)``, ``fork()``."""
        return self._backend.open()

    @torch.no_grad()
    def run(self, chunks: Sequence[Chunk], hidden: Sequence[int] = ()) -> list[Output]:
        """One step over ``chunks``, no state twice. ``hidden`` asks for hidden states, numbered as transformers does:
        0 the embeddings, l the output of layer l, and -1 (or the number of layers) the last one, normed;
        ``BEFORE_NORM`` is the last one before its norm."""
        if len({id(chunk.state) for chunk in chunks}) < len(chunks):
            raise InputError("run", must="get each state once", got="a state twice")
        for chunk in chunks:
            chunk.state.check(len(chunk.tokens), "run")
        outputs: list[Output] = self._backend.run(chunks, tuple(hidden), self.logits)
        for chunk in chunks:
            if chunk.tree.chain:
                chunk.state.length += len(chunk.tokens)
            else:
                chunk.state.pending = chunk.tree
        return outputs

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [n, V] from normed last hidden states [n, d]."""
        assert self.plan is not None, self.reason
        scores = self._head(hidden).float()
        cap = self.plan.softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def prefill(self, state: Any, ids: Sequence[int] | Tensor) -> Tensor:
        """Add a prompt of any length; logits [V] after its last token."""
        tokens = _tokens(ids)
        state.check(len(tokens), "prefill")
        for start in range(0, len(tokens), BLOCK):
            part = tokens[start : start + BLOCK]
            last = start + BLOCK >= len(tokens)
            out = self.run([Chunk(state, part, chain(len(part)), "last" if last else "none")])[0]
        return out.logits[0]

    def step(self, state: Any, token: int) -> Tensor:
        """Add one token; logits [V] of what follows."""
        return self.run([Chunk(state, (token,), _ONE)])[0].logits[0]

    def verify(
        self,
        state: Any,
        tokens: Sequence[int],
        parents: Sequence[int] | None = None,
        *,
        mask: Tensor | None = None,
        positions: Sequence[int] | None = None,
        hidden: Sequence[int] = (),
    ) -> Output:
        """Logits [n, V] after each of the new ``tokens``, which hang together as ``parents`` (-1: the state's last
        token) or ``mask`` [n, n] say, by default as a chain. Follow with ``state.keep(path)``, for a chain too."""
        tree = dataclasses.replace(tree_from(len(tokens), parents, mask, positions), chain=False)
        return self.run([Chunk(state, tokens, tree, "all")], hidden)[0]

    def stream(
        self,
        ids: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        eos: int | Iterable[int] = (),
        choice: Choice | None = None,
    ) -> Iterator[int]:
        """Tokens one by one, greedy without a ``choice``; an end token is the last one given."""
        ends, choice = {eos} if isinstance(eos, int) else set(eos), choice or Choice()
        state, text = self.open(), _tokens(ids)
        logits = self.prefill(state, text)
        for count in range(1, max_new_tokens + 1):
            token = choice.pick(text, logits)
            text.append(token)
            yield token
            if token in ends or count == max_new_tokens:
                return
            logits = self.step(state, token)

    def generate(self, ids: Sequence[int] | Tensor, *, max_new_tokens: int, eos: int | Iterable[int] = ()) -> list[int]:
        """The greedy continuation of a prompt, the end token included."""
        return list(self.stream(ids, max_new_tokens=max_new_tokens, eos=eos))

    def generate_many(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, eos: int | Iterable[int] = ()
    ) -> list[list[int]]:
        """As :meth:`generate`, all prompts in step with one another; those that are done leave."""
        ends = {eos} if isinstance(eos, int) else set(eos)
        states = [self.open() for _ in prompts]
        made = [[int(self.prefill(state, ids).argmax())] for state, ids in zip(states, prompts, strict=True)]
        while live := [n for n, tokens in enumerate(made) if tokens[-1] not in ends and len(tokens) < max_new_tokens]:
            outs = self.run([Chunk(states[n], made[n][-1:], _ONE) for n in live])
            for n, out in zip(live, outs, strict=True):
                made[n].append(int(out.logits[0].argmax()))
        return made

    def _integers(self, codes: Codes) -> Weight:
        if self.library is not None:
            return NativeWeight(codes, self.library)
        if not self._reference and TorchIntegerWeight.fits(codes):
            return TorchIntegerWeight(codes)
        return IntegerWeight(codes)


_ONE = chain(1)


def _matrices(plan: Plan, weights: str, head: str) -> Iterator[tuple[Matrix, str]]:
    for layer in plan.layers:
        if layer.attention is not None:
            yield layer.attention.qkv, weights
            yield layer.attention.out, weights
        if isinstance(layer.feed, Feed):
            yield layer.feed.up, weights
            yield layer.feed.down, weights
    yield plan.head, head


def _max_length(model: Any, asked: int | None) -> int:
    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None)
    if asked is None:
        return min(room or MAX_LENGTH, MAX_LENGTH)
    if asked < 1 or (room is not None and asked > room):
        raise OptionError("max_length", must=f"be from 1 to the model's {room} positions", got=asked)
    return asked


def _tokens(ids: Sequence[int] | Tensor) -> list[int]:
    if isinstance(ids, Tensor):
        if ids.numel() != ids.shape[-1]:
            raise InputError("prefill", must="get one prompt", got=f"ids {list(ids.shape)}", do="use generate_many")
        return [int(token) for token in ids.reshape(-1).tolist()]
    return list(ids)
