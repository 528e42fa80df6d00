"""What a step gets besides the bundle: data splits, a scratch folder, companions, progress."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError
from gossamer.core.options import Config
from gossamer.core.recipe import DataConfig, Recipe

Row = dict[str, Any]
Tick = Callable[[int, int], None]  # done, total


class Reporter(Protocol):
    """Shows a person what goes on; :class:`Silent` shows nothing."""

    def task(self, label: str) -> Tick: ...

    def note(self, text: str) -> None: ...


class Silent:
    def task(self, label: str) -> Tick:
        return lambda done, total: None

    def note(self, text: str) -> None:
        return None


@dataclasses.dataclass
class Data:
    """Rows by split. ``about`` says where they come from (licence, content hash)."""

    splits: dict[str, list[Row]]
    about: dict[str, Any]

    def __getitem__(self, split: str) -> list[Row]:
        rows = self.splits.get(split, [])
        if not rows:
            raise InputError(
                f"data split {split!r}", must="hold rows", got="none", do="give `data:` in the recipe more rows"
            )
        return rows


@dataclasses.dataclass
class Job:
    """One run: its recipe, folder and data. ``scratch`` is the present step's own, removed when it is done."""

    recipe: Recipe
    folder: Path
    reporter: Reporter
    scratch: Path
    base: str = ""  # where the plain model can be loaded from while an adapter is attached

    @functools.cached_property
    def data(self) -> Data:
        if self.recipe.data is None:
            raise InputError(
                "recipe", must="have `data:` for this step", do="add data: {name: ...} or data: {path: ...}"
            )
        return load_data(self.recipe.data, self.recipe.seed)

    @functools.cached_property
    def companions(self) -> dict[str, Any]:
        """The recipe's further models, loaded on first use."""
        from gossamer.hub.models import load_model

        return {name: load_model(where)[0] for name, where in self.recipe.models.items()}


class Step(abc.ABC):
    """Base of the pipeline's own steps: ``apply(bundle, job) -> Bundle``.

    ``notes`` is what the step wants said in the report about what it changed.
    """

    config_class: type[Config] = Config

    def __init__(self, config: Any, *, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.notes: dict[str, Any] = {}

    @abc.abstractmethod
    def apply(self, bundle: Bundle, job: Job) -> Bundle:
        """Take the step and return the bundle after it."""


def load_data(config: DataConfig, seed: int) -> Data:
    """A packaged corpus with its own splits, or a file split by the hash of each row."""
    wanted = {"train": config.train, "validation": config.validation, "test": config.test}
    if config.name is not None:
        from gossamer.hub.corpora import load_corpus

        parts = {split: load_corpus(config.name, split=split, limit=n, seed=seed) for split, n in wanted.items()}
        corpus = parts["train"]
        about = {
            "name": config.name,
            "sha256": corpus.sha256,
            "licence": corpus.licence,
            "sources": list(corpus.sources),
        }
        return Data({split: part.rows for split, part in parts.items()}, about)
    from gossamer.parts.data import read_rows
    from gossamer.parts.data_media import media_rows

    seen = media_rows(Path(str(config.path)))
    rows = seen if seen is not None else [row.as_dict() for row in read_rows(str(config.path))]
    keys = [_key(row, Path(str(config.path)).parent) for row in rows]
    splits = _split(rows, keys, wanted)
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()
    return Data(splits, {"name": str(config.path), "sha256": digest, "rows": len(rows)})


def _split(rows: list[Row], keys: list[str], wanted: dict[str, int | None]) -> dict[str, list[Row]]:
    """One row in five is held out, by the hash of its key: what is equal stays together."""
    buckets: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for row, key in zip(rows, keys, strict=True):
        place = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
        buckets["test" if place == 0 else "validation" if place == 1 else "train"].append(row)
    return {split: bucket[: wanted[split]] for split, bucket in buckets.items()}


def _key(row: Row, folder: Path) -> str:
    """A row's media name, prompt or text. Media names count from the ``folder`` of the rows, wherever that lies."""
    media = row.get("video") or row.get("image")
    if media is not None:
        return json.dumps(os.path.relpath(str(media), folder))
    lead = row.get("prompt") or row.get("text") or (row.get("messages") or [None])[0]
    return json.dumps(lead, sort_keys=True, ensure_ascii=False)
