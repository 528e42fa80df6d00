"""DPO against fine-tuning on the chosen answers, unlikelihood, best-of-16, IPO and cDPO, under a reward that is known.

Exact part (``tabular``): a policy over 50 answers to each of 10 prompts, trained by DPO's loss in expectation over
Bradley-Terry labels, must reach pi_ref exp(r / beta) / Z.

Text part: the reference is the nursery's Llama (7M), which was trained on this very prose. It continues openings of
paragraphs by 24 tokens, two samples each; the reward is plain wording, 2 * (5 - mean letters of a word) within [-6, 6],
free of length; labels follow Bradley-Terry. All arms train all weights on the same 512 pairs, 16 pairs a step, two
passes; rates are chosen on seed 0 by validation pairs (accuracy for DPO, which the other pair losses share, likelihood
for the likelihood arms). Reward and KL(policy || reference) are means over fresh samples to held-out prompts; pair
accuracy is that of the implicit reward (for likelihood arms: of the log-probability) on held-out pairs, against the
true order. Training and scoring use the very tokens that were sampled: no end is added to an answer cut at 24 tokens,
which likelihood arms would spend their KL on.

Must be seen: at equal KL clearly more reward than fine-tuning on the chosen answers; reward falls as beta rises; pair
accuracy of 70 % or more; cDPO above DPO when 20 % of the labels are flipped. Smaller than the paper: 7M parameters for
774M, a lexical reward for a sentiment classifier; PPO is not run.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results, t_interval
from gossamer.hub.corpora import load_corpus
from gossamer.hub.nursery import load_nursery
from gossamer.kinds.objectives import Batch, Loss
from gossamer.objectives.dpo import DPO, DPOConfig, pair_loss
from gossamer.objectives.sft import SFT
from gossamer.optimizers.adamw import AdamW
from gossamer.parts.data import IGNORE, Collator, Example, PreferencePair, label_mask
from gossamer.parts.scorer import sequence_logprobs
from gossamer.parts.training import TrainSettings, train

SEEDS = (0, 1, 2)
ARMS = {
    "tabular": {},
    "sft": {},
    "best_of_16": {},
    "sft_on_chosen": {},
    "unlikelihood": {},
    "dpo_0.05": {"beta": 0.05},
    "dpo_0.1": {"beta": 0.1},
    "dpo_0.5": {"beta": 0.5},
    "dpo_1": {"beta": 1.0},
    "ipo": {"beta": 0.1, "loss": "ipo"},
    "dpo_flipped": {"beta": 0.1},
    "cdpo_flipped": {"beta": 0.1, "label_smoothing": 0.2},
}
FRONTIER = ("dpo_1", "dpo_0.5", "dpo_0.1", "dpo_0.05")
NEW_TOKENS, PROMPT_TOKENS, PAIRS_A_STEP, FLIPPED = 24, 12, 16, 0.2
RATES = {"dpo": (1e-4, 4e-4), "sft": (1e-4, 4e-4, 1.6e-3)}


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """Mean true reward, KL from the reference in nats, held-out pair accuracy; ``tabular``: total variation."""
    if arm == "tabular":
        return {"total_variation": _tabular(seed)}
    model, tokenizer = load_nursery("llama-7m")
    held_out = _pairs(model, tokenizer, "test", seed, lab)
    if arm in ("sft", "best_of_16"):
        return _fresh(model, model, tokenizer, held_out, seed, best_of=16 if arm == "best_of_16" else 1)
    rate = _rate("sft" if arm in ("sft_on_chosen", "unlikelihood") else "dpo", lab)
    policy, objective = _train(arm, rate, model, tokenizer, seed, lab)
    figures = _fresh(policy, model, tokenizer, held_out, seed)
    return figures | {"accuracy": _accuracy(policy, objective, model, tokenizer, held_out)}


def conclude(results: Results) -> Conclusion:
    seeds = sorted(results["sft"])
    gains = []
    for seed in seeds:
        points = [(0.0, results["sft"][seed]["reward"])]
        points += [(results[arm][seed]["kl"], results[arm][seed]["reward"]) for arm in FRONTIER]
        chosen = results["sft_on_chosen"][seed]
        gains.append(_at(points, chosen["kl"]) - chosen["reward"])
    gain, low, high = t_interval(gains)
    reward = {arm: results.mean(arm, "reward") for arm in ARMS if arm != "tabular"}
    kl = {arm: results.mean(arm, "kl") for arm in reward}
    accuracy = results.mean("dpo_0.1", "accuracy")
    flips, flips_low, _ = results.paired("cdpo_flipped", "dpo_flipped", "reward")
    variation = max(results.values("tabular", "total_variation"))
    falls = all(reward[a] <= reward[b] for a, b in itertools.pairwise(FRONTIER))
    listed = ", ".join(f"{arm} {reward[arm]:.2f} at KL {kl[arm]:.2f}" for arm in reward)
    return Conclusion(
        shown=low > 0,
        baseline=f"fine-tuning on the chosen answers: reward {reward['sft_on_chosen']:.2f} at "
        f"{kl['sft_on_chosen']:.2f} nats",
        result=f"DPO's frontier there is {gain:+.2f} higher (a reference sample has {reward['sft']:.2f})",
        effect=gain,
        low=low,
        high=high,
        unit="true reward at equal KL",
        must_see=(
            MustSee("tabular DPO within 0.02 of the closed form", f"total variation {variation:.4f}", variation < 0.02),
            MustSee("at equal KL more reward than fine-tuning on the chosen", f"{gain:+.2f} [{low:+.2f}]", low > 0),
            MustSee("reward falls as beta rises", ", ".join(f"{reward[arm]:.2f}" for arm in FRONTIER[::-1]), falls),
            MustSee("held-out pair accuracy of 70 % or more", f"{accuracy:.2f}", accuracy >= 0.7),
            MustSee("cDPO above DPO under 20 % flips", f"{flips:+.2f} [{flips_low:+.2f}]", flips > 0),
        ),
        notes=(listed,),
    )


def _at(points: list[tuple[float, float]], kl: float) -> float:
    """Reward of the frontier at this KL, linear between points, flat beyond the last."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= kl <= x1:
            return y0 + (y1 - y0) * (kl - x0) / max(x1 - x0, 1e-9)
    return points[-1][1]


