"""What a training run keeps on disk, and which of it can be gone on from.

    folder/run.json                  what makes the run this run: model, examples, systems, settings
    folder/checkpoint-N/             trainable weights, optimizer, schedule, random state, trainer state
    folder/checkpoint-N/complete.json    step, tokens, seconds, and every other file with its size

A checkpoint is written beside its final name and renamed, so that a killed save leaves none; one whose files are not
all there in their sizes is passed over. Weights are the parameters that require gradients, whatever wraps them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import InputError
from gossamer.core.paths import write_json


def trainable_state(model: nn.Module, heads: nn.Module | None) -> dict[str, Tensor]:
    """Trainable parameters, and the buffers of the modules that own them, by name."""
    state: dict[str, Tensor] = {}
    for prefix, root in (("model.", model), ("objective.", heads)):
        if root is None:
            continue
        names = {name for name, parameter in root.named_parameters() if parameter.requires_grad}
        owners = {name.rpartition(".")[0] for name in names}
        values = dict(root.named_parameters()) | dict(root.named_buffers())
        wanted = [name for name in values if name in names or name.rpartition(".")[0] in owners & _buffered(root)]
        state |= {prefix + name: values[name].detach().cpu().contiguous() for name in wanted}
    return state


def _buffered(root: nn.Module) -> set[str]:
    return {name for name, module in root.named_modules() if module._buffers}


def load_trainable(model: nn.Module, heads: nn.Module | None, saved: dict[str, Tensor]) -> None:
    own = {"model.": model, "objective.": heads}
    targets = {
        prefix + name: value
        for prefix, root in own.items()
        if root is not None
        for name, value in (*root.named_parameters(), *root.named_buffers())
    }
    for name, value in saved.items():
        with torch.no_grad():
            targets[name].copy_(value)


def run_identity(start: str, examples: list[Any], objective: Any, optimizer: Any, settings: Any) -> dict[str, Any]:
    """What makes two runs the same run. The examples go in by number and by a sample of them."""
    digest = hashlib.sha256(str(len(examples)).encode())
    for example in examples[:: max(1, len(examples) // 256)]:
        digest.update(repr(example).encode())
    systems = {
        kind: {"name": system.name, "seed": getattr(system, "seed", 0), "options": _options(system)}
        for kind, system in (("objective", objective), ("optimizer", optimizer))
    }
    # what is only watched may change between the parts of a run
    watched = {"eval_every", "save_every", "trackers"}
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key not in watched}
    identity = {"model": start, "examples": digest.hexdigest()[:16], **systems, "settings": kept}
    return dict(json.loads(json.dumps(identity)))


def _options(system: Any) -> dict[str, Any]:
    config = getattr(system, "config", None)
    return config.as_dict() if config is not None else {}


def resume_point(folder: Path, identity: dict[str, Any], resume: bool) -> Path | None:
    """The newest whole checkpoint of this run; broken ones and what a killed save left are removed."""
    for left in folder.glob(".checkpoint-*"):
        shutil.rmtree(left)
    head = folder / "run.json"
    if resume and head.exists() and checkpoints(folder):
        known = json.loads(head.read_text(encoding="utf-8"))
        if known != identity:
            different = sorted(key for key in identity if known.get(key) != identity[key])
            raise InputError(
                str(folder),
                must="hold checkpoints of this very run",
                got=f"a run with other {', '.join(different)}",
                do="give another folder, or start anew with resume=False",
            )
        for checkpoint in reversed(checkpoints(folder)):
            if _whole(checkpoint):
                return checkpoint
            shutil.rmtree(checkpoint)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    write_json(head, identity)
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _whole(checkpoint: Path) -> bool:
    try:
        files = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError):
        return False
