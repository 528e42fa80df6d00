"""Chimera on the nursery Llama against Medusa heads and its own ablations, at one budget of training and one tree.

Plan. The base has 8 layers and 7M parameters. Each drafter is trained for 120 steps of 4 windows of 96 tokens on prose
and Python, labels the base's own distribution, drafts from 4096 tokens, with the better of two rates by tokens a step
on validation prompts. Figures on 204 prompts of three kinds from test packages, half of them a seed, 24 greedy tokens
each: tokens a guessing step (tau), base forwards a token, each head's hit rate given the hits before it, and whether
the text is that of plain decoding. All use EAGLE's static tree of 25 tokens; guessing is never left off.

Arms: prompt look-up; Medusa heads; Chimera; Chimera with the last token alone (no trigram); Chimera without the fast
layer. ``sampling`` compares 1000 samples of two tokens over four likely ones with the base's law; ``timing`` alternates
plain decoding, Medusa and Chimera in one process.

Must be seen: the text of plain decoding on all prompts, sampling in the base's law, tau of Chimera above Medusa's and
that above 1, ablations lower, hit rates by head falling more slowly than Medusa's.

Smaller than the paper: a 7M base instead of 7B, two seeds, minutes of training. Gemma-3-270M is left out: a tree costs
its head, 60 % of the model, far more than this budget of training wins. Wall-clock is that of a small model in Python.
"""

from __future__ import annotations

from typing import Any

from gossamer.experiments import drafting
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
ARMS: dict[str, dict[str, Any]] = {
    "look_up": {},
    "medusa": {},
    "chimera": {},
    "no_trigram": {"encoder": "token"},
    "no_fast_layer": {"full_context": False},
    "sampling": {},
    "timing": {},
}


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """Measure one arm; drafters are trained on first use and kept in the lab's folder."""
    from gossamer.decoding.prompt_lookup import PromptLookup

    bundle, _, prompts = drafting.fixture(lab.quick)
    model = bundle.model
    if arm == "sampling":
        return drafting.sampling(_drafter("chimera", seed, lab), model, prompts["test"]["prose"][seed], lab.quick)
    if arm == "timing":
        systems = {name: _drafter(name, seed, lab) for name in ("medusa", "chimera")}
        texts = [ids for kind in drafting.KINDS for ids in prompts["test"][kind][:4]]
        return drafting.seconds(systems, model, texts, 2 if lab.quick else 12)
    system = PromptLookup(switch_off=False) if arm == "look_up" else _drafter(arm, seed, lab)
    return drafting.decode(system, model, drafting.half(prompts["test"], seed))


def conclude(results: Results) -> Conclusion:
    """Tau against Medusa's decides, if all texts are those of plain decoding."""
    tau = {arm: results.mean(arm, "tau") for arm in ARMS if arm not in ("sampling", "timing")}
    same = min(min(results.values(arm, "same")) for arm in tau)
    prompts = int(sum(results.values("chimera", "prompts")))
    p, distance = min(results.values("sampling", "p")), max(results.values("sampling", "distance"))
    effect, low, high = drafting.against(results, "chimera", "medusa")
    hits = {arm: [results.mean(arm, f"hit_{k}") for k in range(1, 5)] for arm in ("medusa", "chimera")}
    fall = {arm: rates[0] - rates[3] for arm, rates in hits.items()}
    shown = {arm: " ".join(f"{rate:.2f}" for rate in rates) for arm, rates in hits.items()}
    lines = (
        MustSee("the text is that of greedy decoding", f"{same:.1%} of {prompts} prompts an arm", same == 1),
        MustSee(
            "sampling has the base's law",
            f"chi-square p {p:.3f}, total variation {distance:.3f}",
            p > 0.001,
        ),
        MustSee(
            "tau of Chimera is above Medusa's, that above 1",
            f"{tau['chimera']:.2f} against {tau['medusa']:.2f}, difference {effect:+.2f} [{low:+.2f}, {high:+.2f}]",
            low > 0 and tau["medusa"] > 1,
        ),
        MustSee(
            "ablations are lower",
            f"no trigram {tau['no_trigram']:.2f}, no fast layer {tau['no_fast_layer']:.2f}",
            max(tau["no_trigram"], tau["no_fast_layer"]) < tau["chimera"],
        ),
        MustSee(
            "hit rates fall more slowly by head than Medusa's",
            f"Chimera {shown['chimera']}; Medusa {shown['medusa']}",
            fall["chimera"] < fall["medusa"],
        ),
    )
    times = {name: results.mean("timing", f"{name}_ms") for name in ("plain", "medusa", "chimera")}
    return Conclusion(
        shown=all(line.shown for line in lines[:3]),
        baseline=f"Medusa: {tau['medusa']:.2f} tokens a guessing step; prompt look-up {tau['look_up']:.2f}",
        result=f"Chimera: {tau['chimera']:.2f} tokens, {results.mean('chimera', 'forwards_per_token'):.2f} steps each",
        effect=effect,
        low=low,
        high=high,
        unit="tokens a guessing step",
        must_see=lines,
        notes=(
            f"ms a token: plain {times['plain']:.1f}, Medusa {times['medusa']:.1f}, Chimera {times['chimera']:.1f}",
            "tau by kind: "
            + ", ".join(f"{kind} {results.mean('chimera', f'tau_{kind}'):.2f}" for kind in drafting.KINDS),
            "GPU latencies of 7B models and Gemma are not shown",
        ),
    )


def _drafter(arm: str, seed: int, lab: Lab) -> Any:
    from gossamer.decoding.chimera import Chimera
    from gossamer.decoding.medusa import Medusa

    system = Medusa if arm == "medusa" else Chimera
    return drafting.trained(arm, system, ARMS[arm], seed, lab)