def _reward(text: str) -> float:
    words = re.findall("[A-Za-z]+", text)
    return max(-6.0, min(6.0, 2 * (5 - statistics.fmean(map(len, words))))) if words else -6.0


class _Given:
    """Objectives on examples that are made already."""

    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]:
        return list(rows)


class _SFT(_Given, SFT):
    """On the chosen answers."""


class _DPO(_Given, DPO):
    """DPO, cDPO and IPO by their options."""


class _Unlikelihood(_DPO):
    """Likelihood of the chosen tokens up, of the rejected ones down with weight 0.5: means over tokens."""

    def loss(self, model: Any, batch: Batch) -> Loss:
        tokens = {key: batch[key] for key in batch if key != "normaliser"}
        chosen, rejected = sequence_logprobs(model, tokens, average=True).chunk(2)
        return Loss((0.5 * rejected.clamp(min=-8.0) - chosen).sum() / self.normaliser(batch))


def _objective(arm: str, seed: int) -> SFT | DPO:
    if arm == "sft_on_chosen":
        return _SFT(seed=seed)
    if arm == "unlikelihood":
        return _Unlikelihood(DPOConfig(reference="none"), seed=seed)
    options: Any = ARMS[arm]
    return _DPO(reference="precomputed", seed=seed, **options)


def _train(arm: str, rate: float, reference: Any, tokenizer: Any, seed: int, lab: Lab) -> tuple[Any, SFT | DPO]:
    pairs = [_example(pair) for pair in _pairs(reference, tokenizer, "train", seed, lab)]
    examples: list[Any] = pairs
    if arm.endswith("flipped"):
        draws = torch.rand(len(pairs), generator=torch.Generator().manual_seed(seed)) < FLIPPED
        examples = [
            PreferencePair(pair.rejected, pair.chosen) if flip else pair
            for pair, flip in zip(pairs, draws.tolist(), strict=True)
        ]
    if arm == "sft_on_chosen":
        examples = [pair.chosen for pair in pairs]
    policy, objective = copy.deepcopy(reference), _objective(arm, seed)
    settings = TrainSettings(
        steps=2 * len(pairs) // PAIRS_A_STEP, batch_size=PAIRS_A_STEP, max_length=64, precision="fp32", save_every=0,
        seed=seed,
    )  # fmt: skip
    train(
        policy, tokenizer, examples, objective=objective, optimizer=AdamW(lr=rate), settings=settings,
        folder=lab.folder("runs", arm, str(seed)), resume=False,
    )  # fmt: skip
    return policy.eval(), objective


def _rate(family: str, lab: Lab) -> float:
    def search() -> float:
        model, tokenizer = load_nursery("llama-7m")
        pairs = _pairs(model, tokenizer, "validation", 0, lab)
        scores = {}
        for rate in RATES[family]:
            policy, objective = _train(
                "dpo_0.1" if family == "dpo" else "sft_on_chosen", rate, model, tokenizer, 0, lab
            )
            if family == "dpo":
                scores[rate] = _accuracy(policy, objective, model, tokenizer, pairs)
            else:
                batch = objective.collate([_example(pair).chosen for pair in pairs], tokenizer)
                with torch.no_grad():
                    scores[rate] = -float(objective.loss(policy, batch).value)
            lab.log(f"{family} rate {rate}: {scores[rate]:.4f}")
        return max(scores, key=lambda rate: scores[rate])

    return float(lab.once(f"rate_{family}", search))


