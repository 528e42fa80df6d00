"""What the untouched model and the result cost: bytes on disk, resident memory, decoding speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.core.paths import write_json
from gossamer.pipeline.arms import GGUF, RESULT, UNTOUCHED, prompt_and_answer
from gossamer.pipeline.job import Job


def measure_costs(job: Job, config: Any) -> None:
    """Write ``arms/costs.json``: name of the arm -> metric -> value or [value, low, high]."""
    from gossamer.hub.models import resolve

    path = job.folder / "arms" / "costs.json"
    if path.exists():
        return
    origin = resolve(job.recipe.model)
    folders = {UNTOUCHED: origin.path, RESULT: job.folder / "result" / "model"}
    costs: dict[str, dict[str, Any]] = {name: {} for name in folders}
    models = {name: _load(folder) for name, folder in folders.items() if folder.exists()}
    if "size" in config.quantities:
        for name, (model, _) in models.items():
            costs[name] |= _sizes(folders[name], model)
        if origin.gguf_bytes:
            costs[GGUF] = {"total_bytes": origin.gguf_bytes, "weights_bytes": origin.gguf_bytes}
    if "decode_speed" in config.quantities:
        for name, speed in _speeds(models, job, config).items():
            costs[name] |= speed
    del models
    if "memory" in config.quantities:
        tick = job.reporter.task("memory of a fresh process")
        for number, (name, folder) in enumerate(folders.items(), 1):
            costs[name] |= _memory(folder, job, config)
            tick(number, len(folders))
    write_json(path, costs)


def read_costs(job: Job) -> dict[str, dict[str, Any]]:
    path = job.folder / "arms" / "costs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _load(folder: Path) -> tuple[Any, Any]:
    from gossamer.hub.models import load_model

    return load_model(str(folder))


def _sizes(folder: Path, model: Any) -> dict[str, Any]:
    from gossamer.parts.measure import parameters, size_on_disk

    count = parameters(model)["total"]
    found = size_on_disk(folder, count)
    return {
        "total_bytes": found.total_bytes,
        "weights_bytes": found.weights_bytes,
        "tokenizer_bytes": found.tokenizer_bytes,
        "other_bytes": found.other_bytes,
        "parameters": count,
        "bits_per_weight": found.bits_per_weight,
    }


def _speeds(models: dict[str, tuple[Any, Any]], job: Job, config: Any) -> dict[str, dict[str, Any]]:
    from gossamer.parts.measure import decode_speed, runner_timer

    job.reporter.task("decoding speed")(0, 1)
    arms = {name: runner_timer(*loaded, _prompt(job)) for name, loaded in models.items()}
    found = decode_speed(arms, "", new_tokens=config.new_tokens + 8, rounds=config.rounds)
    job.reporter.task("decoding speed")(1, 1)
    return {
        name: {
            "tokens_per_s": [speed.tokens_per_s, speed.low, speed.high],
            "ms_per_token": speed.ms_per_token,
            "first_token_ms": speed.first_token_ms,
        }
        for name, speed in found.items()
    }


def _memory(folder: Path, job: Job, config: Any) -> dict[str, Any]:
    from gossamer.parts.measure import peak_memory

    found = peak_memory(folder, prompt=_prompt(job), new_tokens=config.new_tokens)
    return {"peak_rss_bytes": found.peak_rss_bytes, "net_rss_bytes": found.net_rss_bytes}


def _prompt(job: Job) -> str:
    if job.recipe.data is None:
        return "The"
    row = job.data["test"][0]
    prompt = row["text"][:200] if "text" in row else prompt_and_answer(row)[0]
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
