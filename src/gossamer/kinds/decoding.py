"""Decoding: what chooses the next tokens, in three forms, all with one state per request.

- :class:`ProcessorDecoding` moves the model's scores: ``shift(states, scores)``. ``processor(model)`` is a
  ``LogitsProcessor`` for ``model.generate``.
- :class:`DrafterDecoding` guesses trees of tokens that the model then verifies in one step of the decoding runner:
  ``draft(states, k)`` and ``observe``. Verification is lossless (:mod:`gossamer.parts.speculation`).
- :class:`LoopDecoding` emits tokens by itself: ``step(model, states)``. ``loop(model, inputs)`` runs it to the end.

``open(model, prompt, tokenizer)`` begins a request. ``step(model, states)`` moves any live requests one step, in any
order and any company, and returns the tokens that each emitted; that is all that a server with continuous batching
calls. ``generate`` runs prompts through ``model.generate``, so that its options, stopping criteria and streamers hold.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.utils import GENERATION_MODES_MAPPING

from gossamer.core.errors import InputError
from gossamer.kinds.base import System
from gossamer.parts.decode_runner import Runner
from gossamer.parts.generation import GREEDY, end_ids, left_pad
from gossamer.parts.request_rows import RowStates
from gossamer.parts.requests import Choice, Draft, RequestState
from gossamer.parts.several_models import CachedModel
from gossamer.parts.speculation import Speculator, settle

__all__ = [
    "Choice",
    "Decoded",
    "Decoding",
    "Draft",
    "Drafter",
    "DrafterDecoding",
    "LoopDecoding",
    "ProcessorDecoding",
    "RequestState",
]


@dataclasses.dataclass
class Decoded:
    """What ``generate`` gives: per returned sequence its text, its new tokens without padding, and a report."""

    texts: list[str]
    tokens: list[list[int]]
    reports: list[dict[str, Any]]


class Decoding(System):
    """What the three forms share."""

    _base: CachedModel | None = None
    _checked: tuple[Any, Any] | None = None

    def check(self, model: Any, inputs: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
            raise InputError(self.name, must="get a causal language model", got=type(model).__name__)

    @abc.abstractmethod
    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> RequestState:
        """The state of a new request, nothing accepted yet."""

    @abc.abstractmethod
    def step(self, model: Any, states: Sequence[Any]) -> list[list[int]]:
        """Move each live request one step; the tokens that each emitted (and accepted), at least one."""

    @abc.abstractmethod
    def custom_generate(self, tokenizer: Any = None, reports: list[dict[str, Any]] | None = None) -> Callable[..., Any]:
        """What ``model.generate(custom_generate=...)`` takes; it appends a report per sequence to ``reports``."""

    def open(self, model: Any, prompt: Sequence[int], tokenizer: Any = None) -> Any:
        """Begin a request with the token ids ``prompt``; :class:`InputError` for models that do not fit."""
        if self._checked is None or self._checked[0] is not model or self._checked[1] is not tokenizer:
            self.check(model, tokenizer=tokenizer)
            self._checked = (model, tokenizer)
        if not len(prompt):
            raise InputError(f"{self.name}.open", must="get a prompt of at least one token", got="none")
        return self.begin(model, prompt, tokenizer)

    def summary(self, state: Any) -> dict[str, Any]:
        """What ``generate`` reports of a finished request."""
        return {}

    def base(self, model: Any) -> CachedModel:
        """The base model as run over rows."""
        if self._base is None or self._base.model is not model:
            self._base = CachedModel(model)
        return self._base

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: str | Sequence[str] | Mapping[str, Tensor],
        *,
        batch_size: int = 8,
        **options: Any,
    ) -> Decoded:
        """Decode ``prompts``: texts, or a mapping of input_ids and attention_mask [n, t] padded on the left.

        ``options`` are those of ``model.generate``; without them decoding is greedy, whatever the checkpoint's own
        generation config says. Sampling is seeded by ``self.seed`` and leaves the global random state alone.
        """
        config, others = _settings(model, tokenizer, options)
        done = Decoded([], [], [])
        ends = set(config.eos_token_id or ())
        with _seeded(self.seed, model.device):
            for inputs in _batches(tokenizer, prompts, batch_size, config.pad_token_id, model.device):
                run = self.custom_generate(tokenizer, done.reports)
                out = model.generate(**inputs, generation_config=config, custom_generate=run, **others)
                sequences = out if isinstance(out, Tensor) else out.sequences
                for row in sequences[:, inputs["input_ids"].shape[1] :].tolist():
                    stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
                    done.tokens.append(row[:stop])
        if tokenizer is not None:
            done.texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in done.tokens]
        return done


class ProcessorDecoding(Decoding):
    """Moves the scores of the model before anything else does: bans, temperature and top-p come after it."""

    verb = "processor"

    @abc.abstractmethod
    def shift(self, states: Sequence[Any], scores: Tensor) -> Tensor:
        """New scores [n, V] from the model's float32 logits [n, V] (or log-probabilities), a row per state.

        Every state has accepted all of its tokens before. A row must not depend on its company.
        """

    def processor(
        self, model: Any, *, tokenizer: Any = None, attention_mask: Tensor | None = None, beams: int = 1
    ) -> Any:
        """A ``LogitsProcessor`` for one call of ``model.generate(..., logits_processor=[it])``.

        ``attention_mask`` tells padding from prompt where the pad token is also an ordinary one; ``beams`` is
        num_beams. transformers runs its own bans and penalties before it; ``generate`` here puts it first.
        """
        config = model.generation_config
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        pad = config.pad_token_id if config.pad_token_id is not None else getattr(tokenizer, "pad_token_id", None)
        return RowStates(
            lambda prompt: self.open(model, prompt, tokenizer),
            self.shift,
            attention_mask=attention_mask,
            pad=pad,
            ordinary=[token for token in (config.bos_token_id, *ends) if token is not None],
            group=beams,
            log_probs=beams > 1,
        )

    def step(self, model: Any, states: Sequence[Any]) -> list[list[int]]:
        logits = self.base(model).forward([s.past for s in states], [s.ids[s.past.length :] for s in states]).logits
        emitted = []
        for state, scores in zip(states, self.shift(states, torch.cat(logits)), strict=True):
            token = state.choice.pick(state.ids, scores)
            state.accept(token)
            emitted.append([token])
        return emitted

    def custom_generate(self, tokenizer: Any = None, reports: list[dict[str, Any]] | None = None) -> Callable[..., Any]:
        def run(model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **kwargs: Any) -> Any:
            method = GENERATION_MODES_MAPPING[generation_config.get_generation_mode()]
            if method not in ("_sample", "_beam_search"):
                raise InputError(self.name, must="sample, search greedily or with beams", got=method)
            beams = generation_config.num_beams
            mask = kwargs.get("attention_mask")
            mask = torch.ones_like(input_ids) if mask is None else mask
            group = max(beams, generation_config.num_return_sequences)
            own = RowStates(
                lambda prompt: self.open(model, prompt, tokenizer),
                self.shift,
                attention_mask=mask,
                group=group,
                log_probs=beams > 1,
            )
            out = getattr(type(model), method)(
                model,
                input_ids,
                logits_processor=LogitsProcessorList([own, *logits_processor]),
                generation_config=generation_config,
                **kwargs,
            )
            if reports is not None and beams == 1:
                sequences = out if isinstance(out, Tensor) else out.sequences
                reports.extend(self.summary(state) for state in own.follow(sequences))
            own.close()
            return out

        run.plain_prefill = True  # type: ignore[attr-defined]  # transformers runs the prompt: a guard may watch it
        return run


class _OwnSteps(Decoding):
    """A form whose ``step`` emits the tokens: runs it for a batch until the stopping criteria say so."""

    def custom_generate(self, tokenizer: Any = None, reports: list[dict[str, Any]] | None = None) -> Callable[..., Any]:
        def run(
            model: Any,
            input_ids: Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            streamer: Any = None,
            **kwargs: Any,
        ) -> Tensor:
            if generation_config.num_beams > 1:
                raise InputError(self.name, must="decode without beams", got=f"num_beams={generation_config.num_beams}")
            mask, sample = kwargs.get("attention_mask"), generation_config.do_sample
            ends = generation_config.eos_token_id
            ends = [ends] if isinstance(ends, int) else ends or ()
            states = []
            for number, row in enumerate(input_ids.tolist()):
                pad = 0 if mask is None else int((mask[number] == 0).sum())
                state = self.open(model, row[pad:], tokenizer)
                # draws of its own, so that a row does not depend on how many tokens the others emit a step
                draws = torch.Generator().manual_seed(int(torch.randint(2**62, ()))) if sample else None
                state.choice = Choice(logits_processor, sample, draws, tuple(row[:pad]))
                state.room = generation_config.max_length - len(row)
                state.ends = frozenset(ends)
                states.append(state)
            out = self._columns(
                model, states, input_ids, stopping_criteria, generation_config.pad_token_id or 0, streamer
            )
            if reports is not None:
                reports.extend(self.summary(state) for state in states)
            for state in states:
                state.close()
            return out

        return run

    def _columns(
        self, model: Any, states: list[Any], input_ids: Tensor, stopping_criteria: Any, pad: int, streamer: Any
    ) -> Tensor:
        """Rows emit different numbers of tokens a step; they are handed out a column at a time, so that stopping
        criteria and streamers see a whole batch. A row steps again when its tokens are used up."""
        ready = [collections.deque[int]() for _ in states]
        live = torch.ones(len(states), dtype=torch.bool, device=input_ids.device)
        while bool(live.any()):
            hungry = [n for n, tokens in enumerate(ready) if live[n] and not tokens]
            for n, tokens in zip(hungry, self.step(model, [states[n] for n in hungry]) if hungry else [], strict=True):
                ready[n].extend(tokens)
            column = [ready[n].popleft() if live[n] else pad for n in range(len(states))]
            input_ids = torch.cat([input_ids, torch.tensor(column, device=input_ids.device)[:, None]], dim=1)
            if streamer is not None:
                streamer.put(input_ids[:, -1].cpu())
            live = live & ~torch.as_tensor(stopping_criteria(input_ids, None), device=live.device)
        if streamer is not None:
            streamer.end()
        return input_ids


@dataclasses.dataclass(frozen=True)
class Drafter:
    """A drafter bound to the model that verifies, as a server or a benchmark steps it."""

    system: DrafterDecoding
    model: Any
    tokenizer: Any = None

    def open(self, prompt: Sequence[int]) -> Any:
        return self.system.open(self.model, prompt, self.tokenizer)

    def step(self, states: Sequence[Any]) -> list[list[int]]:
        return self.system.step(self.model, states)


class DrafterDecoding(_OwnSteps):
    """Guesses what comes next; the text is the model's own (greedy: the same tokens; sampled: the same law).

    The model is bound to a decoding runner when it is first used; change its weights and call :meth:`drafter` again.
    """

    verb = "drafter"
    _bound: tuple[Any, Speculator] | None = None

    @property
    @abc.abstractmethod
    def draft_tokens(self) -> int:
        """How many tokens to guess a step."""

    @abc.abstractmethod
    def draft(self, states: Sequence[Any], k: int) -> list[Draft]:
        """At most ``k`` guessed tokens for each state; none where there is nothing to guess from."""

    def hidden(self, model: Any) -> tuple[int, ...]:
        """Which hidden states ``observe`` is given, numbered as by :meth:`gossamer.parts.decode_runner.Runner.run`."""
        return ()

    @property
    def switch_off(self) -> bool:
        """Whether a request stops guessing while that is slower than plain steps."""
        return bool(getattr(self.config, "switch_off", True))

    def observe(self, states: Sequence[Any], emitted: Sequence[Sequence[int]], hidden: Sequence[Tensor] | None) -> None:
        """After tokens came into the past of requests: what each emitted (nothing while the prompt is read), and
        hidden states [layers, m, d] of the tokens that came in."""

    def drafter(self, model: Any, *, tokenizer: Any = None, **runner: Any) -> Drafter:
        """Bind the model, with the options of :class:`~gossamer.parts.decode_runner.Runner`, for single requests."""
        self.bind(model, **runner)
        return Drafter(self, model, tokenizer)

    def bind(self, model: Any, *, look_up: int = 0, **runner: Any) -> Speculator:
        """Step the requests of ``model`` on a new runner with these options; before ``fit`` it learns from that one.
        ``look_up`` as :class:`~gossamer.parts.speculation.Speculator` has it."""
        hidden = self.hidden(model)
        bound = Speculator(Runner(model, **runner), hidden=hidden, switch_off=self.switch_off, look_up=look_up)
        self._bound = (model, bound)
        return bound

    def speculator(self, model: Any) -> Speculator:
        """What steps the requests of ``model``."""
        return self._bound[1] if self._bound is not None and self._bound[0] is model else self.bind(model)

    def open(self, model: Any, prompt: Sequence[int], tokenizer: Any = None) -> Any:
        state = super().open(model, prompt, tokenizer)
        return self.speculator(model).open(state)

    def step(self, model: Any, states: Sequence[Any]) -> list[list[int]]:
        """Verify one draft of each state in one step and accept what the model itself would have chosen."""
        return self.speculator(model).step(
            states, lambda asked: self.draft(asked, self.draft_tokens), self.observe, self._settle
        )

    def summary(self, state: Any) -> dict[str, Any]:
        """As :meth:`gossamer.parts.speculation.Record.summary`."""
        found: dict[str, Any] = state.record.summary()
        return found

    def _settle(self, state: Any, draft: Draft, logits: Tensor) -> tuple[list[int], list[int]]:
        return settle(state, draft, logits)


class LoopDecoding(_OwnSteps):
    """Emits tokens in a way of its own: subclasses implement ``begin`` and ``step``."""

    verb = "loop"

    def loop(self, model: Any, inputs: Mapping[str, Tensor], tokenizer: Any = None, **options: Any) -> Decoded:
        """Decode ``inputs`` (input_ids, attention_mask) to the end."""
        return self.generate(model, tokenizer, inputs, **options)


def _settings(model: Any, tokenizer: Any, options: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
    """Generation config and the other arguments of ``generate``."""
    given = dict(options)
    ends = given.pop("eos_token_id", None)
    if ends is None:
        named_ends = tokenizer is not None or model.generation_config.eos_token_id is not None
        ends = end_ids(model, tokenizer) if named_ends else []
    ends = [ends] if isinstance(ends, int) else list(ends)
    pad = getattr(tokenizer, "pad_token_id", None)
    known = set(GenerationConfig().to_dict())
    named = {**GREEDY, "pad_token_id": pad if pad is not None else (ends[0] if ends else 0)}
    if given.get("do_sample"):
        named["top_k"] = 0  # transformers would cut to 50 tokens
    named |= {key: given.pop(key) for key in list(given) if key in known}
    return GenerationConfig(**named, eos_token_id=ends or None), given


def _batches(tokenizer: Any, prompts: Any, batch_size: int, pad: int, device: Any) -> Iterator[dict[str, Tensor]]:
    if isinstance(prompts, Mapping):
        mask = prompts.get("attention_mask")
        mask = torch.ones_like(prompts["input_ids"]) if mask is None else mask
        if bool((mask[:, -1] == 0).any()):
            raise InputError("generate", must="get prompts padded on the left", got="padding at the end of a row")
        yield {"input_ids": prompts["input_ids"].to(device), "attention_mask": mask.to(device)}
        return
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    for number, row in enumerate(rows):
        if not row:
            raise InputError(f"prompt {number}", must="give at least one token", got=repr(texts[number]))
    for start in range(0, len(rows), batch_size):
        yield left_pad(rows[start : start + batch_size], pad, device)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
