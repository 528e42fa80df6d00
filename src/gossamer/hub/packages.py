"""Packages opened: every file is checked against the manifest, then the model is loaded and its parts put on it.

A package refers to its base by name, or holds it. One that is referred to must have the fingerprint of the model that
the package was made on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.core.manifest import check_package
from gossamer.hub.bundles import assemble, companion_names
from gossamer.hub.models import Dtype, Task, load_model


def open_package(
    folder: str | Path,
    without: Iterable[str] = (),
    *,
    dtype: Dtype = "auto",
    task: Task | None = None,
    offline: bool | None = None,
) -> Bundle:
    """The bundle in a package, in eval mode, its parts by name but for those in ``without``.

    ``without`` names adapters and parts (guards, drafters, decoding, acceleration). Raises OptionError for a name that
    the package does not have; InputError where a file is not as it was written, where the base is another model than
    the package was made on, or where a part stays that was fitted on an adapter which is left out.
    """
    path = Path(folder).expanduser()
    manifest = check_package(path)
    return _open(path, manifest, (without,) if isinstance(without, str) else tuple(without), dtype, task, offline)


def open_model(folder: Path, *, dtype: Dtype, task: Task | None, offline: bool | None) -> tuple[Any, Any]:
    """Model and processor of a package as :func:`gossamer.hub.models.load_model` gives them.

    The adapter and what accelerates the model are on it; other parts are left aside.
    """
    manifest = check_package(folder)
    aside = tuple(name for name in manifest["parts"] if name != manifest["acceleration"])
    bundle = _open(folder, manifest, aside, dtype, task, offline)
    return bundle.model, bundle.processor


def _open(
    path: Path,
    manifest: dict[str, Any],
    without: tuple[str, ...],
    dtype: Dtype,
    task: Task | None,
    offline: bool | None,
) -> Bundle:
    record = _chosen(path, manifest, without)
    model, processor = _model(path, "base", manifest["base"], task=task, offline=offline)
    wanted = {name for call in (*record["adapters"], *record["parts"].values()) for name in companion_names(call)}
    given = {name: one for name, one in manifest["companions"].items() if name in wanted}
    companions = {name: _companion(path, name, one, offline) for name, one in given.items()}
    bundle = assemble(Bundle(model, processor, lineage=manifest["lineage"]), path, record, lambda: companions)
    if dtype != "auto":
        _cast(bundle.model, dtype)
    bundle.model.eval()
    return bundle


def _chosen(folder: Path, manifest: dict[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """Adapters, parts and acceleration that stay."""
    known = {*(call["name"] for call in manifest["adapters"]), *manifest["parts"]}
    for name in without:
        if name not in known:
            raise OptionError(
                f"package {folder}: without {name!r}", must="name one of its parts", do=did_you_mean(name, known)
            )
    adapters = [call for call in manifest["adapters"] if call["name"] not in without]
    parts = {name: call for name, call in manifest["parts"].items() if name not in without}
    if len(adapters) < len(manifest["adapters"]):
        _check_alone(folder, manifest, parts, without)
    fast = manifest["acceleration"]
    return {"adapters": adapters, "parts": parts, "acceleration": fast if fast in parts else None}


def _check_alone(folder: Path, manifest: dict[str, Any], parts: dict[str, Any], without: tuple[str, ...]) -> None:
    """Refuse to keep what was fitted on the model with its adapter where that is left out."""
    states = {name: folder / "parts" / name / "state.json" for name in parts}
    fitted = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in states.items() if path.exists()}
    bound = [name for name, state in fitted.items() if state["fingerprint"] != manifest["base"]["fingerprint"]]
    if bound:
        raise OptionError(
            f"package {folder}: without {', '.join(without)}",
            must="leave out what was fitted on the model with its adapter too",
            got=f"{', '.join(bound)} still in",
            do=f"leave out {', '.join([*without, *bound])}",
        )


def _model(folder: Path, key: str, record: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """A model that lies in the package or is referred to by name; ``key`` is "base" or a companion's name."""
    from gossamer.parts.fingerprint import fingerprint

    if record["name"] is None:
        return load_model(folder / ("model" if key == "base" else f"companions/{key}"), **options)
    model, processor = load_model(record["name"], **options)
    found = fingerprint(model)
    if found != record["fingerprint"]:
        raise InputError(
            f"package {folder}: {key} {record['name']!r}",
            must=f"be the model that the package was made with (fingerprint {record['fingerprint']})",
            got=f"another ({found})",
            do="get that version of it, or a package that holds its base (keep_base)",
        )
    return model, processor


def _companion(folder: Path, name: str, record: dict[str, Any], offline: bool | None) -> Any:
    """A model, or a bundle with its tokenizer where it was given as one."""
    model, processor = _model(folder, name, record, offline=offline)
    return Bundle(model, processor) if record.get("bundle") else model


def _cast(model: Any, dtype: Dtype) -> None:
    """Parameters only: rotary frequencies and scales of packed weights keep the type that they were loaded with."""
    import torch

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, dtype))
