"""Packages: what is handed on, one folder that another machine opens with equal outputs.

    PACKAGE/manifest.json   hashes of every file, versions, licences, lineage, claims, probe; see gossamer.core.manifest
    PACKAGE/model/          the plain model, its weights packed where they are; absent where it is referred to by name
    PACKAGE/adapter/        the attached adapter
    PACKAGE/parts/          guards, drafters and what else was fitted, by name
    PACKAGE/companions/     further models that a part runs, where they have no name to refer to

The probe holds a few prompts with the log-probabilities that the model gave them and the greedy tokens that it added.
Writing ends with opening what was written and replaying the probe; where that fails nothing is left.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from gossamer.core import evidence, registry
from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError, InputError
from gossamer.core.manifest import MANIFEST, files_of, seal, summary
from gossamer.core.paths import atomic_dir, write_json
from gossamer.core.recipe import split_reference
from gossamer.hub.bundles import companion_names
from gossamer.hub.models import load_model, resolve
from gossamer.hub.packages import open_package
from gossamer.kinds.base import FittedSystem
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.generation import greedy_config
from gossamer.parts.measure import environment
from gossamer.pipeline.stage import is_adapted, load_bundle, save_bundle, save_processor
from gossamer.pipeline.steps.save import RESULT

__all__ = ["export_package", "make_probe", "open_package", "replay", "write_package"]

_PROMPTS = (
    "The function returns the number of items in the list.",
    "def area(width, height):\n    return width * height\n",
    "On Sunday we walked along the river and",
)
_NEW_TOKENS = 12
_SEEN = -12.0  # a change at a token less probable than exp(-12) is no difference to anybody
_BOUNDS = {4: 1e-3, 2: 0.25}  # of a log-probability, by bytes of the model's numbers; bfloat16 logits are 1/8 apart


@dataclasses.dataclass
class _Source:
    """A bundle, its plain model and what that is called; ``licences`` and ``notes`` of what it was made from."""

    bundle: Bundle
    plain: Any
    processor: Any
    name: str
    data: str = ""
    notes: tuple[str, ...] = ()


def export_package(run: Path, out: Path) -> dict[str, Any]:
    """Write the result of ``run`` as a package and say in short what it holds, with the ``round_trip``."""
    manifest = write_package(run, out)
    return {"out": str(out), **summary(manifest), "round_trip": "same greedy tokens" if manifest["probe"] else "none"}


def write_package(source: Bundle | str | Path, out: str | Path, *, keep_base: bool = False) -> dict[str, Any]:
    """Write a bundle, or the result in the folder of a run, to the new folder ``out``; returns the manifest.

    The plain model is referred to by name where a machine with Gossamer, or the hub, has it bit for bit under that
    name, and copied in otherwise, or always with ``keep_base``. Raises InputError for a folder with files in it, or an
    adapter whose plain model cannot be found; GossamerError where the package does not give the same outputs.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(str(out), must="be a new folder", got="one with files in it", do="choose another")
    found = _of_bundle(source) if isinstance(source, Bundle) else _of_run(Path(source))
    found.bundle.model.eval()
    probe = make_probe(found.bundle.model, found.bundle.processor)
    with atomic_dir(target) as path:
        stored = _store(found, path, keep_base)
        manifest = seal({"name": target.name, **stored, "probe": probe, "files": files_of(path)})
        write_json(path / MANIFEST, manifest)
        again = open_package(path)
        if probe is not None:
            replay(again.model, again.processor, probe, where=f"package {out}")
    return manifest


def make_probe(model: Any, processor: Any) -> dict[str, Any] | None:
    """What a causal text model does with a few prompts; None for a model of another kind.

    A row a prompt: ``ids``, the greedy ``tokens`` after it, ``log_probs`` of all of them but the first, and how many
    tokens are ``sure``: those before the first place where two are so close that rounding elsewhere may swap them.
    """
    if not callable(getattr(processor, "encode", None)) or not model.can_generate():
        return None
    bound = _BOUNDS[2] if model.dtype.itemsize == 2 else _BOUNDS[4]
    rows = []
    for text in _PROMPTS:
        ids = list(processor(text)["input_ids"])
        made = _greedy(model, processor, ids, _NEW_TOKENS)
        table = _table(model, ids + made)
        if not table.isfinite().all():
            raise GossamerError("package: model", must="give finite log-probabilities", got=f"NaN or Inf on {text!r}")
        best = table[len(ids) - 1 : -1].topk(2)
        clear = (best.values[:, 0] - best.values[:, 1] > 2 * bound) & (best.indices[:, 0] == torch.tensor(made))
        sure = int(clear.long().cumprod(0).sum())
        rows.append({"text": text, "ids": ids, "tokens": made, "sure": sure, "log_probs": _taken(table, ids + made)})
    return {"bound": bound, "rows": rows}


