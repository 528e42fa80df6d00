"""Recipes: a model, data, a seed and steps in YAML, checked as a whole before anything loads.

model: gemma-3-270m
data: {name: python_functions, train: 1200, test: 96}
steps:
  - mos: {rank: 8}
  - train: {steps: 80}
measure: [perplexity, task, size]
budget: {size_mb: 200}
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from gossamer.core import facts, registry
from gossamer.core.card import Entry
from gossamer.core.errors import InputError, OptionError, UsageError, did_you_mean
from gossamer.core.kinds import KINDS
from gossamer.core.options import Config, check_options, option


class DataConfig(Config):
    """The ``data:`` block."""

    name: str | None = option(None, "a packaged corpus, such as python_functions")
    path: str | None = option(None, "a file or folder of rows: JSONL, JSON, CSV or Parquet, or a hub id")
    train: int | None = option(None, "how many rows to train on; all where not given", ge=1)
    validation: int = option(64, "how many rows to hold out for perplexity", ge=1)
    test: int = option(96, "how many rows the task is measured on", ge=1)


class BudgetConfig(Config):
    """The ``budget:`` block: bounds that the run must meet."""

    size_mb: float | None = option(None, "bytes on disk of the result, in 10^6", gt=0)
    memory_mb: float | None = option(None, "peak resident memory of a fresh process that generates, in 10^6", gt=0)
    task_drop: float | None = option(
        None, "how far the task score may fall below the best untouched arm, 0 to 1", ge=0, le=1
    )
    tokens_per_s: float | None = option(None, "least decoding speed at batch 1", gt=0)


class RecipeError(UsageError):
    """Everything that is wrong with a recipe, all at once."""

    def __init__(self, where: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(where if len(problems) > 1 else f"{where}: {problems[0]}")
        if len(problems) > 1:
            self.args = (where + ": " + "".join(f"\n  {number}. {text}" for number, text in enumerate(problems, 1)),)


@dataclasses.dataclass(frozen=True)
class StepCall:
    """One step with its options in stored form (defaults not added)."""

    name: str
    options: dict[str, Any]
    entry: Entry


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe that passed every check."""

    model: str
    data: DataConfig | None
    seed: int
    steps: tuple[StepCall, ...]
    measure: dict[str, Any] | None  # options of the measure step; None: measure nothing
    budget: BudgetConfig
    models: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """The resolved recipe: every option of every step, as it can be run again."""
        return {
            "model": self.model,
            **({"data": _given(self.data.as_dict())} if self.data else {}),
            "seed": self.seed,
            "steps": [{step.name: _plain(resolved(step.entry, step.options))} for step in self.steps],
            **({"measure": _plain(self.measure)} if self.measure is not None else {}),
            **({"budget": budget} if (budget := _given(self.budget.as_dict())) else {}),
            **({"models": self.models} if self.models else {}),
        }


_KEYS = ("model", "data", "seed", "steps", "measure", "budget", "models")


