"""Clover on the nursery Llama against Medusa heads, its own ablations and an EAGLE layer, four drafted tokens a step.

Plan. Base, data, budget of training and choice of rates as in Chimera's experiment: 120 steps of 4 windows of 96
tokens, 204 prompts of three kinds from test packages, half of them a seed, 24 greedy tokens each. All drafters guess
four tokens a step (Clover by its own tree, the others the best four of a beam), as a server with large batches would.

Arms: Medusa heads; Clover; Clover without augmenting layers; Clover without regression (heads are told zeros); an
EAGLE-1 layer (FSPAD with both switches off). ``cost`` counts passes of decoder layers of the drafters a step and times
drafts of Clover and EAGLE in turn; ``batches`` gives tokens a second for 1, 4 and 8 requests together.

Must be seen: the text of greedy decoding; hit rates of later heads above no-regression's and Medusa's, the gap growing
with the head; tau above Medusa's at four tokens; a draft cheaper than EAGLE's; a batch sweep.

Smaller than the paper: a 7M base, two seeds, minutes of training; Gemma-3-270M with text of its own is left out.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from gossamer.experiments import drafting
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
ARMS: dict[str, dict[str, Any]] = {
    "medusa": {"tree": "beam", "top_k": 4, "total_tokens": 4},
    "clover": {"budget": 4},
    "no_augmenting": {"budget": 4, "layers": 0},
    "no_regression": {"budget": 4, "regressive": False},
    "eagle": {"fs": False, "pad": False, "total_tokens": 4, "top_k": 4},
    "cost": {},
    "batches": {},
}
BATCHES = (1, 4, 8)


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """Measure one arm; drafters are trained on first use and kept in the lab's folder."""
    bundle, _, prompts = drafting.fixture(lab.quick)
    if arm == "cost":
        return _cost(seed, lab)
    if arm == "batches":
        return _batches(seed, lab)
    return drafting.decode(_drafter(arm, seed, lab), bundle.model, drafting.half(prompts["test"], seed))


def conclude(results: Results) -> Conclusion:
    """Tau against Medusa's at four tokens decides, if all texts are those of plain decoding."""
    arms = [arm for arm in ARMS if arm not in ("cost", "batches")]
    tau = {arm: results.mean(arm, "tau") for arm in arms}
    hits = {arm: [results.mean(arm, f"hit_{k}") for k in range(1, 5)] for arm in arms}
    same = min(min(results.values(arm, "same")) for arm in arms)
    prompts = int(sum(results.values("clover", "prompts")))
    effect, low, high = drafting.against(results, "clover", "medusa")
    gaps = [a - b for a, b in zip(hits["clover"], hits["no_regression"], strict=True)]
    cost = {name: results.mean("cost", name) for name in results["cost"][SEEDS[0]]}
    sweep = {n: results.mean("batches", f"clover_{n}_per_s") for n in BATCHES}
    plain = {n: results.mean("batches", f"plain_{n}_per_s") for n in BATCHES}
    rates = "; ".join(f"{arm} " + " ".join(f"{rate:.2f}" for rate in hits[arm]) for arm in arms)
    lines = (
        MustSee("the text is that of greedy decoding", f"{same:.1%} of {prompts} prompts an arm", same == 1),
        MustSee(
            "tau of Clover is above Medusa's at four tokens",
            f"{tau['clover']:.2f} against {tau['medusa']:.2f}, difference {effect:+.2f} [{low:+.2f}, {high:+.2f}]",
            low > 0,
        ),
        MustSee(
            "hit rates of heads 2 to 4 are above no-regression's and Medusa's",
            rates,
            all(hits["clover"][k] > max(hits["no_regression"][k], hits["medusa"][k]) for k in (1, 2, 3)),
        ),
        MustSee(
            "the gap to no regression grows with the head",
            " ".join(f"{gap:+.2f}" for gap in gaps),
            gaps[1] < gaps[2] < gaps[3],
        ),
        MustSee(
            "a draft costs well below EAGLE's",
            f"{cost['clover_ms']:.2f} against {cost['eagle_ms']:.2f} ms, {cost['clover_calls']:.1f} calls of context "
            f"layers a step against {cost['eagle_calls']:.1f}",
            cost["clover_ms"] < cost["eagle_ms"],
        ),
        MustSee(
            "tokens a second for 1, 4 and 8 requests together",
            ", ".join(f"{n}: {sweep[n]:.0f} (plain {plain[n]:.0f})" for n in BATCHES),
            all(rate > 0 for rate in sweep.values()),
        ),
    )
    return Conclusion(
        shown=all(line.shown for line in lines[:2]),
        baseline=f"Medusa: {tau['medusa']:.2f} tokens a guessing step",
        result=f"Clover: {tau['clover']:.2f} tokens; no layers {tau['no_augmenting']:.2f}, EAGLE {tau['eagle']:.2f}",
        effect=effect,
        low=low,
        high=high,
        unit="tokens a guessing step",
        must_see=lines,
        notes=("the throughput of a 100B server is not shown",),
    )


