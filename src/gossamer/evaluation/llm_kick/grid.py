"""The grid: compressors over ratios, each cell the battery on a freshly compressed model, and what follows from it.

    drop = (dense - cell) / dense,  for perplexity (cell - dense) / dense
    matching limit of (compressor, task): the strongest setting whose drop, and that of every milder one, is within
    the tolerance; None where the mildest is beyond it already; no figure where the dense model is at chance

``write`` leaves grid.json, grid.csv, verdict.md, drops.svg and asked.jsonl (prompts with what was said) in a folder.
A sweep with a folder keeps each cell as it comes and goes on where it was cut off.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gossamer.core import registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.core.paths import atomic_file, write_json
from gossamer.kinds.evaluation import Evaluation

DENSE = "dense"
PERPLEXITY = "perplexity"
Cell = dict[str, Any]  # Scores.as_dict()


@dataclasses.dataclass(frozen=True)
class Compressor:
    """A compression ``system`` whose option ``over`` takes ``values``, from the mildest to the strongest."""

    label: str
    system: str
    over: str
    values: tuple[Any, ...]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Grid:
    """``cells[label][place]`` belongs to ``compressors``' value at that place; ``dense`` to the untouched model."""

    dense: Cell
    compressors: tuple[Compressor, ...]
    cells: dict[str, list[Cell]]
    tolerance: float = 0.05

    @property
    def tasks(self) -> list[str]:
        return list(self.dense["tasks"])

    def informative(self, task: str) -> bool:
        """Whether the dense model does better than chance."""
        return bool(self.dense["tasks"][task]["informative"]) and self.dense["tasks"][task]["value"] != 0

    def drop(self, label: str, place: int, task: str) -> float | None:
        """Relative drop to dense; None where the task is uninformative."""
        if not self.informative(task):
            return None
        before, after = (cell["tasks"][task] for cell in (self.dense, self.cells[label][place]))
        fall = (before["value"] - after["value"]) / before["value"]
        return -fall if before["better"] == "lower" else fall

    def limit(self, label: str, task: str) -> Any | None:
        """The strongest matching setting; see the head of this file."""
        found = None
        for place, value in enumerate(self._compressor(label).values):
            drop = self.drop(label, place, task)
            if drop is None or drop > self.tolerance:
                break
            found = value
        return found

    def ranks(self, task: str) -> dict[Any, list[str]]:
        """Setting -> compressors from the best score on, where two or more of them share the option and the setting."""
        sign = -1 if self.dense["tasks"][task]["better"] == "higher" else 1
        shared: dict[tuple[str, Any], list[tuple[float, str]]] = {}
        for one in self.compressors:
            for place, value in enumerate(one.values):
                score = self.cells[one.label][place]["tasks"][task]["value"]
                shared.setdefault((one.over, value), []).append((sign * score, one.label))
        return {
            f"{over}={value}": [label for _, label in sorted(found)]
            for (over, value), found in shared.items()
            if len(found) > 1
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each compressor, setting and task, the dense model's first."""
        for label, over, value, place in self._places():
            cell = self.dense if place is None else self.cells[label][place]
            for task in self.tasks:
                one = cell["tasks"][task]
                drop = 0.0 if place is None else self.drop(label, place, task)
                fields = {key: one[key] for key in ("value", "low", "high", "n", "chance")}
                told = {"compressor": label, "option": over, "setting": value, "task": task}
                yield {**told, **fields, "drop": drop, "informative": self.informative(task)}

    def markdown(self) -> str:
        """Verdict: matching limits by task and compressor, ranks, and what says nothing."""
        head = ["task", "dense", "chance", *(f"{one.label} ({one.over})" for one in self.compressors)]
        lines = [
            f"# Matching limits at a relative drop of {self.tolerance:.0%}",
            "",
            _line(head),
            _line(["---"] * len(head)),
        ]
        for task in self.tasks:
            one = self.dense["tasks"][task]
            limits = [self._limit_text(compressor.label, task) for compressor in self.compressors]
            chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
            shown = f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
            lines.append(_line([task, shown, chance, *limits]))
        lines += ["", "A limit is the strongest setting up to which the drop stays within the tolerance.", ""]
        for task in self.tasks:
            for setting, labels in self.ranks(task).items() if self.informative(task) else ():
                lines.append(f"- {task}, {setting}: {' > '.join(labels)}")
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without what was asked."""
        bare = [{key: cell[key] for key in ("tasks", "values")} for cell in (self.dense, *self._all())]
        cells = iter(bare[1:])
        return {
            "tolerance": self.tolerance,
            "compressors": [{**dataclasses.asdict(one), "options": dict(one.options)} for one in self.compressors],
            "dense": bare[0],
            "cells": {one.label: [next(cells) for _ in one.values] for one in self.compressors},
            "limits": {
                one.label: {task: self.limit(one.label, task) for task in self.tasks} for one in self.compressors
            },
        }

    def write(self, folder: Path) -> None:
        """See the head of this file."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "grid.json", self.as_dict())
        rows = list(self.rows())
        with atomic_file(folder / "grid.csv") as path, open(path, "w", newline="", encoding="utf-8") as stream:
            table = csv.DictWriter(stream, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        with atomic_file(folder / "asked.jsonl") as path, open(path, "w", encoding="utf-8") as stream:
            for label, _, value, place in self._places():
                for asked in (self.dense if place is None else self.cells[label][place])["asked"]:
                    stream.write(
                        json.dumps({"compressor": label, "setting": value, **asked}, ensure_ascii=False) + "\n"
                    )
        with atomic_file(folder / "verdict.md") as path:
            path.write_text(self.markdown(), encoding="utf-8")
        with atomic_file(folder / "drops.svg") as path:
            self._draw(path)

    def _draw(self, path: Path) -> None:
        """Relative drop over the settings, a panel a compressor, a line a task."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2 * len(self.compressors), 3.6), layout="constrained")
        panels = figure.subplots(1, len(self.compressors), squeeze=False, sharey=True)[0]
        for panel, one in zip(panels, self.compressors, strict=True):
            for task in filter(self.informative, self.tasks):
                drops = [self.drop(one.label, place, task) for place in range(len(one.values))]
                style = "--" if task == PERPLEXITY else "-"
                panel.plot([str(value) for value in one.values], drops, style, marker="o", markersize=3, label=task)
            panel.axhline(self.tolerance, color="grey", linewidth=0.8)
            panel.set(title=one.label, xlabel=one.over, ylim=(-0.1, 1.05))
        panels[0].set_ylabel("relative drop to dense")
        panels[-1].legend(fontsize=7)
        figure.savefig(path, format="svg")

    def _places(self) -> Iterator[tuple[str, str, Any, int | None]]:
        yield DENSE, "", "", None
        for one in self.compressors:
            for place, value in enumerate(one.values):
                yield one.label, one.over, value, place

    def _all(self) -> Iterator[Cell]:
        for one in self.compressors:
            yield from self.cells[one.label]

    def _compressor(self, label: str) -> Compressor:
        return next(one for one in self.compressors if one.label == label)

    def _limit_text(self, label: str, task: str) -> str:
        if not self.informative(task):
            return "uninformative"
        found = self.limit(label, task)
        return "none" if found is None else str(found)


def sweep(
    load: Callable[[], Bundle | tuple[Any, Any]],
    compressors: Sequence[Compressor],
    evaluation: Evaluation,
    data: Any = None,
    *,
    calibration: Any = None,
    folder: Path | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Grid:
    """Evaluate the model that ``load`` gives, untouched and after each compressor at each setting.

    ``load`` must give a fresh model each time, with its tokenizer or as a bundle; ``calibration`` is the compressors'
    data; seeds are the evaluation's. Every option is checked before the first model is loaded.
    """
    labels = [one.label for one in compressors]
    if len(set(labels)) < len(labels) or DENSE in labels or not labels:
        raise InputError("compressors", must=f"have labels of their own, none of them {DENSE!r}", got=labels)
    systems = {one.label: [_system(one, value, evaluation.seed) for value in one.values] for one in compressors}

    def cell(label: str, place: int | None) -> Cell:
        path = None if folder is None else folder / "cells" / f"{_key(evaluation, compressors, label, place)}.json"
        if path is not None and path.exists():
            kept: Cell = json.loads(path.read_text(encoding="utf-8"))
            return kept
        loaded = load()
        bundle = loaded if isinstance(loaded, Bundle) else Bundle(*loaded)
        if place is not None:
            bundle.model = systems[label][place].compress(bundle.model, calibration).model
        found = evaluation.evaluate(bundle, data).as_dict()
        note(label if place is None else f"{label}, setting {place + 1} of {len(systems[label])}")
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        return found

    dense = cell(DENSE, None)
    cells = {one.label: [cell(one.label, place) for place in range(len(one.values))] for one in compressors}
    return Grid(dense, tuple(compressors), cells, getattr(evaluation.config, "tolerance", Grid.tolerance))


def _system(one: Compressor, value: Any, seed: int) -> Any:
    if not one.values:
        raise OptionError(f"compressor {one.label}: values", must="hold at least one setting", got="none")
    return registry.find(one.system, kind="compression").load()(seed=seed, **{**one.options, one.over: value})


def _key(evaluation: Evaluation, compressors: Sequence[Compressor], label: str, place: int | None) -> str:
    """Names a cell by all that it follows from but the model and the data, which are the folder's."""
    one = next((one for one in compressors if one.label == label), None)
    setting = None if one is None or place is None else (one.system, one.over, one.values[place], dict(one.options))
    about = json.dumps(
        [evaluation.name, evaluation.config.as_dict(), evaluation.seed, setting], sort_keys=True, default=str
    )
    return f"{label}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