def read_recipe(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe from a path or a mapping; :class:`RecipeError` lists every problem."""
    where, raw = (
        ("recipe", copy.deepcopy(dict(source)))
        if isinstance(source, Mapping)
        else (str(source), _load_yaml(Path(source)))
    )
    for dotted, value in (overrides or {}).items():
        _override(raw, dotted, value)
    return _Checker(where, raw).recipe()


def parse_value(text: str) -> Any:
    """A value as written on the command line: ``--set seed=1``."""
    return yaml.load(text, Loader=_Loader)


def resolved(entry: Entry, options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of ``entry``, with defaults where none is given."""
    return {spec.name: options.get(spec.name, spec.default) for spec in entry.options}


class _Checker:
    """Collects the problems of one recipe."""

    def __init__(self, where: str, raw: dict[str, Any]) -> None:
        self.where, self.raw = where, raw
        self.problems: list[str] = []

    def recipe(self) -> Recipe:
        raw = self.raw
        for key in raw:
            if key not in _KEYS:
                self.problems.append(f"{key!r} is no key of a recipe; {did_you_mean(str(key), _KEYS)}")
        model = self._typed("model", str, required=True)
        seed = self._typed("seed", int) or 0
        models = self._typed("models", dict) or {}
        data = self._config("data", DataConfig)
        budget = self._config("budget", BudgetConfig) or BudgetConfig()
        if data is not None and (data.name is None) == (data.path is None):
            self.problems.append("data: give either a name (a packaged corpus) or a path")
        steps = tuple(self._steps(models))
        measure = self._measure()
        if not self.problems:
            self._order(steps, str(model))
        if self.problems:
            raise RecipeError(self.where, self.problems)
        return Recipe(str(model), data, seed, steps, measure, budget, models)

    def _typed(self, key: str, kind: type, *, required: bool = False) -> Any:
        value = self.raw.get(key)
        if value is None:
            if required:
                self.problems.append(f"{key!r} is missing; give a name, a folder or a hub id")
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            self.problems.append(f"{key}: must be {kind.__name__}, got {value!r}")
            return None
        return value

    def _config(self, key: str, config: type[Config]) -> Any:
        value = self._typed(key, dict)
        if value is None:
            return None
        try:
            return config.build(value, key)
        except OptionError as error:
            self.problems.append(str(error))
            return None

    def _measure(self) -> dict[str, Any] | None:
        value = self.raw.get("measure")
        if value is None:
            return None
        entry = registry.steps()["measure"]
        options = {"quantities": value} if isinstance(value, list) else value
        if not isinstance(options, dict):
            self.problems.append(f"measure: must be a list of quantities or a mapping, got {value!r}")
            return None
        try:
            return resolved(entry, check_options(options, entry.options, "measure"))
        except OptionError as error:
            self.problems.append(str(error))
            return None

    def _steps(self, models: dict[str, str]) -> Iterator[StepCall]:
        raw = self.raw.get("steps", [])
        if not isinstance(raw, list):
            self.problems.append(f"steps: must be a list, got {type(raw).__name__}")
            return
        for number, item in enumerate(raw, 1):
            where = f"steps[{number}]"
            if isinstance(item, str):
                item = {item: {}}
            if not (isinstance(item, dict) and len(item) == 1):
                self.problems.append(f"{where}: must be one `name: {{options}}`, got {item!r}")
                continue
            ((name, options),) = item.items()
            options = {} if options is None else options
            try:
                entry = step_entry(str(name))
                if not isinstance(options, dict):
                    raise OptionError(f"{where} {name}", must="have a mapping of options", got=repr(options))
                stored = check_options(options, entry.options, f"{where} {name}")
                self._references(entry, stored, f"{where} {name}", models)
                yield StepCall(str(name), stored, entry)
            except OptionError as error:
                self.problems.append(str(error))

    def _references(self, entry: Entry, options: dict[str, Any], where: str, models: dict[str, str]) -> None:
        """Check options that name other systems or companion models."""
        for spec in entry.options:
            value = options.get(spec.name, spec.default)
            if value is None or value == "":
                continue
            if spec.companion and value not in models:
                do = did_you_mean(value, models) if models else "add `models:` with that name"
                raise OptionError(f"{where}.{spec.name}", must="name a model under `models:`", got=repr(value), do=do)
            if spec.system is not None:
                name, inner = split_reference(value)
                target = registry.find(name, kind=spec.system)
                checked = check_options(inner, target.options, f"{where}.{spec.name} {name}")
                self._references(target, checked, f"{where}.{spec.name} {name}", models)

    def _order(self, steps: tuple[StepCall, ...], model: str) -> None:
        moves = [facts.Move(step.name, step.entry.card) for step in steps]
        start = _start_facts(model)
        conflict = facts.follow(moves, start)
        if conflict is None:
            return
        fixers = [facts.Move(name, step_entry(name).card) for name in ("merge", "lora") if _exists(name)]
        order = facts.mend(moves, fixers, start)
        works = "; an order that works: " + " -> ".join(move.name for move in order) if order else ""
        self.problems.append(f"steps[{conflict.index + 1}]: {conflict.reason}{works}")


def step_entry(name: str) -> Entry:
    """The entry behind a step's name: a step of the pipeline, or a system whose kind can be a step."""
    table = dict(registry.steps())
    others: dict[str, Entry] = {}
    for entry in registry.systems().values():
        # one that distils has data and a teacher of a shape of its own, which no recipe can name
        is_step = KINDS[entry.kind].step and "distils" not in entry.card.traits
        (table if is_step else others)[entry.name] = entry
    if name in table:
        return table[name]
    if name in others:
        kind = KINDS[others[name].kind]
        do = f"name it in {kind.option_of}" if kind.option_of else f"call it: gossamer.system({name!r}, ...)"
        raise OptionError(f"step {name!r}", must="be a step", got=f"one of the {kind.folder}", do=do)
    raise OptionError(f"step {name!r}", must="be known", do=did_you_mean(name, table))


def split_reference(value: str | dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """``"dpo"`` or ``{"dpo": {"beta": 0.1}}`` to name and options."""
    if isinstance(value, str):
        return value, {}
    ((name, options),) = value.items()
    return name, options


def _exists(name: str) -> bool:
    return name in registry.steps() or name in registry.systems()


def _start_facts(model: str) -> frozenset[str]:
    """A local checkpoint may be quantised or a small copy already; its config says so."""
    path = Path(model) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    start = frozenset({"quantised"}) if "quantization_config" in config else facts.START
    return start | {"pruned", "small_copy"} if "gossamer_small_copy" in config else start


class _Loader(yaml.SafeLoader):
    """YAML with 1e-3 as a number and repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise InputError(f"line {node.start_mark.line + 1}: key {key!r}", must="stand once in a mapping")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _load_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(str(path), must="be a recipe file", got="nothing there" if not path.exists() else "a folder")
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise InputError(str(path), must="be UTF-8", got=f"byte {error.start} is not") from error
    except yaml.YAMLError as error:
        raise InputError(str(path), must="be YAML", got=" ".join(str(error).split())) from error
    if not isinstance(value, dict):
        raise InputError(str(path), must="be a mapping with the keys " + ", ".join(_KEYS), got=type(value).__name__)
    return value


def _override(raw: dict[str, Any], dotted: str, value: Any) -> None:
    """Set ``steps.train.steps`` or ``data.train``; a step is found by its name or its number from 1."""
    *path, last = dotted.split(".")
    here: Any = raw
    for part in path:
        here = _descend(here, part, dotted)
    if isinstance(here, dict):
        here[last] = value
    else:
        raise OptionError(f"--set {dotted}", must="name a key of a mapping", got=type(here).__name__)


def _descend(here: Any, part: str, dotted: str) -> Any:
    if isinstance(here, list):
        for number, item in enumerate(here, 1):
            if part == str(number):
                return item
            if isinstance(item, str) and item == part:
                here[number - 1] = item = {part: {}}
            if isinstance(item, dict) and part in item:
                item[part] = item[part] or {}
                return item[part]
        names = [key for item in here for key in (item if isinstance(item, dict) else [item])]
        raise OptionError(f"--set {dotted}", must="name a step of the recipe", do=did_you_mean(part, map(str, names)))
    if not isinstance(here, dict):
        raise OptionError(f"--set {dotted}", must="name a key of a mapping", got=f"{part!r} in {here!r}")
    if here.get(part) is None:
        here[part] = {}
    if isinstance(here[part], list) and part == "measure":
        here[part] = {"quantities": here[part]}
    return here[part]


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in _plain(values).items() if value is not None}


def _plain(value: Any) -> Any:
    """Tuples to lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
