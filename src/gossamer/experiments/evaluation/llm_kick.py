"""What perplexity hides: closed-book recall, open-book answers and perplexity of pruned and rounded models.

World part. A Llama (4 layers, width 256, words as tokens) learns 480 facts about 120 invented people, each in seven
wordings, its question among them, and to answer three questions from passages about other people, drawn anew each time.
The answer of a closed-book question can come from the weights only, that of an open-book question from the passage
only. One model, trained once; a seed draws the questions, the passages that perplexity is taken on, and the
calibration texts (32 passages and statements).

Arms: magnitude, random, Wanda and SparseGPT over ratios 0.1 to 0.7; 2:4 by all but random; round-to-nearest at 8, 4
and 3 bits in groups of 32, GPTQ at 4 and 3. Drops are relative to the dense model; a limit is the largest ratio up to
which the drop stays within 5 %. Nothing is chosen on the test questions: the methods have no rates.

Real part. Gemma-3-270M with its vocabulary cut to the prompts: real facts closed-book, invented people open-book,
perplexity on prose; dense; magnitude, Wanda and SparseGPT at 50 %; 8 and 4 bits in groups of 32, GPTQ at 4. Calibrated
on 32 texts of the training split.

Must be seen: closed-book accuracy falls at a sparsity where perplexity has moved by less than 5 %; open-book holds to
a higher ratio; 8 and 4 bits near dense; 2:4 worse than unstructured at 50 %; Wanda and SparseGPT above magnitude, in
accuracy and in perplexity, SparseGPT's at most Wanda's; random pruning far worse.

Smaller than the paper: models of 3M and 270M for 7B to 33B, ratios in steps of 10 %, three seeds, no judged
summaries. In the quick form the nursery's Llama stands in for Gemma.
"""

from __future__ import annotations

import copy
import functools
import itertools
import random
import statistics
from collections.abc import Sequence
from typing import Any

from gossamer.experiments.lab import Conclusion, Lab, MustSee, Results, t_interval

SEEDS = (0, 1, 2)
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "magnitude": {"system": "pruning", "method": "magnitude", "over": "ratio"},
    "random": {"system": "pruning", "method": "random", "over": "ratio"},
    "wanda": {"system": "pruning", "method": "wanda", "over": "ratio"},
    "sparsegpt": {"system": "pruning", "method": "sparsegpt", "over": "ratio"},
    "magnitude_2:4": {"system": "pruning", "method": "magnitude", "pattern": "2:4"},
    "wanda_2:4": {"system": "pruning", "method": "wanda", "pattern": "2:4"},
    "sparsegpt_2:4": {"system": "pruning", "method": "sparsegpt", "pattern": "2:4"},
    "int8": {"system": "rounding", "bits": 8, "group": 32},
    "int4": {"system": "rounding", "bits": 4, "group": 32},
    "int3": {"system": "rounding", "bits": 3, "group": 32},
    "gptq4": {"system": "gptq", "bits": 4, "group": 32},
    "gptq3": {"system": "gptq", "bits": 3, "group": 32},
    "gemma_dense": {},
    "gemma_magnitude": {"system": "pruning", "method": "magnitude"},
    "gemma_wanda": {"system": "pruning", "method": "wanda"},
    "gemma_sparsegpt": {"system": "pruning", "method": "sparsegpt"},
    "gemma_int8": {"system": "rounding", "bits": 8, "group": 32},
    "gemma_int4": {"system": "rounding", "bits": 4, "group": 32},
    "gemma_gptq4": {"system": "gptq", "bits": 4, "group": 32},
}
SCORED = ("magnitude", "wanda", "sparsegpt")
SWEPT = ("random", *SCORED)
TOLERANCE = 0.05
_PEOPLE, _STEPS, _LESSONS, _QUESTIONS, _PASSAGES, _REAL, _WIDTH = 120, 1500, 28, 64, 32, 24, 256
_CLOSED, _OPEN = "Answer these questions:\n\n", "Based on these texts, answer these questions:\n\n"


