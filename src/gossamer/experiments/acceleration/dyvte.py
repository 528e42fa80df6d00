"""DyVTE's gates against one exit layer for all prompts and against random exits, on questions of graded difficulty.

Plan. The nursery's model (DINOv2-S at 112 px, 64 image tokens, a Llama of 12 layers, trained on the still-image world).
Gates are trained on questions about training scenes, 4 layers drawn a batch; rate and threshold are chosen on
validation scenes: the rate by the gates' accuracy on their labels, the threshold as the lowest that keeps 98 % of the
answers the full model's. Then 300 questions on unseen scenes a seed; a seed is a set of scenes and of gates.

Every question is answered with the image leaving after 0, 1 ... 12 layers; these arms are ``text_only``, ``fixed_1``
to ``fixed_11`` and ``full``. ``dyvte`` is the fitted system on the model. ``random`` gives each question the exit of
another by DyVTE's own histogram; its figure is the expectation, without drawing. A fixed exit at DyVTE's mean cost lies
between two layers, and its figure is interpolated question by question. Intervals are paired bootstraps over all
questions. ``attention`` is the paper's empirical part; ``timing`` the prefill of single prompts, contenders in turns.

Must be seen: text only is bad; a steep loss and then a plateau (from two thirds of the layers on at most 1 point);
DyVTE above the fixed exit at equal mean cost and above random exits; harder questions exit later; over 97 % of answers
as the full model's; prefill time falls; the removed image is the masked image (the system's answers are those of the
exits that it chose).

Smaller than the paper: a model of 7M and one world; answers of a word or two.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
ARMS: dict[str, dict[str, Any]] = {
    "text_only": {"exit": 0},
    "fixed_1": {"exit": 1},
    "fixed_2": {"exit": 2},
    "fixed_3": {"exit": 3},
    "fixed_4": {"exit": 4},
    "fixed_5": {"exit": 5},
    "fixed_6": {"exit": 6},
    "fixed_7": {"exit": 7},
    "fixed_8": {"exit": 8},
    "fixed_9": {"exit": 9},
    "fixed_10": {"exit": 10},
    "fixed_11": {"exit": 11},
    "full": {"exit": 12},
    "dyvte": {"layers_per_batch": 4, "batch_size": 16},
    "random": {},
    "attention": {},
    "timing": {},
}
LAYERS = 12
RATES = (3e-4, 1e-3, 3e-3)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
KEEP = 0.98  # share of validation answers that must stay the full model's


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """Figures of one arm; ``right`` is a string with 1 for each question answered."""
    if "exit" in ARMS[arm]:
        table = _table("test", seed, lab)
        done = ARMS[arm]["exit"]
        return {"right": table["right"][done], "accuracy": _mean(table["right"][done]), "same": table["same"][done]}
    if arm == "attention":
        return _attention(seed, lab)
    if arm == "timing":
        return _timing(seed, lab)
    found = lab.once(f"dyvte-{seed}", lambda: _dyvte(seed, lab))
    if arm == "dyvte":
        return dict(found)
    columns = [_table("test", seed, lab)["right"][done] for done in found["exits"]]
    chances = [statistics.fmean(int(column[row]) for column in columns) for row in range(len(columns[0]))]
    return {"chances": chances, "accuracy": statistics.fmean(chances)}


def conclude(results: Results) -> Conclusion:
    """Shown: above the fixed exit at equal mean cost and above random exits beyond doubt."""
    curve = {arm: results.mean(arm, "accuracy") for arm in ARMS if "exit" in ARMS[arm]}
    ours, exits = _bits(results, "dyvte"), _each(results, "dyvte", "exits")
    mean_exit = statistics.fmean(exits)
    at_cost = _at(results, mean_exit)
    fixed, by_chance = _compare(ours, at_cost), _compare(ours, _each(results, "random", "chances"))
    by_text = _compare(_bits(results, "full"), _bits(results, "text_only"))
    effect, low, high = fixed
    plateau = max(curve["full"] - curve[f"fixed_{done}"] for done in range(8, LAYERS))
    agreement = results.mean("dyvte", "agreement")
    lines = (
        MustSee(
            "above the fixed exit at equal mean cost",
            f"{statistics.fmean(ours):.1%} at {mean_exit:.2f} layers, {_points(fixed)}",
            low > 0,
        ),
        MustSee("above random exits with its own histogram", _points(by_chance), by_chance[1] > 0),
        MustSee(
            "text only is bad", f"{curve['text_only']:.1%}, the image is worth {_points(by_text)}", by_text[1] > 0.2
        ),
        MustSee(
            "a plateau: the image can leave after 8 layers or more at a loss of at most 1 point",
            f"largest loss {100 * plateau:.1f} points; accuracy by layers: "
            + ", ".join(f"{ARMS[arm]['exit']} {value:.1%}" for arm, value in curve.items()),
            plateau <= 0.01,
        ),
        MustSee("over 97 % of the answers are the full model's", f"{agreement:.1%}", agreement > 0.97),
        _difficulty(results),
        _times(results),
        MustSee(
            "the system's answers are those of the exits it chose, computed from masked keys",
            f"{results.mean('dyvte', 'as_table'):.2%} of the questions",
            results.mean("dyvte", "as_table") >= 0.995,
        ),
    )
    return Conclusion(
        shown=lines[0].shown and lines[1].shown,
        baseline=f"fixed exit at the same mean of {mean_exit:.2f} layers: {statistics.fmean(at_cost):.1%}",
        result=f"DyVTE: {statistics.fmean(ours):.1%} (full model: {curve['full']:.1%})",
        effect=100 * effect,
        low=100 * low,
        high=100 * high,
        unit="points of accuracy",
        must_see=lines,
        notes=(
            "exits by layers done: " + ", ".join(f"{e} {exits.count(e)}" for e in sorted(set(exits))),
            *_confusion(results),
            f"threshold {', '.join(str(results['dyvte'][s]['threshold']) for s in _seeds(results))}, "
            f"rate {results['dyvte'][_seeds(results)[0]]['rate']}",
            *_masses(results),
        ),
    )


def _difficulty(results: Results) -> MustSee:
    exits, grades = _each(results, "dyvte", "exits"), _each(results, "dyvte", "difficulty")
    means = {
        grade: statistics.fmean(e for e, g in zip(exits, grades, strict=True) if g == grade)
        for grade in sorted(set(grades))
    }
    kinds = _each(results, "dyvte", "kinds")
    by_kind = {
        kind: statistics.fmean(e for e, k in zip(exits, kinds, strict=True) if k == kind) for kind in sorted(set(kinds))
    }
    text = ", ".join(f"{grade} {mean:.2f}" for grade, mean in means.items())
    text += "; by kind " + ", ".join(f"{kind} {mean:.2f}" for kind, mean in by_kind.items())
    ordered = list(means.values()) == sorted(means.values())
    return MustSee("harder questions exit later (mean layer by difficulty 1 to 4)", text, ordered)


def _times(results: Results) -> MustSee:
    found = {name: results.mean("timing", name) for name in ("full_ms", "dyvte_ms", "operations_ratio", "bytes_ratio")}
    figures = (
        f"{found['full_ms']:.1f} to {found['dyvte_ms']:.1f} ms a prompt, operations times "
        f"{found['operations_ratio']:.3f}, cache bytes times {found['bytes_ratio']:.3f}"
    )
    return MustSee("prefill time falls", figures, found["dyvte_ms"] < found["full_ms"])


def _confusion(results: Results) -> list[str]:
    """Per number of layers: how often a gate is right where the label is keep and where it is exit."""
    counts = [results["dyvte"][seed]["confusion"] for seed in _seeds(results)]
    lines = []
    for done in range(1, LAYERS):
        (kk, ke), (ek, ee) = ([sum(c[done - 1][a][b] for c in counts) for b in (0, 1)] for a in (0, 1))
        lines.append(f"{done}: keep {kk}/{kk + ke}, exit {ee}/{ek + ee}")
    return [
        "gates right on validation questions by layers done and label, at a probability of 0.5: " + "; ".join(lines)
    ]


def _masses(results: Results) -> list[str]:
    found = results["attention"][_seeds(results)[0]]
    return [f"attention {name.replace('_', ' ')} by layer: " + ", ".join(f"{v:.2f}" for v in found[name])
            for name in ("text_to_image", "text_to_text", "image_to_image", "last_to_image")]  # fmt: skip


def _table(split: str, seed: int, lab: Lab) -> dict[str, Any]:
    """By layers done, 0 to all: which questions are right, and which answers are the full model's, as strings."""
    return dict(lab.once(f"table-{split}-{seed}", lambda: _removed(split, seed, lab)))


