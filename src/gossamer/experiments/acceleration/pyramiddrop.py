"""PyramidDrop against one early cut, random dropping and pooling, on a small vision-language model that reads scenes.

Plan. The nursery's model (DINOv2-S at 112 px, 64 image tokens, a Llama of 12 layers, trained on the still-image world)
answers 300 questions on unseen scenes a seed: colour, shape, place, count, relation, glyph. Nothing is trained for the
first six arms. An answer counts where greedy decoding gives exactly it. Intervals are paired bootstraps over all
questions of all seeds; a seed is a set of scenes and the order of random dropping.

Baselines: all tokens; one cut before the third layer to the same average count (FastV's place, PyramidDrop's ranking);
random dropping with PyramidDrop's schedule; pooling the 8 x 8 grid to 5 x 6 before the language model. ``*_kept``: the
same with positions kept, which is not the paper's rule. ``probe``: one cut at one layer to one share, the rest of the
layers without. ``train_*``: projector and language model trained on for the same number of steps, with and without
dropping, each scored as it was trained; the rate is chosen without dropping, on other scenes. ``timing``: prefill of 16
prompts and training steps, contenders in turns in one process.

Must be seen: PyramidDrop within 5 points of all tokens; above one cut and above random at equal operations; a drop to
an eighth at layer 1 costs more than 5 points, in the last third of the layers at most 2; prefill time and cache bytes
fall as the cost model says, within 15 %; training is faster and within 3 points.

Smaller than the paper: a model of 7M and one world instead of LLaVA and public benchmarks; 64 image tokens, so that
fixed costs of a layer weigh more in the times than they would at 576.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
SCHEDULE: dict[str, Any] = {"layers": (3, 6, 9), "ratios": (0.5, 0.25, 0.125)}
CUT: dict[str, Any] = {"layers": (2,), "ratios": (0.3625,)}
ARMS: dict[str, dict[str, Any]] = {
    "full": {},
    "pyramiddrop": SCHEDULE,
    "one_cut": CUT,
    "random": SCHEDULE | {"score": "random"},
    "pooling": {"pool": (5, 6)},
    "pyramiddrop_kept": SCHEDULE | {"reindex_positions": False},
    "one_cut_kept": CUT | {"reindex_positions": False},
    "random_kept": SCHEDULE | {"score": "random", "reindex_positions": False},
    "probe": {},
    "timing": {},
    "train_full": {},
    "train_pyramiddrop": SCHEDULE | {"train": True},
}
PROBE_LAYERS, PROBE_SHARES = (1, 2, 4, 6, 8, 10), (0.5, 0.25, 0.125)
RATES = (1e-4, 3e-4)


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """Figures of one arm; ``right`` is a string with 1 for each question answered."""
    options = dict(ARMS[arm])
    if arm == "probe":
        return _probe(seed, lab)
    if arm == "timing":
        return _timing(seed, lab)
    if arm.startswith("train"):
        return _trained(options, seed, lab)
    return _scored(options, seed, lab)


def conclude(results: Results) -> Conclusion:
    """Shown: above one cut and above random beyond doubt, and at most 5 points below all tokens."""
    accuracy = {arm: statistics.fmean(_bits(results, arm)) for arm in ARMS if arm not in ("probe", "timing")}
    effect, low, high = _paired(results, "pyramiddrop", "one_cut")
    full = _paired(results, "pyramiddrop", "full")
    kept = {
        rival: _points(_paired(results, "pyramiddrop_kept", rival))
        for rival in ("pyramiddrop", "one_cut_kept", "random_kept")
    }
    rivals = {rival: _paired(results, "pyramiddrop", rival) for rival in ("one_cut", "random", "pooling")}
    lines = [
        MustSee(
            "PyramidDrop within 5 points of all tokens",
            f"{accuracy['pyramiddrop']:.1%} against {accuracy['full']:.1%}, {_points(full)}",
            full[0] >= -0.05,
        ),
        *(
            MustSee(
                f"above {rival} at equal operations",
                f"{accuracy['pyramiddrop']:.1%} against {accuracy[rival]:.1%}, {_points(found)}; operations per prompt "
                f"{results.mean('pyramiddrop', 'operations'):.3g} and {results.mean(rival, 'operations'):.3g}",
                found[1] > 0,
            )
            for rival, found in rivals.items()
        ),
        *_probe_lines(results),
        *_timing_lines(results),
        *_training_lines(results, accuracy),
    ]
    return Conclusion(
        shown=all(line.shown for line in lines[:3]),
        baseline=f"one cut before layer 2: {accuracy['one_cut']:.1%} of {len(_bits(results, 'full'))} questions",
        result=f"PyramidDrop: {accuracy['pyramiddrop']:.1%} (all tokens: {accuracy['full']:.1%})",
        effect=100 * effect,
        low=100 * low,
        high=100 * high,
        unit="points of accuracy",
        must_see=tuple(lines),
        notes=(
            "accuracy: " + ", ".join(f"{arm} {value:.1%}" for arm, value in accuracy.items()),
            f"positions kept instead of renumbered: {kept['pyramiddrop']}; so kept, PyramidDrop against one cut "
            f"{kept['one_cut_kept']}, against random {kept['random_kept']}",
            "by kind, PyramidDrop against all tokens: " + _by_kind(results),
        ),
    )


def _probe_lines(results: Results) -> list[MustSee]:
    loss = {
        (layer, share): results.mean("probe", "full") - results.mean("probe", f"layer{layer}_share{share}")
        for layer in PROBE_LAYERS
        for share in PROBE_SHARES
    }
    table = "; ".join(
        f"layer {layer}: " + ", ".join(f"{share:g} -> {-100 * loss[layer, share]:+.1f}" for share in PROBE_SHARES)
        for layer in PROBE_LAYERS
    )
    return [
        MustSee(
            "one cut to an eighth at layer 1 costs more than 5 points, in the last third at most 2",
            f"points against all tokens by layer and share: {table}",
            loss[1, 0.125] > 0.05 and all(loss[layer, 0.125] <= 0.02 for layer in PROBE_LAYERS if layer >= 8),
        )
    ]


def _timing_lines(results: Results) -> list[MustSee]:
    predicted = results.mean("timing", "operations_ratio")
    measured = results.mean("timing", "prefill_pyramiddrop_ms") / results.mean("timing", "prefill_full_ms")
    stored, expected = results.mean("timing", "bytes_ratio"), results.mean("timing", "tokens_ratio")
    step = results.mean("timing", "step_pyramiddrop_ms") / results.mean("timing", "step_full_ms")
    return [
        MustSee(
            "prefill time falls as the cost model says, within 15 %",
            f"times {measured:.3f} ({results.mean('timing', 'prefill_full_ms'):.0f} to "
            f"{results.mean('timing', 'prefill_pyramiddrop_ms'):.0f} ms for 16 prompts), operations times "
            f"{predicted:.3f}",
            abs(measured / predicted - 1) <= 0.15,
        ),
        MustSee(
            "cache bytes fall as the tokens do, within 15 %",
            f"bytes times {stored:.3f}, tokens times {expected:.3f}",
            abs(stored / expected - 1) <= 0.15,
        ),
        MustSee("a training step is faster", f"median time of a step times {step:.3f}", step < 1),
    ]


def _training_lines(results: Results, accuracy: dict[str, float]) -> list[MustSee]:
    found = _paired(results, "train_pyramiddrop", "train_full")
    seconds = [results.mean(arm, "train_seconds") for arm in ("train_pyramiddrop", "train_full")]
    return [
        MustSee(
            "trained with it for as many steps: within 3 points",
            f"{accuracy['train_pyramiddrop']:.1%} against {accuracy['train_full']:.1%}, {_points(found)}; "
            f"{seconds[0]:.0f} s against {seconds[1]:.0f} s",
            found[0] >= -0.03,
        )
    ]


def _by_kind(results: Results) -> str:
    kinds = results["full"][min(results["full"])]["kinds"]
    shares = {arm: {kind: results.mean(arm, kind) for kind in kinds} for arm in ("pyramiddrop", "full")}
    return ", ".join(f"{kind} {shares['pyramiddrop'][kind]:.0%} / {shares['full'][kind]:.0%}" for kind in kinds)


def _scored(options: dict[str, Any], seed: int, lab: Lab) -> dict[str, Any]:
    """A plain or accelerated model on the questions of a seed."""
    from gossamer.experiments.acceleration._scenes import marks, right
    from gossamer.pipeline.single import system

    rows, model, processor = _subject(seed, lab, options.pop("pool", None))
    if not options:
        found = right(model, processor, rows)
        return {"right": marks(found), "operations": _plain_operations(model, processor, rows), **_kinds(rows, found)}
    dropping = system("pyramiddrop", seed=seed, **options)
    dropping.accelerate(model)
    found = right(model, processor, rows)
    report = dropping.report()
    dropping.release(model)
    tokens = report["visual"]
    return {
        "right": marks(found),
        "operations": report["operations"] / len(tokens),
        "image_tokens": statistics.fmean(count for row in tokens for count in row),
        **_kinds(rows, found),
    }


def _probe(seed: int, lab: Lab) -> dict[str, Any]:
    from gossamer.experiments.acceleration._scenes import right
    from gossamer.pipeline.single import system

    rows, model, processor = _subject(seed, lab)
    rows = rows[: len(rows) // 2]
    found = {"full": statistics.fmean(right(model, processor, rows))}
    for layer in PROBE_LAYERS:
        for share in PROBE_SHARES:
            dropping = system("pyramiddrop", layers=(layer,), ratios=(share,))
            dropping.accelerate(model)
            found[f"layer{layer}_share{share}"] = statistics.fmean(right(model, processor, rows))
            dropping.release(model)
    return found


def _timing(seed: int, lab: Lab) -> dict[str, Any]:
    """Prefill and training step, with and without, in turns."""
    import torch

    from gossamer.parts.selection_costs import median_ms
    from gossamer.parts.visual_rows import visual_batch
    from gossamer.pipeline.single import system

    rows, model, processor = _subject(seed, lab)
    light = _subject(seed, lab)[1]
    dropping = system("pyramiddrop", **ARMS["pyramiddrop"], train=True)
    dropping.accelerate(light)
    batch = visual_batch(rows[:16], processor)
    prompt = {key: value for key, value in batch.items() if key != "labels"}

    def prefill(subject: Any) -> Any:
        with torch.no_grad():
            return subject(**prompt, use_cache=True, logits_to_keep=1).past_key_values

    def step(subject: Any) -> None:
        subject.train()
        subject(**batch, use_cache=False).loss.backward()
        subject.zero_grad(set_to_none=True)
        subject.eval()

    stored = {name: _stored(prefill(subject)) for name, subject in (("full", model), ("light", light))}
    report = dropping.report()
    both = {"full": model, "pyramiddrop": light}
    rounds = 3 if lab.quick else 20
    prefills = median_ms({name: functools.partial(prefill, one) for name, one in both.items()}, rounds)
    steps = median_ms({name: functools.partial(step, one) for name, one in both.items()}, max(2, rounds // 2))
    layers = len(report["tokens"][0])
    return {
        **{f"prefill_{name}_ms": value for name, value in prefills.items()},
        **{f"step_{name}_ms": value for name, value in steps.items()},
        "operations_ratio": report["operations"] / report["operations_plain"],
        "bytes_ratio": stored["light"] / stored["full"],
        "tokens_ratio": sum(map(sum, report["tokens"])) / sum(layers * row[0] for row in report["tokens"]),
    }


def _trained(options: dict[str, Any], seed: int, lab: Lab) -> dict[str, Any]:
    """Train on, then score as trained."""
    rate = lab.once("rate", lambda: _best_rate(lab))
    model, processor, seconds = _train(options, rate, seed, lab)
    from gossamer.experiments.acceleration._scenes import marks, right, tower_states

    scenes, limit = _sizes(lab)
    model.model.vision_tower.states = tower_states("test", scenes, seed)
    rows = _rows("test", scenes, seed, limit)
    found = right(model, processor, rows)
    return {"right": marks(found), "train_seconds": seconds, "rate": rate, **_kinds(rows, found)}


def _best_rate(lab: Lab) -> float:
    """The rate with which the undropped arm answers most validation questions."""
    from gossamer.experiments.acceleration._scenes import right, tower_states

    scenes, limit = _sizes(lab)
    rows, best = _rows("validation", scenes, 0, limit // 2), {}
    for rate in RATES:
        model, processor, _ = _train({}, rate, 100, lab)
        model.model.vision_tower.states = tower_states("validation", scenes, 0)
        best[rate] = sum(right(model, processor, rows))
    return max(best, key=lambda rate: best[rate])


def _train(options: dict[str, Any], rate: float, seed: int, lab: Lab) -> tuple[Any, Any, float]:
    """AdamW with a linear warm-up and decay, batches of 16 questions, bfloat16 autocast."""
    import torch

    from gossamer.experiments.acceleration._scenes import tabled, tower_states
    from gossamer.parts.visual_rows import visual_batch
    from gossamer.pipeline.single import system

    scenes, steps = (40, 4) if lab.quick else (1500, 120)
    model, processor = tabled(tower_states("train", scenes, 50))
    rows = _rows("train", scenes, 50, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(rows)).tolist()
    if options:
        system("pyramiddrop", **options).accelerate(model)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    start = time.perf_counter()
    for step in range(steps):
        chosen = [rows[order[place % len(rows)]] for place in range(16 * step, 16 * step + 16)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**visual_batch(chosen, processor), use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), processor, time.perf_counter() - start


def _subject(seed: int, lab: Lab, pool: tuple[int, int] | None = None) -> tuple[list[Any], Any, Any]:
    """Questions of a seed, the model that looks up their images, and its processor."""
    from gossamer.experiments.acceleration._scenes import tabled, tower_states

    scenes, limit = _sizes(lab)
    return _rows("test", scenes, seed, limit), *tabled(tower_states("test", scenes, seed), pool)


def _rows(split: str, scenes: int, seed: int, limit: int | None) -> list[dict[str, Any]]:
    from gossamer.experiments.acceleration._scenes import asked

    return asked(split, scenes, seed, limit)


def _sizes(lab: Lab) -> tuple[int, int]:
    """Scenes and questions."""
    return (10, 24) if lab.quick else (80, 300)


def _plain_operations(model: Any, processor: Any, rows: Sequence[Any]) -> float:
    """Multiply-adds per prompt of the model as it is, over as many rows as the dropping arms report."""
    from gossamer.parts.selection_costs import layer_operations
    from gossamer.parts.visual_rows import visual_batch

    last = rows[-(len(rows) % 25 or 25) :]
    mask = visual_batch(last, processor)["attention_mask"]
    config = model.config.text_config
    return statistics.fmean(config.num_hidden_layers * layer_operations(config, int(n)) for n in mask.sum(1))


def _stored(cache: Any) -> int:
    return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)


def _kinds(rows: Sequence[Any], found: Sequence[int]) -> dict[str, Any]:
    """Accuracy by kind of question."""
    kinds = sorted({row["kind"] for row in rows})
    hits = {kind: [hit for row, hit in zip(rows, found, strict=True) if row["kind"] == kind] for kind in kinds}
    return {"kinds": kinds, "accuracy": statistics.fmean(found)} | {k: statistics.fmean(v) for k, v in hits.items()}


def _bits(results: Results, arm: str) -> list[int]:
    return [int(bit) for seed in sorted(results[arm]) for bit in results[arm][seed]["right"]]


def _paired(results: Results, arm: str, other: str) -> tuple[float, float, float]:
    from gossamer.experiments.acceleration._scenes import bootstrap

    return bootstrap([a - b for a, b in zip(_bits(results, arm), _bits(results, other), strict=True)])


def _points(found: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in found)
    return f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}]"