def replay(model: Any, processor: Any, probe: dict[str, Any], *, where: str = "package") -> dict[str, Any]:
    """``{"prompts", "tokens", "largest"}``: the probe on this machine, with the largest change of a log-probability.

    GossamerError where the tokenizer cuts a prompt otherwise, where a greedy token differs, or where a log-probability
    moved by more than the probe's bound.
    """
    largest, tokens, do = 0.0, 0, "do not use it here; compare the versions in its manifest with those installed"
    for row in probe["rows"]:
        ids = list(processor(row["text"])["input_ids"])
        if ids != row["ids"]:
            raise GossamerError(f"{where}: tokenizer", must="cut the prompts as before", got=ids, do=do)
        sure = row["tokens"][: row["sure"]]
        made = _greedy(model, processor, ids, len(sure)) if sure else []
        if made != sure:
            must = f"add the tokens {sure} to {row['text']!r}"
            raise GossamerError(f"{where}: model", must=must, got=made, do=do)
        now = _taken(_table(model, ids + row["tokens"]), ids + row["tokens"])
        # both lines are written so that a NaN is no agreement
        moved = [abs(a - b) for a, b in zip(now, row["log_probs"], strict=True) if not max(a, b) <= _SEEN]
        largest, tokens = max([largest, *moved]), tokens + len(made)
        if not all(change <= probe["bound"] for change in moved):
            must = f"change no log-probability by more than {probe['bound']:g}"
            raise GossamerError(f"{where}: model", must=must, got=f"{max(moved):.3g}", do=do)
    return {"prompts": len(probe["rows"]), "tokens": tokens, "largest": largest}


def _greedy(model: Any, processor: Any, ids: list[int], count: int) -> list[int]:
    inputs = torch.tensor([ids], device=model.device)
    config = greedy_config(model, processor, max_new_tokens=count)
    out = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
    return [int(token) for token in out[0, len(ids) :]]


