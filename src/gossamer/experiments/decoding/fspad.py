"""FSPAD on the nursery Llama against an EAGLE drafter, its two changes one by one, and the other drafters.

Plan. Base, data, budget of training and choice of rates as in Chimera's experiment: 120 steps of 4 windows of 96
tokens, 204 prompts of three kinds from test packages, half of them a seed, 24 greedy tokens each. All grow a beam of at
most 24 tokens, five deep (Medusa and Chimera: as many levels as heads at least), so that only the drafters differ.

Arms: Medusa; Clover; Chimera; EAGLE (both switches off); EAGLE with the FFN widened to FSPAD's parameters; EAGLE with
feature sampling; EAGLE with partial alignment; FSPAD. ``sampling`` compares 1000 samples of two tokens over four likely
ones with the base's law; ``timing`` alternates plain decoding, EAGLE and FSPAD in one process. The arms of the
EAGLE family share the rate that is best for EAGLE. ``first`` is the accuracy of p's best token on validation windows,
and ``gap`` the feature loss there.

Must be seen: the text of greedy decoding; sampling in the base's law; tau of Medusa below EAGLE, EAGLE not above +FS
and +PAD, these not above FSPAD; the accuracy of p higher with PAD at an equal feature loss.

Smaller than the paper: a 7M base, two seeds, minutes of training; Gemma-3-270M with text of its own is left out: each
level of a draft reads its head once, which is 60 % of the model.
"""

from __future__ import annotations

from typing import Any

from gossamer.experiments import drafting
from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results

SEEDS = (0, 1)
ARMS: dict[str, dict[str, Any]] = {
    "medusa": {"tree": "beam", "top_k": 6, "total_tokens": 24},
    "clover": {"tree": "eagle2", "budget": 24},
    "chimera": {"tree": "beam", "top_k": 6, "total_tokens": 24},
    "eagle": {"fs": False, "pad": False, "top_k": 6, "total_tokens": 24},
    "eagle_wide": {"fs": False, "pad": False, "feed_factor": 2.33, "top_k": 6, "total_tokens": 24},
    "eagle_fs": {"pad": False, "top_k": 6, "total_tokens": 24},
    "eagle_pad": {"fs": False, "top_k": 6, "total_tokens": 24},
    "fspad": {"top_k": 6, "total_tokens": 24},
    "sampling": {},
    "timing": {},
}
_OWN = ("eagle", "eagle_wide", "eagle_fs", "eagle_pad", "fspad")


def run(arm: str, seed: int, lab: Lab) -> dict[str, Any]:
    """Measure one arm; drafters are trained on first use and kept in the lab's folder."""
    bundle, _, prompts = drafting.fixture(lab.quick)
    model = bundle.model
    if arm == "sampling":
        return drafting.sampling(_drafter("fspad", seed, lab), model, prompts["test"]["prose"][seed], lab.quick)
    if arm == "timing":
        systems = {name: _drafter(name, seed, lab) for name in ("eagle", "fspad")}
        texts = [ids for kind in drafting.KINDS for ids in prompts["test"][kind][:4]]
        return drafting.seconds(systems, model, texts, 2 if lab.quick else 12)
    system = _drafter(arm, seed, lab)
    figures = drafting.decode(system, model, drafting.half(prompts["test"], seed))
    if arm in _OWN:
        figures |= _predictions(system, lab)
    return figures


