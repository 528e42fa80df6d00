"""Say what this machine has, and what of Gossamer works on it."""

from __future__ import annotations

import typer

from gossamer.cli._output import json_out, table


def command(as_json: bool = typer.Option(False, "--json", help="For machines.")) -> None:
    from gossamer.core import registry
    from gossamer.hub.models import packaged_names
    from gossamer.parts.measure import environment

    found = environment()
    models = {name: _model(name) for name in packaged_names()}
    systems = {entry.name: _missing(entry.card.extras) for entry in registry.systems().values()}
    if as_json:
        json_out({"machine": found, "models": models, "missing_extras": systems})
        return
    machine = [[key, _show(key, value)] for key, value in found.items() if key != "versions"]
    table(["machine", ""], machine + [[name, version] for name, version in found["versions"].items()])
    table(["model", "state"], list(models.items()))
    states = [[name, f"needs {', '.join(gone)}" if gone else "works"] for name, gone in systems.items()]
    table(["system", "state"], states)


def _model(name: str) -> str:
    """Whether a packaged model can be had here, without converting it."""
    from gossamer.core.paths import cache_dir
    from gossamer.hub.models import packaged

    if (cache_dir("models") / name / "config.json").exists():
        return "converted, in the cache"
    model = packaged(name)[0]
    if all(_installed(file.package) for file in model.files):
        return "package installed"
    return model.install or f"pip install 'gossamer[{model.extra}]'"


def _missing(extras: tuple[str, ...]) -> list[str]:
    """Extras of which a package is not installed."""
    import re
    from importlib.metadata import requires

    gone = []
    for extra in extras:
        ending = f'extra == "{extra}"'
        needed = [line for line in requires("gossamer") or [] if line.replace("'", '"').endswith(ending)]
        if any(not _installed(re.split(r"[<>=!~;\[ ]", line)[0]) for line in needed):
            gone.append(f"gossamer[{extra}]")
    return gone


def _installed(distribution: str) -> bool:
    from importlib.metadata import PackageNotFoundError, version

    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _show(key: str, value: object) -> str:
    return f"{value / 1e9:.1f} GB" if key == "memory_bytes" and isinstance(value, int) else str(value)
