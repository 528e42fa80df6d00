"""Runs a recipe: measures the untouched model, takes each step, measures the result, reports.

    RUN/recipe.yaml    resolved
    RUN/state.json     steps done, with what each changed
    RUN/arms/          one measured model a file
    RUN/stages/        the bundle after the last step, from which a run that was cut off goes on
    RUN/whole/         the model that a small copy stands for, until the run is done
    RUN/result/        the finished model (result/model loads with from_pretrained)
    RUN/report.html, report.json, log

Every step starts from a seed of its own, so a resumed run gives what an unbroken one gives.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.core.kinds import KINDS
from gossamer.core.paths import atomic_file, write_json
from gossamer.core.recipe import Recipe, StepCall, read_recipe, resolved
from gossamer.core.report import Report
from gossamer.hub.models import load_model, resolve
from gossamer.pipeline.arms import FEW_SHOT, RESULT, UNTOUCHED, is_task, measure_arm
from gossamer.pipeline.costs import measure_costs
from gossamer.pipeline.job import Job, Reporter, Silent
from gossamer.pipeline.reporting import build_report
from gossamer.pipeline.stage import WHOLE, is_adapted, load_bundle, save_bundle
from gossamer.pipeline.system_steps import take_system


def run(
    recipe: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> Report:
    """Check a recipe as a whole, run it in a new folder ``out`` and return its report."""
    checked = read_recipe(recipe, overrides)
    resolve(checked.model)  # a model that is not there is met before a folder is made
    folder = Path(out) if out is not None else _free_folder(recipe)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(
            str(folder),
            must="be a new folder",
            got="one with files in it",
            do="choose another --out, or go on with --resume",
        )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "recipe.yaml") as path:
        path.write_text(yaml.safe_dump(checked.as_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return _Run(checked, folder, reporter or Silent()).go()


def resume(folder: str | Path, *, reporter: Reporter | None = None) -> Report:
    """Go on with a run that was cut off; the report is the one an unbroken run gives (timings and memory apart)."""
    path = Path(folder) / "recipe.yaml"
    if not path.exists():
        raise InputError(
            str(folder),
            must="be the folder of a run",
            got="no recipe.yaml in it",
            do="give the folder that `gossamer run` named",
        )
    report = Path(folder) / "report.json"
    if report.exists():  # written last: the run is done
        return Report.from_dict(json.loads(report.read_text(encoding="utf-8")))
    return _Run(read_recipe(path), Path(folder), reporter or Silent()).go()


class _Run:
    def __init__(self, recipe: Recipe, folder: Path, reporter: Reporter) -> None:
        self.recipe, self.folder = recipe, folder
        self.reporter = _Logged(reporter, folder / "log")
        self.job = Job(recipe, folder, self.reporter, folder / "work")
        path = folder / "state.json"
        self.interrupted: list[int] = []
        self.done: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def go(self) -> Report:
        try:
            with _noticing(self.interrupted.append):
                return self._all()
        except KeyboardInterrupt:
            self.reporter.note(f"stopped; go on with: gossamer run --resume {self.folder}")
            raise

    def _all(self) -> Report:
        measured = self._measure_config()
        if measured is not None:
            self._untouched(measured)
        bundle = self._start()
        for index in range(len(self.done), len(self.recipe.steps)):
            bundle = self._take(index, bundle)
            if self.interrupted:
                raise KeyboardInterrupt
        if not any(step.name == "save" for step in self.recipe.steps):
            save_bundle(bundle, self.folder / RESULT, base=self.job.base, keep_base=True)
        if measured is not None:
            measure_arm(bundle, self.job, measured, RESULT)
            del bundle
            gc.collect()
            measure_costs(self.job, measured)
        report = build_report(self.job, self.done)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        shutil.rmtree(self.folder / "stages", ignore_errors=True)
        shutil.rmtree(self.folder / WHOLE, ignore_errors=True)
        self.reporter.note(f"done: {self.folder}")
        return report

    def _measure_config(self) -> Any:
        from gossamer.pipeline.steps.measure import MeasureConfig

        return None if self.recipe.measure is None else MeasureConfig(**self.recipe.measure)

    def _untouched(self, config: Any) -> None:
        """The model as it was, before anything is done to it."""
        names = [UNTOUCHED]
        if config.few_shot and "task" in config.quantities and is_task(self.job.data["test"]):
            names.append(FEW_SHOT)
        if all((self.folder / "arms" / f"{name}.json").exists() for name in names):
            return
        bundle = self._original()
        for name in names:
            measure_arm(bundle, self.job, config, name, shots=config.few_shot * (name == FEW_SHOT))

    def _original(self) -> Bundle:
        return Bundle(*load_model(self.recipe.model))

    def _start(self) -> Bundle:
        """The original model, or the bundle after the last step that was finished."""
        self.job.base = str(resolve(self.recipe.model).path)
        if not self.done:
            return self._original()
        self.reporter.note(f"going on after step {len(self.done)} ({self.done[-1]['step']})")
        for record in self.done:
            self.job.base = self._base_after(record)
        return load_bundle(self._stage(len(self.done) - 1), lambda: self.job.companions)

    def _take(self, index: int, bundle: Bundle) -> Bundle:
        call = self.recipe.steps[index]
        self.reporter.note(f"step {index + 1} of {len(self.recipe.steps)}: {call.name}")
        seed = self.recipe.seed * 1000 + index
        _seed_all(seed)
        base = self.job.base
        self.job.scratch = self.folder / "work" / f"{index + 1:02d}-{call.name}"
        before = _counts(bundle.model)
        start = time.perf_counter()
        bundle, notes = self._apply(call, bundle, seed)
        curve = notes.pop("curve", [])
        record = {
            "step": call.name,
            "options": resolved(call.entry, call.options),
            "seed": seed,
            "changed": {**_changes(before, _counts(bundle.model)), **notes},
            "curve": curve,
            "version": _version(call.entry.origin),
        }
        bundle.lineage.append({key: record[key] for key in ("step", "options", "seed", "version")})
        self._keep(index, bundle)
        record["seconds"] = round(time.perf_counter() - start, 1)
        record["adapted"] = is_adapted(bundle.model)
        if self.job.base != base:
            record["base"] = self.job.base
        self.job.base = self._base_after({**record, "index": index})
        self.done.append({**record, "index": index})
        write_json(self.folder / "state.json", self.done)
        self._clean(index)
        return bundle

    def _apply(self, call: StepCall, bundle: Bundle, seed: int) -> tuple[Bundle, dict[str, Any]]:
        if call.entry.kind in KINDS:
            return take_system(call, bundle, self.job, seed)
        module_class = call.entry.load()
        config = module_class.config_class.build(call.options, call.name)
        step = module_class(config, seed=seed)
        bundle = step.apply(bundle, self.job)
        return bundle, step.notes

    def _stage(self, index: int) -> Path:
        return self.folder / "stages" / f"{index + 1:02d}-{self.recipe.steps[index].name}"

    def _keep(self, index: int, bundle: Bundle) -> None:
        save_bundle(bundle, self._stage(index), base=self.job.base)

    def _base_after(self, record: dict[str, Any]) -> str:
        """Where the plain model lies after this step: an attached adapter leaves it where it was, or was moved to."""
        return record.get("base", self.job.base) if record["adapted"] else str(self._stage(record["index"]) / "model")

    def _clean(self, index: int) -> None:
        """Remove stages that nothing refers to any more, and the step's scratch folder."""
        wanted = {self._stage(index), Path(self.job.base).parent}
        for stage in (self.folder / "stages").iterdir():
            if stage not in wanted:
                shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(self.job.scratch, ignore_errors=True)


