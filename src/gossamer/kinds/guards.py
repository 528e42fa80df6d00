"""Guards: ``judge(item) -> Verdict(label, score, reason)`` and ``protect(model)``."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from gossamer.core.errors import InputError
from gossamer.kinds.base import FittedSystem
from gossamer.parts.fingerprint import fingerprint

TOXIC, BENIGN, CONCEPT = "toxic", "benign", "concept"
REFUSAL = "I cannot help with that."


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``label`` is "flagged" or "clear"; ``score`` in [0, 1], flagged when it reaches the guard's threshold.

    ``scores`` are those by scenario where the guard tells scenarios apart.
    """

    label: str
    score: float
    reason: str
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def flagged(self) -> bool:
        return self.label == "flagged"


class Guard(FittedSystem):
    """A gate over prompts, fitted on rows ``{"text": str, "label": "toxic" | "benign", "scenario": str}``.

    ``scenario`` may be left out. A subclass judges; ``threshold`` decides. To protect a model it also scores the rows
    of a ``generate`` from what the prefill shows, by :meth:`watching`.
    """

    verb = "judge"

    def check(self, item: str) -> None:
        if not isinstance(item, str) or not item.strip():
            raise InputError(f"{self.name}.judge", must="get a prompt with text in it", got=repr(item))
        if self.state is None:
            raise InputError(
                f"{self.name}.judge", must="be fitted first", do="call fit(bundle, data), or load a saved state"
            )

    @property
    @abc.abstractmethod
    def threshold(self) -> float:
        """Scores from here on are flagged."""

    @abc.abstractmethod
    def judge(self, item: str) -> Verdict:
        """The verdict on one prompt."""

    @abc.abstractmethod
    def watching(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Opened around a ``generate``; gives a callable that scores its rows, float [rows], after the prefill."""

    def verdict(self, score: float, scores: Mapping[str, float] | None = None) -> Verdict:
        """The verdict that a score stands for."""
        scores = dict(scores or {})
        flagged = score >= self.threshold
        reason = f"score {score:.3f} {'reaches' if flagged else 'is below'} the threshold {self.threshold:.3f}"
        if flagged and scores:
            reason += f", highest for {max(scores, key=lambda name: scores[name])}"
        return Verdict("flagged" if flagged else "clear", score, reason, scores)

    def protect(self, model: Any, refusal: Sequence[int] | None = None) -> Any:
        """Return ``model`` (the same object) with a ``generate`` that answers flagged prompts with ``refusal``.

        ``refusal`` are token ids, by default those of :data:`REFUSAL`. The states that the guard reads are taken in the
        prefill of that very ``generate``, so nothing runs twice; unflagged rows of a batch keep their tokens. The last
        verdicts stand in ``model.gossamer_verdicts``. :meth:`release` undoes it.
        """
        self.check("a fitted guard")
        if "generate" in vars(model):
            raise InputError(f"{self.name}.protect", must="get a model without a guard", do="release it first")
        if fingerprint(model) != self.fingerprint:
            raise InputError(
                f"{self.name}.protect", must="get the model that it was fitted on", do="fit it on this model"
            )
        plain = model.generate
        tokens = list(refusal) if refusal is not None else self.refusal_tokens()

        def generate(*args: Any, **kwargs: Any) -> Any:
            self._check_call(kwargs)
            with self.watching(model) as score:
                gate = _Gate(self, model, tokens, score)
                kwargs["logits_processor"] = [*(kwargs.get("logits_processor") or []), gate]
                out = plain(*args, **kwargs)
            model.gossamer_verdicts = gate.verdicts
            return out

        model.generate = generate
        return model

    def release(self, model: Any) -> Any:
        """Take the guard off the model."""
        for name in ("generate", "gossamer_verdicts"):
            vars(model).pop(name, None)
        return model

    def _check_call(self, options: Mapping[str, Any]) -> None:
        mask, own = options.get("attention_mask"), options.get("custom_generate")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InputError("generate under a guard", must="get prompts padded on the left", got="padding at an end")
        if own is not None and not getattr(own, "plain_prefill", False):
            raise InputError(
                f"{self.name}.protect",
                must="see the whole prompt in one plain prefill",
                got="a decoding system with a loop of its own",
                do="judge(prompt) first",
            )

    @abc.abstractmethod
    def refusal_tokens(self) -> list[int]:
        """Token ids of the default refusal."""


class _Gate(LogitsProcessor):
    """At its first call asks for the scores of the rows, then lets flagged rows only say the refusal."""

    def __init__(self, guard: Guard, model: Any, refusal: list[int], score: Any) -> None:
        ends = model.generation_config.eos_token_id
        self.guard, self.refusal, self.score = guard, refusal, score
        self.end = ends[0] if isinstance(ends, list) else ends
        self.verdicts: list[Verdict] = []
        self.width = 0

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        """input_ids [rows, t], scores [rows, V]; beams of a prompt share its verdict and stay in its rows."""
        if not self.verdicts:
            self.width = input_ids.shape[1]
            self.verdicts = [self.guard.verdict(float(value)) for value in self.score()]
        flagged = [row for row, verdict in enumerate(self.verdicts) if verdict.flagged]
        if not flagged:
            return scores
        said = input_ids.shape[1] - self.width
        # a model without an end token repeats the last word of the refusal
        closing = self.end if self.end is not None else self.refusal[-1]
        token = self.refusal[said] if said < len(self.refusal) else closing
        forced = torch.full_like(scores[0], -torch.inf)
        forced[token] = 0.0
        out = scores.clone()
        out[flagged] = forced
        return out


def labelled(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[list[Mapping[str, Any]], list[int]]:
    """Rows that are toxic or benign, and their classes 1 or 0. Refuses empty texts, other labels and a single class."""
    chosen, classes = [], []
    for number, row in enumerate(rows):
        label = row.get("label")
        if label not in (TOXIC, BENIGN, CONCEPT):
            raise InputError(f"{where}: row {number}, label", must=f"be {TOXIC!r} or {BENIGN!r}", got=repr(label))
        if not isinstance(row.get("text"), str) or not row["text"].strip():
            raise InputError(
                f"{where}: row {number}, text", must="be a prompt with text in it", got=repr(row.get("text"))
            )
        if label != CONCEPT:
            chosen.append(row)
            classes.append(int(label == TOXIC))
    if len(set(classes)) < 2:
        got = f"{sum(classes)} toxic and {len(classes) - sum(classes)} benign"
        raise InputError(where, must="get toxic and benign rows", got=got, do="add rows of the missing class")
    return chosen, classes


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers of torch follow ``seed`` inside and are as before outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
