"""Text scores per item, and the statistics on them: bootstrap intervals and the paired bootstrap test.

All scores are on 0..100. chrF is sacrebleu's sentence chrF (character 6-grams, beta = 2: Popović 2015), and a system's
chrF is the *mean of the sentence scores*, so that one resampling of items serves point estimate, interval and paired
test alike; it differs a little from corpus chrF, which sums n-gram counts first. ROUGE-L is the F-measure of
rouge_score (Lin 2004), lower-cased, ASCII letters and digits only, without stemming.

Bootstrap (Efron 1979; paired for systems: Koehn 2004): with items i_1..i_N drawn with replacement, B times,

    interval = the alpha/2 and 1 - alpha/2 quantiles of  s(x[i_1], ..., x[i_N])
    p        = min(1, 2 min(1 + #{d_b <= 0}, 1 + #{d_b >= 0}) / (B + 1)),   d_b = s(a[i]) - s(b[i])

Swapping a and b negates the interval and keeps p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gossamer.core.errors import InputError
from gossamer.core.report import Comparison, Value, measured, metric_of

Floats = NDArray[np.float64]
Statistic = Callable[..., Any]


def cut_first_line(text: str) -> str:
    """The first line with something on it, without spaces at its ends; "" where there is none.

    Every arm is cut by this rule, so that nothing is won or lost by when a model stops. Blank lines before the answer
    are skipped for all arms alike: a model that was not trained on the format often starts with a line break.
    """
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


def chrf(outputs: Sequence[str], references: Sequence[str]) -> Floats:
    """Sentence chrF of each item, float64 [N] on 0..100."""
    from sacrebleu.metrics.chrf import CHRF

    scorer = CHRF()
    return np.array([scorer.sentence_score(out, [ref]).score for out, ref in _pairs(outputs, references)])


def rouge_l(outputs: Sequence[str], references: Sequence[str]) -> Floats:
    """ROUGE-L F-measure of each item, float64 [N] on 0..100."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array([100 * scorer.score(ref, out)["rougeL"].fmeasure for out, ref in _pairs(outputs, references)])


def exact_match(outputs: Sequence[str], references: Sequence[str]) -> Floats:
    """100 where output and reference are the same but for spaces at the ends, else 0; float64 [N]."""
    return np.array([100.0 * (out.strip() == ref.strip()) for out, ref in _pairs(outputs, references)])


TEXT_METRICS: dict[str, Callable[[Sequence[str], Sequence[str]], Floats]] = {
    "chrf": chrf,
    "rouge_l": rouge_l,
    "exact_match": exact_match,
}


def score_texts(outputs: Sequence[str], references: Sequence[str]) -> dict[str, Floats]:
    """Every text metric of each item, after :func:`cut_first_line` on outputs and references: name -> [N]."""
    lines, truth = [cut_first_line(text) for text in outputs], [cut_first_line(text) for text in references]
    return {name: metric(lines, truth) for name, metric in TEXT_METRICS.items()}


def bootstrap(
    values: Sequence[float] | Floats,
    statistic: Statistic = np.mean,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(values)``; ``statistic`` takes ``axis``, as numpy's do."""
    items = _items(values, "bootstrap")
    draws = statistic(items[_resamples(len(items), n, seed)], axis=1)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """Result of a paired test on ``n`` items: ``difference`` = s(a) - s(b), its interval, two-sided p value."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int


def paired_bootstrap(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    statistic: Statistic = np.mean,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Test ``statistic(a) - statistic(b)`` where item i of both is the same test item. Smallest p: 2 / (n + 1)."""
    first, second = _items(a, "paired_bootstrap"), _items(b, "paired_bootstrap")
    if len(first) != len(second):
        raise InputError(
            "paired_bootstrap",
            must="get the same items twice",
            got=f"{len(first)} and {len(second)} values",
            do="score both arms on the same test items",
        )
    draws = _resamples(len(first), n, seed)
    differences = statistic(first[draws], axis=1) - statistic(second[draws], axis=1)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    tail = min(1 + int((differences <= 0).sum()), 1 + int((differences >= 0).sum()))
    difference = float(statistic(first, axis=0) - statistic(second, axis=0))
    return Paired(difference, float(low), float(high), min(1.0, 2 * tail / (n + 1)), len(first))


def summarise(metric: str, values: Sequence[float] | Floats, *, seed: int = 0) -> Value:
    """Mean of per-item values with its bootstrap interval, as a report's value of ``metric``."""
    low, high = bootstrap(values, seed=seed)
    return measured(metric, float(np.mean(values)), low, high, len(values))


def compare(
    metric: str,
    arm: str,
    baseline: str,
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of two arms' per-item values of ``metric`` (``arm`` minus ``baseline``), for a report."""
    test = paired_bootstrap(a, b, seed=seed)
    known = metric_of(metric)
    difference = Value(test.difference, test.low, test.high, known.unit, test.n, known.better)
    return Comparison(metric, arm, baseline, difference, test.p_value)


def _resamples(items: int, n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, items, size=(n, items))


def _items(values: Sequence[float] | Floats, where: str) -> Floats:
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or len(items) < 2 or not np.isfinite(items).all():
        got = f"shape {list(items.shape)}" if items.ndim != 1 or len(items) < 2 else "nan or infinity"
        raise InputError(where, must="get at least two finite values, one per item", got=got, do="score more items")
    return items


def _pairs(outputs: Sequence[str], references: Sequence[str]) -> list[tuple[str, str]]:
    if len(outputs) != len(references):
        got = f"{len(outputs)} outputs and {len(references)} references"
        raise InputError("text metric", must="get one output per reference", got=got, do="keep both in the same order")
    return list(zip(outputs, references, strict=True))