@contextlib.contextmanager
def _noticing(note: Callable[[int], None]) -> Iterator[None]:
    """Remember ctrl-C as well as raising it: libraries swallow a KeyboardInterrupt that meets them at a bad moment."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inner = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        note(number)
        if callable(inner):
            inner(number, frame)

    signal.signal(signal.SIGINT, handle if callable(inner) else inner)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, inner)


class _Logged:
    """Passes on to a reporter and keeps the notes in the run's log."""

    def __init__(self, inner: Reporter, path: Path) -> None:
        self.inner, self.path = inner, path

    def task(self, label: str) -> Any:
        return self.inner.task(label)

    def note(self, text: str) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        self.inner.note(text)


def _free_folder(recipe: str | Path | Mapping[str, Any]) -> Path:
    stem = "run" if isinstance(recipe, Mapping) else Path(recipe).stem
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


def _seed_all(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _counts(model: Any) -> dict[str, int]:
    from gossamer.parts.measure import parameters

    found = parameters(model)
    counts = {"parameters": found["total"], "bytes": found["bytes"]}
    # without an adapter, what requires a gradient says how the model was loaded, not what was done to it
    return {**counts, "trainable": found["trainable"]} if is_adapted(model) else counts


def _changes(before: dict[str, int], after: dict[str, int]) -> dict[str, list[int]]:
    return {key: [before.get(key, 0), count] for key, count in after.items() if before.get(key) != count}


def _version(distribution: str) -> str:
    from importlib.metadata import version

    return version(distribution)
