"""Laws of applications: the result is plain JSON and the same again, what was given is left alone.

An application brings its own small (data, inputs) by ``example(folder)``; the files are written once and only read.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gossamer.core.card import Entry
from gossamer.core.paths import sha256
from gossamer.testing.bench import Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("data", "inputs")


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    data, inputs = copy.deepcopy(_example(type(system))[1:])
    return {"data": data, "inputs": inputs}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    system.fit(subject["data"])
    return system.apply(subject["inputs"]).as_dict()


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "fitting on nothing", lambda: system.fit([])
    yield "fitting on what are no rows", lambda: system.fit([7])
    system.fit(subject(system, bench)["data"])
    yield "applying it to nothing", lambda: system.apply(None)
    yield "applying it to what is not there", lambda: system.apply("no/such/thing")


@law()
def check_the_result_is_plain_json(entry: Entry, bench: Bench) -> None:
    """``as_dict`` gives what JSON holds, and JSON gives it back."""
    found = _outcome(entry, bench)
    try:
        text = json.dumps(found, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"as_dict is no JSON: {error}") from error
    difference = differs(json.loads(text), found)
    assert not difference, f"as_dict is not the same after JSON: {difference}"


@law()
def check_applied_again_it_gives_the_same(entry: Entry, bench: Bench) -> None:
    """A second use of the same object on the same input gives the same result, bit for bit."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    system.fit(given["data"])
    first, second = (system.apply(given["inputs"]).as_dict() for _ in range(2))
    difference = differs(first, second)
    assert not difference, f"applied twice it gives two results: {difference}"


@law()
def check_fitted_again_it_gives_the_same(entry: Entry, bench: Bench) -> None:
    """Fitting twice on the same data leaves what fitting once leaves."""
    system = build(entry, bench, base_options(entry, bench))
    given = subject(system, bench)
    first, second = (outcome(system, given) for _ in range(2))
    difference = differs(first, second)
    assert not difference, f"fitted twice it gives two results: {difference}"


@law(once=True)
def check_files_are_untouched(entry: Entry, bench: Bench) -> None:
    """The files of data and inputs are as before, and nothing is left beside them."""
    folder = Path(_example(entry.load())[0].name)
    before = _hashes(folder)
    _outcome(entry, bench)
    difference = differs(before, _hashes(folder))
    assert not difference, f"files are changed: {difference}"


def _outcome(entry: Entry, bench: Bench) -> Any:
    system = build(entry, bench, base_options(entry, bench))
    return outcome(system, subject(system, bench))


def _example(cls: type) -> tuple[Any, Any, Any]:
    """A folder that stays until the process ends, with the data and inputs in it."""
    if cls not in _EXAMPLES:
        folder = tempfile.TemporaryDirectory(prefix="gossamer-example-")
        _EXAMPLES[cls] = (folder, *cls().example(Path(folder.name)))
    return _EXAMPLES[cls]


_EXAMPLES: dict[type, tuple[Any, Any, Any]] = {}


def _hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