@torch.no_grad()
def _accuracy(policy: Any, objective: SFT | DPO, reference: Any, tokenizer: Any, pairs: list[dict[str, Any]]) -> float:
    """Share of held-out pairs that the model's own score orders as the true reward does."""
    batch = Collator(tokenizer)([_example(pair) for pair in pairs])
    scores = sequence_logprobs(policy, batch, chunk=64)
    if isinstance(objective, DPO) and objective.config.reference != "none":
        scores = scores - sequence_logprobs(reference, batch, chunk=64)
    chosen, rejected = scores.chunk(2)
    right = torch.tensor([pair["right"] for pair in pairs])
    return float(((chosen > rejected) == right).float().mean())


@torch.no_grad()
def _fresh(
    policy: Any, reference: Any, tokenizer: Any, pairs: list[dict[str, Any]], seed: int, best_of: int = 1
) -> dict[str, float]:
    """Mean reward and KL over fresh samples to the prompts of ``pairs``; best of n has its closed-form KL bound."""
    prompts: list[list[int]] = [pair["prompt"] for pair in pairs]
    if best_of > 1:
        prompts = [prompt for prompt in prompts[:64] for _ in range(best_of)]
    samples = _sample(policy, tokenizer, prompts, 9000 + seed)
    rewards = torch.tensor([_reward(tokenizer.decode(tail, skip_special_tokens=True)) for tail in samples])
    if best_of > 1:
        best = float(rewards.view(-1, best_of).max(dim=1).values.mean())
        return {"reward": best, "kl": math.log(best_of) - (best_of - 1) / best_of}
    batch = Collator(tokenizer)([_scored(head, tail) for head, tail in zip(prompts, samples, strict=True)])
    lengths = label_mask(batch["labels"]).sum(dim=1).float()
    gaps = sequence_logprobs(policy, batch, chunk=64) - sequence_logprobs(reference, batch, chunk=64)
    return {"reward": float(rewards.mean()), "kl": float(gaps.mean()), "tokens": float(lengths.mean())}


def _scored(head: list[int], tail: list[int]) -> Example:
    labels = [IGNORE] * len(head) + tail
    return Example([*head, *tail], labels, [float(label != IGNORE) for label in labels])


def _example(pair: dict[str, Any]) -> PreferencePair:
    return PreferencePair(_scored(pair["prompt"], pair["chosen"]), _scored(pair["prompt"], pair["rejected"]))


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """The ids of one sample at temperature 1 for each prompt, at most NEW_TOKENS, its end token included."""
    end, out = tokenizer.eos_token_id, []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, len(prompts), 256):
            ids = torch.tensor(prompts[first : first + 256])
            new = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
            )[:, PROMPT_TOKENS:].tolist()  # fmt: skip
            out += [tail[: tail.index(end) + 1] if end in tail else tail for tail in new]
    return out


def _pairs(model: Any, tokenizer: Any, split: str, seed: int, lab: Lab) -> list[dict[str, Any]]:
    """Pairs of samples from the reference with Bradley-Terry labels by the true reward; made once a split and seed.

    Token ids of prompt, chosen and rejected answer; ``right`` tells whether the label is that of the true order.
    """

    def make() -> list[dict[str, Any]]:
        wanted = 64 if lab.quick else {"train": 512}.get(split, 256)
        prompts = _prompts(tokenizer, split, wanted + wanted // 4, seed)
        ones, twos = (_sample(model, tokenizer, prompts, 2 * seed + side) for side in (0, 1))
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for prompt, one, two in zip(prompts, ones, twos, strict=True):
            gap = _reward(tokenizer.decode(one, skip_special_tokens=True)) - _reward(
                tokenizer.decode(two, skip_special_tokens=True)
            )
            wins = bool(torch.rand((), generator=generator) < 1 / (1 + math.exp(-gap)))
            if gap:
                chosen, rejected = (one, two) if wins else (two, one)
                rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "right": wins == (gap > 0)})
        return rows[:wanted]

    return list(lab.once(f"pairs_{split}_{seed}", make))


def _prompts(tokenizer: Any, split: str, count: int, seed: int) -> list[list[int]]:
    """Openings of paragraphs, PROMPT_TOKENS tokens each."""
    rows = load_corpus("english_prose", split=split, limit=2 * count, seed=seed).rows
    heads = [tokenizer(row["text"])["input_ids"][:PROMPT_TOKENS] for row in rows]
    return [head for head in heads if len(head) == PROMPT_TOKENS][:count]


def _tabular(seed: int, prompts: int = 10, answers: int = 50, beta: float = 0.5) -> float:
    """Largest total variation over prompts between the trained policy and pi_ref exp(r / beta) / Z."""
    generator = torch.Generator().manual_seed(seed)
    rewards, base = torch.randn(2, prompts, answers, generator=generator, dtype=torch.float64)
    reference = base.log_softmax(-1)
    wins = torch.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    config = DPOConfig(beta=beta)
    theta = base.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = theta.log_softmax(-1) - reference
        loss = (wins * pair_loss(ratio[:, :, None] - ratio[:, None, :], config)).sum() / prompts
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (reference + rewards / beta).softmax(-1)
    return float((theta.detach().softmax(-1) - optimum).abs().sum(-1).max() / 2)