def conclude(results: Results) -> Conclusion:
    """Tau against EAGLE's decides, if all texts are those of plain decoding."""
    arms = [arm for arm in ARMS if arm not in ("sampling", "timing")]
    tau = {arm: results.mean(arm, "tau") for arm in arms}
    same = min(min(results.values(arm, "same")) for arm in arms)
    prompts = int(sum(results.values("fspad", "prompts")))
    p, distance = min(results.values("sampling", "p")), max(results.values("sampling", "distance"))
    effect, low, high = drafting.against(results, "fspad", "eagle")
    wide = drafting.against(results, "fspad", "eagle_wide")
    middle = (tau["eagle_fs"], tau["eagle_pad"])
    first = {arm: results.mean(arm, "first") for arm in _OWN}
    gap = {arm: results.mean(arm, "gap") for arm in _OWN}
    lines = (
        MustSee("the text is that of greedy decoding", f"{same:.1%} of {prompts} prompts an arm", same == 1),
        MustSee("sampling has the base's law", f"chi-square p {p:.3f}, total variation {distance:.3f}", p > 0.001),
        MustSee(
            "tau: Medusa < EAGLE <= EAGLE+FS, EAGLE+PAD <= FSPAD",
            ", ".join(f"{arm} {value:.3f}" for arm, value in tau.items()),
            tau["medusa"] < tau["eagle"] <= min(middle) and max(middle) <= tau["fspad"],
        ),
        MustSee(
            "FSPAD is above EAGLE, and above EAGLE of its size",
            f"difference {effect:+.3f} [{low:+.3f}, {high:+.3f}]; "
            f"of its size {wide[0]:+.3f} [{wide[1]:+.3f}, {wide[2]:+.3f}]",
            low > 0 and wide[1] > 0,
        ),
        MustSee(
            "the accuracy of p is higher with PAD at an equal feature loss",
            f"{first['eagle_pad']:.3f} at {gap['eagle_pad']:.4f} against {first['eagle']:.3f} at {gap['eagle']:.4f}",
            first["eagle_pad"] > first["eagle"] and gap["eagle_pad"] <= 1.05 * gap["eagle"],
        ),
    )
    times = {name: results.mean("timing", f"{name}_ms") for name in ("plain", "eagle", "fspad")}
    return Conclusion(
        shown=lines[0].shown and lines[1].shown and lines[3].shown,
        baseline=f"EAGLE: {tau['eagle']:.3f} tokens a guessing step, of FSPAD's size {tau['eagle_wide']:.3f}",
        result=f"FSPAD: {tau['fspad']:.3f} tokens, {results.mean('fspad', 'forwards_per_token'):.3f} steps a token",
        effect=effect,
        low=low,
        high=high,
        unit="tokens a guessing step",
        must_see=lines,
        notes=(
            f"ms a token: plain {times['plain']:.1f}, EAGLE {times['eagle']:.1f}, FSPAD {times['fspad']:.1f}",
            "7B to 70B models and Gemma are not shown",
        ),
    )


def _drafter(arm: str, seed: int, lab: Lab) -> Any:
    from gossamer.decoding.chimera import Chimera
    from gossamer.decoding.clover import Clover
    from gossamer.decoding.fspad import FSPAD
    from gossamer.decoding.medusa import Medusa

    system = {"medusa": Medusa, "clover": Clover, "chimera": Chimera}.get(arm, FSPAD)
    rate_of = ("eagle", ARMS["eagle"]) if arm in _OWN else None
    return drafting.trained(arm, system, ARMS[arm], seed, lab, rate_of)


def _predictions(system: Any, lab: Lab) -> dict[str, float]:
    """On validation prompts: share of places where p's best token is the base's own, and the feature loss of r."""
    import torch
    import torch.nn.functional as F

    bundle, _, prompts = drafting.fixture(lab.quick)
    right, count, gap = 0, 0, list[float]()
    for ids in (one for texts in prompts["validation"].values() for one in texts):
        with torch.no_grad():
            f = bundle.model.model(torch.tensor([ids])).last_hidden_state
            p, r = system.module.halves(system.module.layer(system.module.mix(torch.tensor([ids[1:]]), f[:, :-1])))
            best = bundle.model.lm_head(f[:, 1:]).argmax(-1)
            right += int((system.reading.tokens(system.reading(p).argmax(-1)) == best).sum())
            count += best.numel()
            gap.append(float(F.smooth_l1_loss(r, f[:, 1:])))
    return {"first": right / count, "gap": sum(gap) / len(gap)}