def run(arm: str, seed: int, lab: Lab) -> dict[str, float]:
    """closed, open (accuracy) and ppl; with ``@ratio`` behind the name where ratios are swept."""
    options = dict(ARMS[arm])
    name, over = options.pop("system", ""), options.pop("over", "")
    real = arm.startswith("gemma")
    score, base = (_real, _gemma(lab.quick)) if real else (_invented, _trained(lab.quick))
    texts = _learnt_prose(seed, lab.quick) if real else _calibration(seed, lab.quick)
    if not over:
        return score(_compressed(base, name, options, texts, seed), seed, lab)
    figures: dict[str, float] = {}
    for ratio in RATIOS[::3] if lab.quick else RATIOS:
        found = score(_compressed(base, name, {**options, over: ratio}, texts, seed), seed, lab)
        figures |= {f"{metric}@{ratio}": value for metric, value in found.items()}
    return figures


def conclude(results: Results) -> Conclusion:
    """Shown: over all methods but random, closed-book drops exceed open-book drops, with an interval above 0."""
    gaps = []
    for seed in sorted(results["dense"]):
        pairs = [
            _drop(results, arm, "closed", ratio, seed) - _drop(results, arm, "open", ratio, seed)
            for arm, ratio in itertools.product(SCORED, _ratios(results))
        ]
        gaps.append(statistics.fmean(pairs))
    gap, low, high = t_interval(gaps)
    dense = {metric: results.mean("dense", metric) for metric in ("closed", "open", "ppl")}
    hidden = _hidden(results)
    learnt = MustSee(
        "the dense model answers both, or nothing can fall",
        f"closed-book {dense['closed']:.1%}, open-book {dense['open']:.1%}",
        min(dense["closed"], dense["open"]) > 0.5,
    )
    limits = {(arm, metric): _limit(results, arm, metric) for arm in SWEPT for metric in dense}
    return Conclusion(
        shown=low > 0 and hidden.shown and learnt.shown,
        baseline=f"open-book accuracy of the dense model {dense['open']:.1%}, closed-book {dense['closed']:.1%}",
        result=f"pruned by scores, closed-book falls {gap:+.1%} further than open-book on average",
        effect=gap,
        low=low,
        high=high,
        unit="relative drop, closed less open",
        must_see=(
            learnt,
            hidden,
            *_limit_lines(limits),
            _bits_line(results),
            *_order_lines(results),
            _real_line(results),
        ),
        notes=tuple(
            f"{arm}: "
            + "; ".join(
                f"{ratio:g} closed {results.mean(arm, f'closed@{ratio}'):.2f} "
                f"open {results.mean(arm, f'open@{ratio}'):.2f} ppl {results.mean(arm, f'ppl@{ratio}'):.2f}"
                for ratio in _ratios(results)
            )
            for arm in SWEPT
        ),
    )


def _ratios(results: Results) -> list[float]:
    return [ratio for ratio in RATIOS if f"closed@{ratio}" in next(iter(results["wanda"].values()))]


def _drop(results: Results, arm: str, metric: str, ratio: float | None, seed: int) -> float:
    """Relative drop to dense, for perplexity the rise."""
    before = results["dense"][seed][metric]
    after = results[arm][seed][metric if ratio is None else f"{metric}@{ratio}"]
    fall = (before - after) / max(before, 1e-9)
    return -fall if metric == "ppl" else fall


def _mean_drop(results: Results, arm: str, metric: str, ratio: float | None = None) -> float:
    return statistics.fmean(_drop(results, arm, metric, ratio, seed) for seed in results["dense"])


def _limit(results: Results, arm: str, metric: str) -> float:
    """Largest ratio up to which the drop stays within the tolerance; 0 where the smallest is beyond it."""
    held = itertools.takewhile(lambda r: _mean_drop(results, arm, metric, r) <= TOLERANCE, _ratios(results))
    return max(held, default=0.0)


