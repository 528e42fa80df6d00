"""LLM-KICK: a battery that shows what perplexity hides of a compressed model.

Knowledge (facts, choice, letter, closed_book), use of a given text (open_book, retrieval, summary), instructions, and
perplexity as the foil; always the dense model against its compressed versions. ``tasks`` beside this file has the
prompts and marks, ``grid`` runs compressors over ratios and finds

    drop(r) = (score_dense - score_r) / score_dense         relative, per task; for perplexity the relative rise
    matching limit = the largest r such that drop <= tolerance at r and at every smaller ratio

A task at which the dense model does no better than its own outputs against shuffled answers is marked uninformative.

Where this differs from the paper: no GPT-4, so a summary is marked by ROUGE-L against a reference, by the share of the
facts it holds, and by any judge given, in both orders; an instruction has one right reply. "Either contains the other"
goes by whole words, or the one-letter output "a" would be right nearly everywhere, and an empty output is wrong. The
facts prompt ends without a space, which many tokenizers make part of the answer. The built-in facts are easier than
FreebaseQA, MMLU and TriviaQA, to suit small models; rows of your own, theirs among them, are read from a file.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config, option
from gossamer.evaluation.llm_kick.items import Item, built_in, ordered, read_items
from gossamer.evaluation.llm_kick.judge import as_judge, compare
from gossamer.evaluation.llm_kick.tasks import TASKS, WORKED, mark, request, token_f1
from gossamer.kinds.evaluation import Asked, Evaluation, Request, Score, Scores, Subject, scored
from gossamer.parts.metrics import cut_first_line

CARD = Card(
    title="LLM-KICK",
    paper="2310.01382",
    year=2024,
    claim="pruned, a model loses closed-book knowledge at ratios where its perplexity has hardly moved; it goes on "
    "answering from a given text to clearly higher ratios",
    families=("llama", "gemma3"),
    limits="judging by GPT-4, the original question sets and models of 7B to 33B are not shown",
)
_BOOK = ("closed_book", "open_book", "retrieval")


class LLMKickConfig(Config):
    tasks: tuple[str, ...] = option(
        ("facts", "choice", "letter", "closed_book", "open_book", "retrieval", "summary", "instructions", "perplexity"),
        "which tasks to run",
        choices=(
            "facts", "choice", "letter", "closed_book", "open_book", "retrieval", "summary", "instructions",
            "perplexity",
        ),
    )  # fmt: skip
    num_examples: int = option(48, "items of a task", ge=2)
    shots: int = option(5, "worked examples before a choice, a letter or an instruction", ge=0)
    new_tokens: int = option(16, "longest answer, in tokens", ge=1)
    summary_tokens: int = option(48, "longest summary, in tokens", ge=1)
    evidence: int = option(3072, "characters of a context that are shown", ge=1)
    texts: int = option(8, "texts of English prose that perplexity is taken on", ge=2)
    judge: str | None = option(None, "a model that compares summaries with their references", companion=True)
    tolerance: float = option(0.05, "relative drop that still counts as matching", gt=0, lt=1, effect="report")


class LLMKick(Evaluation):
    """``evaluate(bundle, rows_or_path)``; without rows the built-in tasks."""

    config_class = LLMKickConfig

    def requests(self, subject: Subject, data: Any = None) -> list[Request]:
        items = built_in(self.seed) if data is None else tuple(read_items(data))
        chosen = [task for task in self.config.tasks if task in TASKS]
        found = []
        for task in chosen:
            found += self._of_task(task, [item for item in items if task in item.tasks], subject)
        if chosen and not found:
            raise InputError(
                f"{self.name}: data", must=f"have rows for {', '.join(chosen)}", got="none that carries them"
            )
        return found

    def mark(self, output: str, request: Request) -> float:
        return mark(output, request)

    def further(self, scores: Scores, subject: Subject) -> None:
        by_task: dict[str, list[Asked]] = {}
        for asked in scores.asked:
            by_task.setdefault(asked.request.task, []).append(asked)
        for task in _BOOK:
            if found := by_task.get(task):
                scores.values[f"{task}_f1"] = float(np.mean([token_f1(one.output, one.request.truth) for one in found]))
        if summaries := by_task.get("summary"):
            self._summaries(summaries, scores)
        written = [one for task in ("summary", "instructions") for one in by_task.get(task, [])]
        if words := [word for one in written for word in one.output.split()]:
            scores.values["distinct_words"] = len(set(words)) / len(words)
        if "perplexity" in self.config.tasks:
            self._perplexity(subject, scores)

    def _of_task(self, task: str, items: list[Item], subject: Subject) -> list[Request]:
        config, queue = self.config, ordered(items, self.seed, task)
        if len(queue) == 1:
            raise InputError(f"{self.name}: {task}", must="have at least two rows", got=1, do="give it more rows")
        new = config.summary_tokens if task == "summary" else config.new_tokens
        found = []
        for item in queue[: config.num_examples]:
            # from the end of the queue, so that few worked examples are asked themselves
            others = (other for other in reversed(queue) if other is not item)
            worked = list(itertools.islice(others, config.shots)) if task in WORKED else []
            found.append(request(task, item, worked, subject, new_tokens=new, evidence=config.evidence))
        return found

    def _summaries(self, asked: list[Asked], scores: Scores) -> None:
        pairs: list[tuple[Item, str]] = [(one.request.about, cut_first_line(one.output)) for one in asked]
        held = [[fact.lower() in text.lower() for fact in item.facts] for item, text in pairs if item.facts]
        if held:
            scores.values["summary_facts"] = float(np.mean([np.mean(row) for row in held]))
        if self.config.judge is None:
            return
        judge = as_judge(self.companion(self.config.judge))
        verdicts = [compare(judge, item.context, text, item.answers[0]) for item, text in pairs]
        read = [verdict for verdict in verdicts if verdict is not None]
        scores.values["judge_unreadable"] = 1 - len(read) / len(verdicts)
        if len(read) > 1:
            scores.tasks["summary_judged"] = scored([verdict.score for verdict in read], seed=self.seed)
            scores.values["judge_swapped"] = float(np.mean([verdict.swapped for verdict in read]))

    def _perplexity(self, subject: Subject, scores: Scores) -> None:
        """exp(nats / tokens) over all texts, its interval by resampling texts; bits per byte compare vocabularies."""
        texts = prose(self.seed, self.config.texts)
        nats, tokens = np.array(subject.nats(texts), dtype=float).T
        draws = np.random.default_rng(self.seed).integers(0, len(nats), size=(2000, len(nats)))
        spread = np.exp(nats[draws].sum(1) / tokens[draws].sum(1))
        low, high = np.quantile(spread, [0.025, 0.975])
        each = tuple(float(value) for value in np.exp(nats / tokens))
        value = float(np.exp(nats.sum() / tokens.sum()))
        scores.tasks["perplexity"] = Score(value, float(low), float(high), len(nats), better="lower", items=each)
        scores.values["bits_per_byte"] = float(nats.sum() / np.log(2) / sum(len(text.encode()) for text in texts))


@functools.cache
def prose(seed: int, count: int) -> tuple[str, ...]:
    """Held-out English prose of installed packages, 400 to 1200 characters a text."""
    from gossamer.hub.corpora import load_corpus

    joined: dict[str, list[str]] = {}
    for row in load_corpus("english_prose", split="test").rows:
        joined.setdefault(row["source"], []).append(row["text"])
    texts = [Item(text[:1200]) for text in map("\n".join, joined.values()) if len(text) >= 400]
    return tuple(item.question for item in ordered(texts, seed, "prose")[:count])
