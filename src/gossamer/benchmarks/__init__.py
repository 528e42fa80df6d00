"""What ``gossamer bench NAME`` runs: one file a benchmark, discovered.

A benchmark is a module with a docstring and

    run(quick: bool, log: Callable[[str], None]) -> {"tables": [{"title", "rows"}], "targets": [{...}], ...}

A target is {"text", "value", "target", "met"}: what was promised, measured, asked for, and whether it holds.
"""

from __future__ import annotations

import ast
import datetime
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.paths import write_json
from gossamer.core.registry import PACKAGE

EVIDENCE = PACKAGE / "evidence" / "bench"


def benchmarks() -> dict[str, str]:
    """Name and first line of the docstring of each, read without importing it."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        found[path.stem] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
    return found


def run(name: str, *, quick: bool = False, log: Callable[[str], None] = print) -> dict[str, Any]:
    """Run one and, unless ``quick``, record it in evidence/bench/NAME.json with machine, versions and date."""
    if name not in benchmarks():
        raise OptionError(f"bench {name}", must="be a benchmark", do=did_you_mean(name, benchmarks()))
    from gossamer.parts.measure import environment

    module = importlib.import_module(f"gossamer.benchmarks.{name}")
    found: dict[str, Any] = module.run(quick, log)
    if not quick:
        date = datetime.date.today().isoformat()
        write_json(EVIDENCE / f"{name}.json", {"benchmark": name, "date": date, **environment(), **found})
    return found