def _hidden(results: Results) -> MustSee:
    """The setting at which closed-book has fallen most while perplexity has moved by less than 5 %."""
    found = [
        (_mean_drop(results, arm, "closed", ratio), arm, ratio)
        for arm, ratio in itertools.product(SWEPT, _ratios(results))
        if _mean_drop(results, arm, "ppl", ratio) < 0.05
    ]
    text = "closed-book falls by more than 5 % at a sparsity where perplexity rose by less than 5 %"
    if not found:
        return MustSee(text, "perplexity rose by 5 % or more at every setting", False)
    drop, arm, ratio = max(found)
    rise = _mean_drop(results, arm, "ppl", ratio)
    return MustSee(text, f"{arm} at {ratio:g}: closed-book {-drop:+.1%}, perplexity {rise:+.1%}", drop > 0.05)


def _limit_lines(limits: dict[tuple[str, str], float]) -> list[MustSee]:
    return [
        MustSee(
            f"{arm}: open-book matches up to a higher ratio than closed-book",
            f"{limits[arm, 'open']:g} against {limits[arm, 'closed']:g} (perplexity: {limits[arm, 'ppl']:g})",
            limits[arm, "open"] > limits[arm, "closed"],
        )
        for arm in SCORED
    ]


def _bits_line(results: Results) -> MustSee:
    drops = {arm: _mean_drop(results, arm, "closed") for arm in ("int8", "int4", "int3", "gptq4", "gptq3")}
    figures = ", ".join(f"{arm} {-drop:+.1%}" for arm, drop in drops.items())
    return MustSee("8 and 4 bits: closed-book within 5 % of dense", figures, max(drops["int8"], drops["int4"]) <= 0.05)


def _order_lines(results: Results) -> list[MustSee]:
    half = 0.5 if 0.5 in _ratios(results) else _ratios(results)[-1]
    closed = {arm: results.mean(arm, f"closed@{half}") for arm in SWEPT}
    ppl = {arm: results.mean(arm, f"ppl@{half}") for arm in SWEPT}
    patterns = {arm: results.mean(f"{arm}_2:4", "closed") for arm in SCORED}
    lines = [
        MustSee(
            f"{arm}: 2:4 worse than unstructured at 50 %",
            f"closed-book {patterns[arm]:.3f} against {closed[arm]:.3f}",
            patterns[arm] < closed[arm],
        )
        for arm in patterns
    ]
    shown = ", ".join(f"{arm} {closed[arm]:.3f} (perplexity {ppl[arm]:.2f})" for arm in SWEPT)
    careful = ("wanda", "sparsegpt")
    lines += [
        MustSee(
            "Wanda and SparseGPT above magnitude at 50 %, closed-book",
            shown,
            min(closed[arm] for arm in careful) > closed["magnitude"],
        ),
        MustSee(
            "perplexity at 50 %: SparseGPT's at most Wanda's, and that below magnitude's",
            shown,
            ppl["sparsegpt"] <= ppl["wanda"] < ppl["magnitude"],
        ),
        MustSee(
            "random pruning is worse than all",
            shown,
            closed["random"] < min(closed[arm] for arm in SCORED) and ppl["random"] > max(ppl[arm] for arm in SCORED),
        ),
    ]
    return lines


def _real_line(results: Results) -> MustSee:
    arms = [arm for arm in ARMS if arm.startswith("gemma")]
    figures = ", ".join(
        f"{arm.removeprefix('gemma_')} {results.mean(arm, 'closed'):.2f}/{results.mean(arm, 'open'):.2f}/"
        f"{results.mean(arm, 'ppl'):.1f}"
        for arm in arms
    )
    ppl = {arm: results.mean(arm, "ppl") for arm in arms}
    pruned = max(ppl["gemma_wanda"], ppl["gemma_sparsegpt"]) < ppl["gemma_magnitude"]
    right = pruned and ppl["gemma_int8"] < 1.02 * ppl["gemma_dense"] and ppl["gemma_gptq4"] < ppl["gemma_int4"]
    text = "Gemma (closed/open/perplexity): Wanda and SparseGPT below magnitude, GPTQ below rounding, 8 bits as dense"
    return MustSee(text, figures, right)


