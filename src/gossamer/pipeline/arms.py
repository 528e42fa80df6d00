"""Arms: one model measured on the recipe's test rows, kept as JSON in the run folder so that a resumed run has it.

All arms get the same prompts, the same token budget and the same cut (first line), and are compared item by item.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.core.paths import write_json
from gossamer.pipeline.job import Job, Row
from gossamer.pipeline.probe_texts import row_text

UNTOUCHED, FEW_SHOT, RESULT, GGUF = "untouched", "few_shot", "result", "gguf"
LABELS = {UNTOUCHED: "untouched, zero-shot", FEW_SHOT: "untouched, few-shot", RESULT: "result", GGUF: "GGUF source"}


def arm_path(job: Job, name: str) -> Path:
    return job.folder / "arms" / f"{name}.json"


def read_arm(job: Job, name: str) -> dict[str, Any]:
    return json.loads(arm_path(job, name).read_text(encoding="utf-8"))


def measure_arm(bundle: Bundle, job: Job, config: Any, name: str, *, shots: int = 0) -> None:
    """Measure task, perplexity and evaluations as ``config.quantities`` asks; nothing when it is done already."""
    if arm_path(job, name).exists():
        return
    start = time.perf_counter()
    record: dict[str, Any] = {"name": name, "label": LABELS.get(name, name), "shots": shots, "values": {}, "scores": {}}
    if "task" in config.quantities and is_task(job.data["test"]):
        record |= _task(bundle, job, config, name, shots)
    if "perplexity" in config.quantities and shots == 0:
        record["values"] |= _perplexity(bundle.model, bundle.processor, job)
    if shots == 0:
        record["evaluations"] = evaluated(bundle, job, config, name)
    record["seconds"] = round(time.perf_counter() - start, 1)
    write_json(arm_path(job, name), record)


def evaluated(bundle: Bundle, job: Job, config: Any, name: str) -> dict[str, Any]:
    """What each evaluation among the quantities gives, by its name."""
    found = {}
    for quantity in config.quantities:
        entry = registry.systems().get(quantity)
        if entry is None:
            continue
        companions = job.companions if any(spec.companion for spec in entry.options) else {}
        options = config.evaluations.get(quantity, {})
        system = entry.load()(seed=job.recipe.seed, companions=companions, **options)
        system.batch_size = config.batch_size
        system.progress = job.reporter.task(f"{quantity}, {LABELS.get(name, name)}")
        found[quantity] = system.evaluate(bundle, config.questions).as_dict()
    return found


def is_task(rows: list[Row]) -> bool:
    """Whether the rows have an answer to compare with."""
    return "text" not in rows[0]


def prompt_and_answer(row: Row) -> tuple[str | list[dict[str, str]], str]:
    """What the model is given and what it should say."""
    if "messages" in row:
        messages = row["messages"]
        if messages[-1]["role"] != "assistant":
            raise InputError("test row", must="end with an assistant turn", got=messages[-1]["role"])
        return messages[:-1], messages[-1]["content"]
    return row["prompt"], row["completion"] if "completion" in row else row["chosen"]


def _task(bundle: Bundle, job: Job, config: Any, name: str, shots: int) -> dict[str, Any]:
    from gossamer.kinds.decoding import Decoding
    from gossamer.parts.generation import few_shot_prompt, generate_texts
    from gossamer.parts.metrics import cut_first_line, score_texts

    tokenizer = bundle.processor
    decoders = [part for part in bundle.parts.values() if isinstance(part, Decoding)]
    ways: dict[str, Any] = {"custom_generate": decoders[-1].custom_generate(tokenizer)} if decoders else {}
    pairs = [prompt_and_answer(row) for row in job.data["test"]]
    prompts = [_render(prompt, tokenizer) for prompt, _ in pairs]
    if shots:
        examples = [(_render(prompt, tokenizer), answer.rstrip("\n")) for prompt, answer in _examples(job, shots)]
        prompts = [few_shot_prompt(examples, prompt) for prompt in prompts]
    outputs = generate_texts(
        bundle.model,
        tokenizer,
        prompts,
        max_new_tokens=config.new_tokens,
        batch_size=config.batch_size,
        progress=job.reporter.task(f"answers, {LABELS.get(name, name)}"),
        **ways,
    )
    references = [answer for _, answer in pairs]
    scores = {metric: values.round(3).tolist() for metric, values in score_texts(outputs, references).items()}
    return {"scores": scores, "outputs": [cut_first_line(text) for text in outputs]}


def _examples(job: Job, shots: int) -> list[tuple[Any, str]]:
    """Worked examples from the train split: drawn by the run's seed among the shorter half, for they cost prompt."""
    rows = sorted(job.data["train"], key=lambda row: len(row_text(row)))
    drawn = np.random.default_rng(job.recipe.seed).choice(max(shots, len(rows) // 2), size=shots, replace=False)
    return [prompt_and_answer(rows[place]) for place in drawn]


def _render(prompt: str | list[dict[str, str]], tokenizer: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    from gossamer.parts.data import render

    text = render(prompt, tokenizer, add_generation_prompt=True)
    # the tokenizer puts its own bos first
    return text.removeprefix(tokenizer.bos_token or "")


def _perplexity(model: Any, tokenizer: Any, job: Job) -> dict[str, float]:
    """Held-out perplexity per token of the untouched tokenizer, so that trimmed vocabularies compare."""
    from gossamer.parts.scorer import perplexity

    found = perplexity(model, tokenizer, [row_text(row) for row in job.data["test"]], max_length=512)
    path = arm_path(job, UNTOUCHED)
    tokens = read_arm(job, UNTOUCHED)["values"]["scored_tokens"] if path.exists() else found.tokens
    nll = found.nll_per_token * found.tokens
    return {"perplexity": math.exp(nll / tokens), "bits_per_byte": found.bits_per_byte, "scored_tokens": found.tokens}
