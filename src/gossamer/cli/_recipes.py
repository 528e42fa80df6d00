"""Verbs that are short recipes: built here, then run like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.cli._output import Bars, show_report


def step(name: str, **options: Any) -> dict[str, Any]:
    """One step of a recipe."""
    return {name: options}


def data_block(data: str) -> dict[str, Any]:
    """A path where there is one, else the name of a corpus."""
    return {"path": data} if Path(data).exists() or "/" in data or "." in data else {"name": data}


def run_steps(recipe: dict[str, Any], out: str, overrides: dict[str, Any], as_json: bool) -> None:
    """Check, run and print, as ``gossamer run`` does; the resolved recipe is kept in the run folder."""
    from gossamer.core.recipe import read_recipe

    read_recipe(recipe, overrides)  # refuse before torch loads
    from gossamer.pipeline import engine

    report = engine.run(recipe, out=out or None, overrides=overrides, reporter=Bars())
    show_report(report, as_json)