def _compressed(
    base: tuple[Any, Any], name: str, options: dict[str, Any], texts: Sequence[str], seed: int
) -> tuple[Any, Any]:
    from gossamer.pipeline.single import system

    model, tokenizer = base
    if not name:
        return base
    data = [{"input_ids": tokenizer(text, return_tensors="pt")["input_ids"]} for text in texts]
    return system(name, seed=seed, **options).compress(copy.deepcopy(model), data).model, tokenizer


def _invented(pair: tuple[Any, Any], seed: int, lab: Lab) -> dict[str, float]:
    """Closed-book questions on the people it learnt, open-book ones on others, perplexity of passages on others."""
    from gossamer.parts.scorer import perplexity

    count = 8 if lab.quick else _QUESTIONS
    draw = random.Random(f"questions {seed}")
    world, others = _worlds(10_000 + seed)
    closed = [
        {"task": "closed_book", "question": world.question(fact), "answers": [fact.value]}
        for fact in draw.sample(world.facts, count)
    ]
    passages = others.rows(count, seed)
    opened = [
        {**{key: row[key] for key in ("question", "answers", "context")}, "task": "open_book"} for row in passages
    ]
    found = _battery(("closed_book", "open_book"), count, seed).evaluate(_bundle(pair), [*closed, *opened])
    ppl = perplexity(*pair, [row["context"] for row in passages]).ppl
    return {"closed": found.tasks["closed_book"].value, "open": found.tasks["open_book"].value, "ppl": ppl}


def _real(pair: tuple[Any, Any], seed: int, lab: Lab) -> dict[str, float]:
    """Real facts closed-book, invented people open-book, perplexity of prose."""
    from gossamer.parts.scorer import perplexity

    found = _battery(("closed_book", "retrieval"), 2 if lab.quick else _REAL, seed).evaluate(_bundle(pair))
    ppl = perplexity(*pair, list(_prose(seed, lab.quick))).ppl
    return {"closed": found.tasks["closed_book"].value, "open": found.tasks["retrieval"].value, "ppl": ppl}


def _battery(tasks: tuple[str, ...], count: int, seed: int) -> Any:
    from gossamer.evaluation.llm_kick import LLMKick

    return LLMKick(tasks=tasks, num_examples=count, new_tokens=8, seed=seed)


def _bundle(pair: tuple[Any, Any]) -> Any:
    from gossamer.core.bundle import Bundle

    return Bundle(*pair)


@functools.cache
def _gemma(quick: bool) -> tuple[Any, Any]:
    """Gemma-3-270M with its vocabulary cut to every prompt, answer and text of this experiment."""
    from gossamer.hub.models import load_model
    from gossamer.hub.nursery import load_nursery
    from gossamer.kinds.evaluation import ModelSubject
    from gossamer.parts.vocabulary import trim_vocabulary

    if quick:
        return load_nursery("llama-7m")
    model, tokenizer = load_model("gemma-3-270m", dtype="bfloat16")
    subject = ModelSubject(_bundle((model, tokenizer)))
    texts = [text for seed in SEEDS for text in (*_prose(seed, quick), *_learnt_prose(seed, quick))]
    for seed in SEEDS:
        asked = _battery(("closed_book", "retrieval"), _REAL, seed).requests(subject)
        texts += [part for one in asked for part in (one.prompt, one.reply)]
    trimmed = trim_vocabulary(model, tokenizer, texts)
    return trimmed.model.eval(), trimmed.tokenizer


@functools.cache
def _prose(seed: int, quick: bool) -> tuple[str, ...]:
    from gossamer.evaluation.llm_kick import prose

    return tuple(text[:800] for text in prose(seed, 2 if quick else 6))


@functools.cache
def _learnt_prose(seed: int, quick: bool) -> tuple[str, ...]:
    """Texts of the training split, for calibration."""
    from gossamer.hub.corpora import load_corpus

    rows = [row["text"] for row in load_corpus("english_prose", limit=4000).rows]
    texts = ["\n".join(rows[start : start + 8]) for start in range(0, len(rows) - 7, 8)]
    return tuple(text[:2400] for text in random.Random(f"prose {seed}").sample(texts, 4 if quick else _PASSAGES))