def _removed(split: str, seed: int, lab: Lab) -> dict[str, list[str]]:
    from gossamer.acceleration.dyvte.removal import passes
    from gossamer.experiments.acceleration._scenes import marks
    from gossamer.parts.token_selection import Decoder

    rows, model, processor = _subject(split, seed, lab)
    right: list[list[int]] = [[] for _ in range(LAYERS + 1)]
    same: list[list[int]] = [[] for _ in range(LAYERS + 1)]
    for passed in passes(Decoder(model), rows, processor, 25):
        for done in range(LAYERS + 1):
            end = passed.without(done)
            right[done] += end.correct.long().tolist()
            same[done] += (end.agreement == 1).long().tolist()
    return {"right": [marks(one) for one in right], "same": [marks(one) for one in same]}


def _dyvte(seed: int, lab: Lab) -> dict[str, Any]:
    """Fit, calibrate the threshold, and answer the test questions under the gates' exits."""
    from gossamer.experiments.acceleration._scenes import marks, right, tower_states

    rate = lab.once("rate", lambda: _best_rate(lab))
    system, model, processor = _fitted(seed, rate, 4 if lab.quick else 200, lab)
    rows, scenes = _rows("validation", 0, lab), _sizes(lab)[0]
    model.model.vision_tower.states = tower_states("validation", scenes, 0)
    confusion = _confused(system, model, processor, rows)
    threshold = _threshold(_chances(system, model, processor, rows), _table("validation", 0, lab)["same"])
    rows = _rows("test", seed, lab)
    model.model.vision_tower.states = tower_states("test", scenes, seed)
    system = _with_threshold(system, model, threshold)
    system.save(lab.folder("gates") / str(seed))
    system.accelerate(model)
    found, exits = list[int](), list[int]()
    for start in range(0, len(rows), 25):
        found += right(model, processor, rows[start : start + 25])
        exits += system.report()["exits"]
    system.release(model)
    table = _table("test", seed, lab)
    chosen = [int(table["right"][done][row]) for row, done in enumerate(exits)]
    return {
        "right": marks(found),
        "accuracy": statistics.fmean(found),
        "exits": exits,
        "mean_exit": statistics.fmean(exits),
        "agreement": statistics.fmean(int(table["same"][done][row]) for row, done in enumerate(exits)),
        "as_table": statistics.fmean(a == b for a, b in zip(found, chosen, strict=True)),
        "difficulty": [row["difficulty"] for row in rows],
        "kinds": [row["kind"] for row in rows],
        "threshold": threshold,
        "rate": rate,
        "confusion": confusion,
    }


