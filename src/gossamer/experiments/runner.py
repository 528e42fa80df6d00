"""Runs an experiment arm by arm, resumes it, and writes the evidence."""

from __future__ import annotations

import datetime
import importlib
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.core.errors import GossamerError, InputError
from gossamer.core.evidence import code_hash, evidence_path, experiment_path, parts_hash, read_evidence
from gossamer.core.paths import cache_dir, write_json
from gossamer.experiments.lab import Conclusion, Lab, Results

_TIMED = re.compile(r"(^|_)(ms|s|seconds|speed|memory|rss)(_|$)")


def prove(name: str, *, quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the experiment of system ``name`` and return its evidence.

    The full run writes the evidence. ``quick`` runs the same arms at tiny size, from nothing kept. Of evidence that is
    current its figures are noted; evidence that awaits a recheck is confirmed where they are those noted before the
    change, or where the effect points the same way.
    """
    entry = registry.find(name)
    if not experiment_path(entry).exists():
        reason = "it is a baseline without a claim" if entry.card.builtin else "write " + str(experiment_path(entry))
        raise InputError(f"prove {name}", must="have an experiment", do=reason)
    module = importlib.import_module(f"gossamer.experiments.{entry.kind}.{entry.name}")
    code, parts = code_hash(entry), parts_hash(entry)
    folder = cache_dir("prove", name, f"{code}-{parts}-{_device()['id']}", "quick" if quick else "full")
    lab = Lab(name, quick=quick, log=log)
    if quick and not any(folder.iterdir()):
        shutil.rmtree(lab.folder(), ignore_errors=True)
    table = _table(module, lab, folder, log)
    conclusion = module.conclude(Results(table))
    if (code, parts) != (code_hash(entry), parts_hash(entry)):
        raise GossamerError(
            f"prove {name}", must="run on one version of the code", got="files changed meanwhile", do="run again"
        )
    evidence = _evidence(entry, module, table, conclusion)
    if not quick:
        write_json(evidence_path(entry), evidence)
    else:
        _confirm(entry, evidence, _untimed(table), log)
    return evidence


def _table(
    module: ModuleType, lab: Lab, folder: Path, log: Callable[[str], None]
) -> dict[str, dict[int, dict[str, Any]]]:
    import json

    seeds = module.SEEDS[:1] if lab.quick else module.SEEDS
    table: dict[str, dict[int, dict[str, Any]]] = {}
    # seeds outside: after the first seed every arm has a figure
    for seed in seeds:
        for arm in module.ARMS:
            path = folder / f"{arm}-{seed}.json"
            if not path.exists():
                start = time.perf_counter()
                figures = module.run(arm, seed, lab)
                write_json(path, {**figures, "seconds": round(time.perf_counter() - start, 1)})
            table.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))
            log(f"{lab.name} {arm} seed {seed}: " + _line(table[arm][seed]))
    return table


def _line(figures: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items() if isinstance(value, int | float))


def _evidence(
    entry: Entry, module: ModuleType, table: dict[str, dict[int, dict[str, Any]]], conclusion: Conclusion
) -> dict[str, Any]:
    seconds = sum(figures["seconds"] for by_seed in table.values() for figures in by_seed.values())
    return {
        "name": entry.name,
        "kind": entry.kind,
        "claim": entry.card.claim,
        "shown": conclusion.shown,
        "effect": conclusion.effect,
        "interval": [_finite(conclusion.low), _finite(conclusion.high)],
        "unit": conclusion.unit,
        "baseline": conclusion.baseline,
        "result": conclusion.result,
        "must_see": [{"text": line.text, "figures": line.figures, "shown": line.shown} for line in conclusion.must_see],
        "notes": list(conclusion.notes),
        "arms": module.ARMS,
        "seeds": sorted({seed for by_seed in table.values() for seed in by_seed}),
        "figures": {arm: {str(seed): figures for seed, figures in by_seed.items()} for arm, by_seed in table.items()},
        "date": datetime.date.today().isoformat(),
        "device": _device()["text"],
        "seconds": round(seconds, 1),
        "versions": _versions(),
        "code_hash": code_hash(entry),
        "parts_hash": parts_hash(entry),
    }


def _confirm(entry: Entry, quick: dict[str, Any], figures: dict[str, Any], log: Callable[[str], None]) -> None:
    """See :func:`prove`."""
    recorded = read_evidence(entry)
    if recorded is None or recorded["code_hash"] != quick["code_hash"]:
        return
    if recorded["parts_hash"] == quick["parts_hash"]:
        if recorded.get("quick") != figures:
            write_json(evidence_path(entry), {**recorded, "quick": figures})
        return
    same = recorded.get("quick") == figures
    if not same and quick["effect"] * recorded["effect"] <= 0:
        effects = f"{quick['effect']:.3g}, recorded {recorded['effect']:.3g}"
        log(f"{entry.name}: the quick effect does not point as recorded ({effects}); prove it in full")
        return
    recheck = {"date": quick["date"], "effect": quick["effect"], "same_figures": same,
               "parts_hash_before": recorded["parts_hash"]}  # fmt: skip
    write_json(
        evidence_path(entry), {**recorded, "parts_hash": quick["parts_hash"], "recheck": recheck, "quick": figures}
    )
    log(f"{entry.name}: confirmed on the changed parts")


def _untimed(table: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, str]]:
    """Six digits of every figure of the first seed that is no time, speed or size of memory, by arm."""
    return {
        arm: {key: f"{value:.6g}" for key, value in next(iter(by_seed.values())).items()
              if isinstance(value, int | float) and not _TIMED.search(key)}
        for arm, by_seed in table.items()
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _device() -> dict[str, str]:
    from gossamer.parts.measure import environment

    found = environment()
    text = str(found["device"])
    return {"text": text, "id": "".join(char for char in text if char.isalnum())[:40]}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("gossamer", "torch", "transformers", "peft")}