@torch.no_grad()
def _table(model: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [t, V] after each token, float32."""
    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device)).logits[0]
    return logits.float().log_softmax(-1).cpu()


def _taken(table: torch.Tensor, ids: list[int]) -> list[float]:
    """Of the tokens that did come, ids[1:]."""
    return [float(value) for value in table[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]]


def _of_bundle(bundle: Bundle) -> _Source:
    name = str(getattr(bundle.model, "name_or_path", "") or "")
    if not is_adapted(bundle.model):
        return _Source(bundle, bundle.model, bundle.processor, name)
    if not name:
        do = "load it with gossamer.load before the adapter is attached, or merge the adapter"
        raise InputError("package: the plain model under the adapter", must="have a name or a folder", do=do)
    return _Source(bundle, *load_model(name), name)


def _of_run(folder: Path) -> _Source:
    run = folder if (folder / RESULT).is_dir() else folder.parent
    result = run / RESULT if (folder / RESULT).is_dir() else folder
    read = run / "recipe.yaml"
    recipe = yaml.safe_load(read.read_text(encoding="utf-8")) if read.is_file() else {}
    others = recipe.get("models") or {}
    bundle = load_bundle(result, lambda: {name: load_model(where)[0] for name, where in others.items()})
    record = json.loads((result / "bundle.json").read_text(encoding="utf-8"))
    plain, processor = bundle.model, bundle.processor
    if is_adapted(plain) or record["acceleration"]:
        plain, processor = load_model(record["base"] or str(result / "model"))
    report = run / "report.json"
    told = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
    name = str(recipe.get("model") or record["base"] or "")
    return _Source(bundle, plain, processor, name, told.get("data", ""), tuple(told.get("notes", ())))


def _store(source: _Source, path: Path, keep_base: bool) -> dict[str, Any]:
    """Write everything but the manifest to ``path`` and return its part of the manifest."""
    bundle, name = source.bundle, None if keep_base else _reference(source.name, source.plain, source.processor)
    inner = path / "stage"
    save_bundle(bundle, inner, base=source.name)
    record = json.loads((inner / "bundle.json").read_text(encoding="utf-8"))
    for folder in ("adapter", "parts"):
        if (inner / folder).exists():
            (inner / folder).rename(path / folder)
    if name is None:
        source.plain.save_pretrained(path / "model")
        save_processor(source.processor, path / "model")
    shutil.rmtree(inner)
    _forget_folder(path / "adapter", name or "model")
    companions = _companions(bundle, path)
    # of a model in a folder its name, not where it lay on this machine
    called = (name or Path(source.name).name) or "model"
    licences = {called: _licence(source.name)}
    licences |= {one["name"]: _licence(one["name"]) for one in companions.values() if one["name"]}
    return {
        "base": {"name": name, "fingerprint": fingerprint(source.plain)},
        **{key: record[key] for key in ("adapters", "parts", "acceleration", "lineage")},
        "companions": companions,
        "versions": environment()["versions"],
        "licences": licences,
        "data": source.data,
        "notes": list(source.notes),
        "claims": _claims(bundle),
    }


def _reference(name: str, model: Any, processor: Any) -> str | None:
    """``name`` where it brings this very model and tokenizer on any machine, else None."""
    if not name:
        return None
    try:
        found = resolve(name, offline=True)
    except InputError:
        return None
    if found.source not in ("package", "cache", "hub"):
        return None
    there, its_processor = load_model(name, offline=True)
    ours, theirs = model.state_dict(), there.state_dict()
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    alike = _text_of(processor) == _text_of(its_processor) and _settings_of(model) == _settings_of(there)
    return found.name if same and alike else None


def _text_of(processor: Any) -> tuple[Any, ...]:
    """What a tokenizer does: its table and its chat template. A processor of images: its settings."""
    core = getattr(processor, "backend_tokenizer", None)
    own = core.to_str() if core is not None else repr(processor)
    return own, getattr(processor, "chat_template", None), getattr(processor, "special_tokens_map", None)


def _settings_of(model: Any) -> Any:
    config = getattr(model, "generation_config", None)
    return None if config is None else {k: v for k, v in config.to_dict().items() if k != "transformers_version"}


def _forget_folder(adapter: Path, base: str) -> None:
    """PEFT notes, in two files, where the base lay on this machine."""
    config = adapter / "adapter_config.json"
    if config.exists():
        (adapter / "README.md").unlink(missing_ok=True)
        values = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, {**values, "base_model_name_or_path": base})


def _companions(bundle: Bundle, path: Path) -> dict[str, dict[str, Any]]:
    """Store or refer to the models that adapters and parts run; what a part needed only to be fitted stays behind."""
    found = {}
    running = [system for system in (*bundle.adapters, *bundle.parts.values()) if not isinstance(system, FittedSystem)]
    for system in running:
        for name in companion_names({"name": system.name, "options": system.config.as_dict()}):
            if name not in found:
                found[name] = _companion(name, system.companion(name), path / "companions" / name)
    return found


def _companion(name: str, given: Any, folder: Path) -> dict[str, Any]:
    whole = isinstance(given, Bundle)
    model, processor = (given.model, given.processor) if whole else (given, None)
    where = str(getattr(model, "name_or_path", "") or "")
    if not hasattr(model, "save_pretrained") or is_adapted(model):
        must = "be a plain transformers model"
        raise InputError(f"package: companion {name!r}", must=must, got=type(model).__name__, do="merge its adapter")
    if processor is None:
        if not where:
            do = "load it with gossamer.load, or give a Bundle of both"
            raise InputError(f"package: companion {name!r}", must="come with its tokenizer", got="a model alone", do=do)
        processor = load_model(where)[1]
    reference = _reference(where, model, processor)
    if reference is None:
        model.save_pretrained(folder)
        save_processor(processor, folder)
    return {"name": reference, "fingerprint": fingerprint(model), "bundle": whole}


def _licence(name: str) -> str:
    unknown = "not stated here; see where the model comes from"
    try:
        return resolve(name, offline=True).licence or unknown if name else unknown
    except InputError:
        return unknown


def _claims(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """What experiments showed of the systems that had a hand in it, by name; baselines claim nothing."""
    systems, names = registry.systems(), dict[str, None]()
    for record in bundle.lineage:
        names[record["step"]] = None
        entry = systems.get(record["step"]) or registry.steps().get(record["step"])
        for spec in entry.options if entry else ():
            value = record["options"].get(spec.name) if spec.system is not None else None
            if value:
                names[split_reference(value)[0]] = None
    names |= dict.fromkeys([system.name for system in (*bundle.adapters, *bundle.parts.values())])
    used = [systems[name] for name in names if name in systems and not systems[name].card.builtin]
    found = {}
    for entry in used:
        told = evidence.read_evidence(entry) or {}
        kept = {key: told.get(key) for key in ("effect", "interval", "unit", "baseline", "result")}
        found[entry.name] = {"claim": entry.card.claim, **evidence.status(entry), **kept}
    return found