def _best_rate(lab: Lab) -> float:
    """The rate whose gates are right most often on validation questions, keep and exit weighing the same."""
    from gossamer.experiments.acceleration._scenes import tower_states

    rows = _rows("validation", 0, lab)[: 8 if lab.quick else 100]
    best = {}
    for rate in RATES:
        system, model, processor = _fitted(100, rate, 2 if lab.quick else 60, lab)
        model.model.vision_tower.states = tower_states("validation", _sizes(lab)[0], 0)
        counts = [list(map(sum, zip(*by_label, strict=True))) for by_label in
                  zip(*_confused(system, model, processor, rows), strict=True)]  # fmt: skip
        best[rate] = statistics.fmean(counts[label][label] / max(1, sum(counts[label])) for label in (0, 1))
    return max(best, key=lambda rate: best[rate])


def _fitted(seed: int, rate: float, steps: int, lab: Lab) -> tuple[Any, Any, Any]:
    """The system with gates trained on questions of training scenes; model and processor look these scenes up."""
    from gossamer.core.bundle import Bundle
    from gossamer.experiments.acceleration._scenes import asked, tabled, tower_states
    from gossamer.pipeline.single import system

    scenes = 20 if lab.quick else 800
    model, processor = tabled(tower_states("train", scenes, 60))
    gates = system("dyvte", seed=seed, steps=steps, rate=rate, **ARMS["dyvte"])
    gates.fit(Bundle(model, processor), asked("train", scenes, 60))
    return gates, model, processor


def _confused(system: Any, model: Any, processor: Any, rows: Sequence[Any]) -> list[list[list[int]]]:
    from gossamer.core.bundle import Bundle

    counts: list[list[list[int]]] = system.confusion(Bundle(model, processor), rows, batch_size=25).tolist()
    return counts


def _chances(system: Any, model: Any, processor: Any, rows: Sequence[Any]) -> list[list[float]]:
    """Probability of exit for each question after 1 ... 11 layers, in the full model."""
    from gossamer.acceleration.dyvte.removal import passes
    from gossamer.parts.token_selection import Decoder

    found: list[list[float]] = []
    for passed in passes(Decoder(model), rows, processor, 25):
        layers = [system.chances(done, passed.hidden[done], passed.layout, passed.run) for done in range(1, LAYERS)]
        found += [list(row) for row in zip(*(one.tolist() for one in layers), strict=True)]
    return found