def _worlds(seed: int) -> tuple[Any, Any]:
    """The people whose facts are learnt, and among all others a world of ``seed``."""
    from gossamer.hub.worlds.facts import NAMES, World

    world = World(people=_PEOPLE, seed=0)
    known = set(world.people)
    return world, World(people=100, seed=seed, names=[name for name in NAMES if name not in known])


def _calibration(seed: int, quick: bool) -> list[str]:
    draw = random.Random(f"calibration {seed}")
    world, others = _worlds(20_000 + seed)
    return [_lesson(world, others, draw, closed=number % 2 == 0) for number in range(4 if quick else _PASSAGES)]


def _lesson(world: Any, others: Any, draw: random.Random, *, closed: bool) -> str:
    """A text to learn from: four closed-book sentences, one of them a question, or a passage and three questions."""
    if closed:
        facts = draw.sample(world.facts, 4)
        said = " ".join(draw.choice(world.statements(fact)) for fact in facts[:3])
        return f"{said}\n{_CLOSED}Q: {world.question(facts[3])}\nA: {facts[3].value}\n"
    told = others.told(draw.choice(others.facts), draw)
    asked = "".join(f"Q: {others.question(fact)}\nA: {fact.value}\n\n" for fact in draw.sample(told, 3))
    return f"{_OPEN}{others.passage(told, draw)}\n\n{asked}"


@functools.cache
def _trained(quick: bool) -> tuple[Any, Any]:
    """The Llama of the world part, trained once and kept."""
    from transformers import AutoModelForCausalLM

    from gossamer.core.paths import atomic_dir

    tokenizer, folder = _tokenizer(), Lab("llm_kick", quick=quick).folder() / "world"
    if not (folder / "config.json").exists():
        model = _train(tokenizer, 3 if quick else _STEPS)
        with atomic_dir(folder) as path:
            model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), tokenizer


def _train(tokenizer: Any, steps: int) -> Any:
    """Muon, since AdamW leaves both kinds of answers at chance for a thousand steps; the answers count once more beside
    the mean over all tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gossamer.parts.muon import muon

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=_WIDTH, intermediate_size=2 * _WIDTH, num_hidden_layers=4,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
            pad_token_id=0, tie_word_embeddings=True, initializer_range=0.04,
        )  # fmt: skip
        model: Any = LlamaForCausalLM(config)
        optimizer = muon(model, 4e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, 1.0, (steps - step) / (0.4 * steps))
        )
        draw, (answer, colon) = random.Random("lessons"), tokenizer.convert_tokens_to_ids(["A", ":"])
        for step in range(steps):
            world, others = _worlds(30_000 + step)
            texts = [_lesson(world, others, draw, closed=number % 5 < 3) for number in range(_LESSONS)]
            ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
            targets = ids[:, 1:]
            logits = model(input_ids=ids[:, :-1]).logits.float()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            real = targets != 0
            value = torch.zeros_like(real)  # what stands behind "A" and ":"
            value[:, 2:] = (targets[:, :-2] == answer) & (targets[:, 1:-1] == colon)
            loss = nll[real].mean() + nll[value].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 50 == 0:
                print(f"step {step} of {steps}: answers {float(nll[value].detach().mean()):.3f} nats", flush=True)
    return model.eval()


def _tokenizer() -> Any:
    """Words, marks and line breaks of the world as tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    draw, texts = random.Random(0), [_CLOSED, _OPEN]
    world, others = _worlds(0)
    for one in (world, others):
        texts += [text for fact in one.facts for text in (*one.statements(fact), one.question(fact), fact.value)]
    texts += [_lesson(world, others, draw, closed=False) for _ in range(50)]
    words = dict.fromkeys(word for text in texts for word, _ in split.pre_tokenize_str(text))
    special = ("<pad>", "<s>", "</s>", "<unk>")
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys((*special, "Q", "A", ":", *words)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = split
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
