"""Drafters that are trained for their base: fit, the state of a request, and the way from a module to a tree.

A subclass says what its module is (:meth:`FittedDrafter.build`), how it learns (:meth:`FittedDrafter.loss`) and what it
guesses from (:meth:`FittedDrafter.source`); trees, training, verification, saving and the refusal of another base are
here. Beside a model on the compiled kernels, its linear layers and the output matrix are of 8 bits while it drafts. Its
config has ``steps``, ``batch_size``, ``rate``, ``length``, ``draft_vocab`` and ``labels``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.kinds.base import FittedSystem, State
from gossamer.kinds.decoding import DrafterDecoding
from gossamer.parts.decode_native import use_native_linears
from gossamer.parts.draft_layer import Memory
from gossamer.parts.draft_trees import Source
from gossamer.parts.drafter_training import Batch, Reading, Targets, capture, frequent, train
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.requests import Draft, RequestState
from gossamer.parts.speculation import Speculator

VOCABULARY = "vocabulary"


class DraftState(RequestState):
    """A request of a fitted drafter: the ``memories`` of its layers, and hidden states that are not processed yet."""

    def __init__(self, prompt: Sequence[int], layers: int) -> None:
        super().__init__(prompt)
        self.memories = [Memory() for _ in range(layers)]
        self.done = 0  # places whose states were taken
        self.last: dict[str, Tensor] = {}  # what a drafter keeps of the last place
        self._news: list[Tensor] = []

    def observe(self, hidden: Tensor) -> None:
        """Hidden states [layers, m, d] of the tokens that came into the past."""
        self._news.append(hidden.float())

    def take(self) -> Tensor:
        """The states [layers, m, d] of all places since the last call; there may be none."""
        news = torch.cat(self._news, 1) if self._news else torch.empty(0, 0, 0)
        self.done += news.shape[1]
        self._news = []
        return news

    def rewind(self, count: int) -> None:
        super().rewind(count)
        if count:
            # the last place is run again, as a drafter needs its states
            self.past.crop(max(0, min(self.past.length, len(self.ids) - 2)))
            held = torch.cat(self._news, 1)[:, : max(0, self.past.length - self.done)] if self._news else None
            self.done = min(self.done, self.past.length)
            for memory in self.memories:
                memory.crop(self.past.length)
            self._news = [] if held is None or not held.shape[1] else [held]

    def fork(self) -> Self:
        twin = super().fork()
        twin.memories = [memory.fork() for memory in self.memories]
        twin.last, twin._news = dict(self.last), list(self._news)
        return twin


class FittedDrafter(FittedSystem, DrafterDecoding):
    """A drafter with ``fit(bundle, rows)``."""

    module: Any = None
    reading: Reading

    @abc.abstractmethod
    def build(self, model: Any) -> nn.Module:
        """The module as it is before training; random numbers are seeded around it."""

    @abc.abstractmethod
    def loss(self, module: Any, batch: Batch, targets: Targets) -> Tensor:
        """The training loss; ``batch.states[0]`` are those of :meth:`hidden`'s first number."""

    @abc.abstractmethod
    def source(self, state: DraftState) -> Source:
        """The distributions at the end of a request's text; takes in what :meth:`DraftState.take` gives."""

    @abc.abstractmethod
    def tree(self, source: Source, floor: float) -> Draft:
        """The tokens to guess; ``floor`` as :mod:`gossamer.parts.draft_trees` takes it."""

    def hidden(self, model: Any) -> tuple[int, ...]:
        return (-1,)

    @property
    def layer_count(self) -> int:
        """Layers of the module that keep a memory of the text."""
        return 1

    def training(self) -> Mapping[str, Any]:
        """What :func:`gossamer.parts.drafter_training.train` takes beside the system's options."""
        return {}

    def check(self, model: Any, inputs: Any = None, *, tokenizer: Any = None, **kwargs: Any) -> None:
        super().check(model)
        if self.state is None:
            raise InputError(self.name, must="be fitted first", do="call fit(bundle, rows), or load a saved state")
        found = fingerprint(model)
        if found != self.fingerprint:
            raise InputError(
                self.name,
                must=f"draft for the model that it was fitted on (fingerprint {self.fingerprint})",
                got=f"another ({found})",
                do="fit it on this model",
            )

    def learn(self, bundle: Any, data: Any) -> State:
        model, config = bundle.model, self.config
        super().check(model)
        runner = self.speculator(model).runner
        windows = capture(
            runner, data, bundle.processor, length=config.length, hidden=self.hidden(model), where=self.name
        )
        vocabulary = frequent(windows, config.draft_vocab, model.get_output_embeddings().out_features)
        self.reading = Reading(model, vocabulary)
        module = self._seeded(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            losses = train(
                module,
                lambda batch: self.loss(module, batch, Targets(batch, batch.states[0], config.labels, self.reading)),
                windows,
                steps=config.steps,
                batch_size=config.batch_size,
                rate=config.rate,
                seed=self.seed,
                **self.training(),
            )
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        tokens = sum(len(window.ids) for window in windows)
        values = {"first_loss": losses[0], "last_loss": losses[-1], "windows": len(windows), "tokens": tokens}
        return State(tensors | ({} if vocabulary is None else {VOCABULARY: vocabulary}), values)

    def ready(self, bundle: Any) -> None:
        assert self.state is not None
        tensors = dict(self.state.tensors)
        vocabulary = tensors.pop(VOCABULARY, None)
        self.reading = Reading(bundle.model, None if vocabulary is None else vocabulary.to(bundle.model.device))
        self.module = self._seeded(bundle.model)
        self.module.load_state_dict(tensors)
        self.module.eval()
        self._quicken()

    def bind(self, model: Any, *, look_up: int = 0, **runner: Any) -> Speculator:
        bound = super().bind(model, look_up=look_up, **runner)
        self._quicken()
        return bound

    def begin(self, model: Any, prompt: Sequence[int], tokenizer: Any) -> DraftState:
        return DraftState(prompt, self.layer_count)

    @torch.no_grad()
    def draft(self, states: Sequence[Any], k: int) -> list[Draft]:
        floor = -math.inf if self._bound is None else self._bound[1].floor
        # of a prompt of one token no state is known yet
        return [self.tree(self.source(state), floor).cut(k, k) if state.past.length else Draft(()) for state in states]

    def observe(self, states: Sequence[Any], emitted: Any, hidden: Sequence[Tensor] | None) -> None:
        for state, news in zip(states, hidden or (), strict=True):
            state.observe(news)

    def logits(self, x: Tensor) -> Tensor:
        """Of normed states [n, d], over the drafter's vocabulary, by the very matrix that verifies where that is all.

        Models that run their own forward have none bound: their own head is read."""
        runner = self._bound[1].runner if self._bound is not None else None
        if self.reading.vocabulary is None and runner is not None and runner.plan is not None:
            return runner.logits(x.to(runner.dtype))
        return self.reading(x)

    def _quicken(self) -> None:
        """Beside a model on the kernels, draft on them too."""
        library = None if self._bound is None else self._bound[1].runner.library
        if self.module is not None and library is not None:
            use_native_linears(self.module, library)
            self.reading.quicken(library)

    def _seeded(self, model: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.build(model).to(model.device)