def _threshold(chances: list[list[float]], same: list[str]) -> float:
    """The lowest threshold whose exits keep enough of the full model's answers; the highest where none does."""
    for threshold in THRESHOLDS:
        exits = [next((done for done, chance in enumerate(row, 1) if chance > threshold), LAYERS) for row in chances]
        if statistics.fmean(int(same[done][row]) for row, done in enumerate(exits)) >= KEEP:
            return threshold
    return THRESHOLDS[-1]


def _with_threshold(system: Any, model: Any, threshold: float) -> Any:
    """The same gates under another threshold."""
    from gossamer.core.bundle import Bundle

    other = type(system)(seed=system.seed, **{**system.config.as_dict(), "threshold": threshold})
    other.state, other.fingerprint = system.state, system.fingerprint
    other.ready(Bundle(model, None))
    return other


def _attention(seed: int, lab: Lab) -> dict[str, Any]:
    from gossamer.acceleration.dyvte import DyVTE
    from gossamer.core.bundle import Bundle

    rows, model, processor = _subject("test", seed, lab)
    return dict(DyVTE.analyse(Bundle(model, processor), rows[: 8 if lab.quick else 100], batch_size=25))


def _timing(seed: int, lab: Lab) -> dict[str, Any]:
    """Median prefill of single prompts, plain and with the gates of this seed, each prompt in turns."""
    import torch

    from gossamer.acceleration.dyvte import DyVTE
    from gossamer.core.bundle import Bundle
    from gossamer.parts.selection_costs import median_ms
    from gossamer.parts.visual_rows import visual_batch

    lab.once(f"dyvte-{seed}", lambda: _dyvte(seed, lab))
    (rows, model, processor), (_, light, _) = _subject("test", seed, lab), _subject("test", seed, lab)
    system = DyVTE.load(lab.folder("gates") / str(seed), Bundle(light, processor))
    system.accelerate(light)
    times: dict[str, list[float]] = {"full_ms": [], "dyvte_ms": []}
    ratios: dict[str, list[float]] = {"operations": [], "cache_bytes": []}
    for row in rows[: 4 if lab.quick else 40]:
        batch = visual_batch([row], processor)
        batch.pop("labels")

        both = {
            name: functools.partial(subject, **batch, use_cache=True, logits_to_keep=1)
            for name, subject in (("full_ms", model), ("dyvte_ms", light))
        }
        with torch.no_grad():
            for name, value in median_ms(both, 5).items():
                times[name].append(value)
        report = system.report()
        for name, values in ratios.items():
            values.append(report[name] / report[f"{name}_plain"])
    means = {name: statistics.fmean(values) for name, values in times.items()}
    return means | {
        "operations_ratio": statistics.fmean(ratios["operations"]),
        "bytes_ratio": statistics.fmean(ratios["cache_bytes"]),
    }


def _subject(split: str, seed: int, lab: Lab) -> tuple[list[Any], Any, Any]:
    from gossamer.experiments.acceleration._scenes import tabled, tower_states

    return _rows(split, seed, lab), *tabled(tower_states(split, _sizes(lab)[0], seed))


def _rows(split: str, seed: int, lab: Lab) -> list[dict[str, Any]]:
    from gossamer.experiments.acceleration._scenes import asked

    scenes, limit = _sizes(lab)
    return asked(split, scenes, seed, limit)


def _sizes(lab: Lab) -> tuple[int, int]:
    """Scenes and questions."""
    return (10, 24) if lab.quick else (80, 300)


def _seeds(results: Results) -> list[int]:
    return sorted(results["dyvte"])


def _bits(results: Results, arm: str) -> list[int]:
    return [int(bit) for seed in _seeds(results) for bit in results[arm][seed]["right"]]


def _each(results: Results, arm: str, name: str) -> list[Any]:
    """A list in the figures, one seed after another."""
    return [value for seed in _seeds(results) for value in results[arm][seed][name]]


def _at(results: Results, exits: float) -> list[float]:
    """Chance of each question to be right under one exit for all, between the two layers around ``exits``."""
    low = min(int(exits), LAYERS - 1)
    arms = {ARMS[arm]["exit"]: arm for arm in ARMS if "exit" in ARMS[arm]}
    pairs = zip(_bits(results, arms[low]), _bits(results, arms[low + 1]), strict=True)
    return [one + (exits - low) * (two - one) for one, two in pairs]


def _compare(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    from gossamer.experiments.acceleration._scenes import bootstrap

    return bootstrap([a - b for a, b in zip(ours, theirs, strict=True)])


def _mean(bits: str) -> float:
    return statistics.fmean(int(bit) for bit in bits)


def _points(found: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