def _drafter(arm: str, seed: int, lab: Lab) -> Any:
    from gossamer.decoding.clover import Clover
    from gossamer.decoding.fspad import FSPAD
    from gossamer.decoding.medusa import Medusa

    system = {"medusa": Medusa, "eagle": FSPAD}.get(arm, Clover)
    return drafting.trained(arm, system, ARMS[arm], seed, lab)


def _cost(seed: int, lab: Lab) -> dict[str, float]:
    """Milliseconds a draft and calls of decoder layers a step, Clover and EAGLE in turn."""
    from gossamer.parts.draft_layer import DraftLayer
    from gossamer.parts.speculation import settle

    bundle, _, prompts = drafting.fixture(lab.quick)
    model, times, calls = bundle.model, dict[str, list[float]](), dict[str, int]()
    systems = {name: _drafter(name, seed, lab) for name in ("clover", "eagle")}
    made: dict[str, list[int]] = {name: [] for name in systems}
    for name, system in systems.items():
        times[name], calls[name] = [], 0
        for module in system.module.modules():
            if isinstance(module, DraftLayer):
                _count(module, calls, name)
    for ids in prompts["test"]["prose"][: 1 if lab.quick else 8]:
        for name, system in systems.items():
            state = system.open(model, ids)
            system.step(model, [state])
            for _ in range(8):
                before, start = calls[name], time.perf_counter()
                draft = system.draft([state], 4)
                times[name].append(1000 * (time.perf_counter() - start))
                made[name].append(calls[name] - before)
                system.speculator(model).step([state], lambda _, d=draft: d, system.observe, settle)
            state.close()
    found = {f"{name}_ms": statistics.median(taken) for name, taken in times.items()}
    return found | {f"{name}_calls": statistics.fmean(counts) for name, counts in made.items()}


def _count(layer: Any, calls: dict[str, int], name: str) -> None:
    plain = layer.finish

    def finish(*args: Any) -> Any:
        calls[name] += 1
        return plain(*args)

    layer.finish = finish


def _batches(seed: int, lab: Lab) -> dict[str, float]:
    """Tokens a second of requests stepped together, Clover and plain decoding in turn."""
    bundle, _, prompts = drafting.fixture(lab.quick)
    model, system = bundle.model, _drafter("clover", seed, lab)
    runner, texts = system.speculator(model).runner, prompts["test"]["code"]
    found: dict[str, float] = {}
    for count in BATCHES:
        chosen = [texts[i % len(texts)] for i in range(count)]
        taken: dict[str, list[float]] = {"clover": [], "plain": []}
        for _ in range(1 if lab.quick else 3):
            start = time.perf_counter()
            runner.generate_many(chosen, max_new_tokens=drafting.NEW)
            taken["plain"].append(time.perf_counter() - start)
            start = time.perf_counter()
            states = [system.open(model, ids) for ids in chosen]
            for state in states:
                state.room = drafting.NEW
            while live := [state for state in states if state.room]:
                system.step(model, live)
            taken["clover"].append(time.perf_counter() - start)
        found |= {f"{name}_{count}_per_s": count * drafting.NEW / statistics.median(t) for name, t in taken.items()}
    return found
