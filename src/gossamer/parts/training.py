"""The one trainer: any objective and any optimizer on any Hugging Face model, on transformers' Trainer.

A step takes ``accumulation`` micro-batches B_1 ... B_a of ``batch_size`` rows. Each objective returns a sum over its
batch divided by N = amount(B_1) + ... + amount(B_a), so that the gradient of a step does not depend on how its rows are
cut into micro-batches. The order of the rows is a function of the seed alone.

Every ``save_every`` steps a checkpoint is written beside its final name and then renamed: trainable weights,
optimizer, schedule, random state and a list of all files with sizes. A run that was killed goes on from the newest
checkpoint whose files are all whole, and ends with the weights of an unbroken run. Ctrl-C lets the step end and saves.

Trainable weights in half precision are trained as float32 and given back in their own type.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.core.errors import InputError, OptionError, did_you_mean
from gossamer.parts.checkpoints import resume_point, run_identity
from gossamer.parts.data import pack
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.training_loop import (
    Interrupt,
    Loop,
    ObjectiveLike,
    OptimizerLike,
    StepHook,
    parameter_groups,
    rate_factor,
)

__all__ = [
    "ObjectiveLike",
    "OptimizerLike",
    "StepHook",
    "TrainResult",
    "TrainSettings",
    "parameter_groups",
    "rate_factor",
    "train",
]

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("bf16", "fp32")


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How long and on how much. The learning rate belongs to the optimizer.

    ``warmup`` is the fraction of the steps that the rate rises over; ``clip`` the largest gradient norm (0: no
    clipping); ``precision`` "bf16" computes under autocast; ``eval_every`` and ``save_every`` are in steps, 0 for no
    evaluation before the end and for no checkpoints; ``trackers`` are names that transformers' ``report_to`` knows.
    """

    steps: int = 100
    batch_size: int = 8
    accumulation: int = 1
    max_length: int = 512
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float = 1.0
    precision: str = "bf16"
    packing: bool = False
    seed: int = 0
    eval_every: int = 0
    save_every: int = 50
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(
                    f"train.{name}", must=f"be one of {choices}", got=repr(value), do=did_you_mean(str(value), choices)
                )
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulation", 1), ("max_length", 2), ("clip", 0),
                            ("warmup", 0), ("eval_every", 0), ("save_every", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise OptionError(f"train.{name}", must=f"be >= {least}", got=getattr(self, name))
        if self.warmup > 1:
            raise OptionError("train.warmup", must="be <= 1", got=self.warmup, do="give the fraction of the steps")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """``curve`` is (step, loss) for every step; ``history`` all logged figures; ``seconds`` and ``tokens`` are totals.

    ``metrics``: ``loss`` and the objective's parts, averaged over the last tenth of the steps, and the same figures on
    the validation rows as ``eval_...``. After a resume all of it covers the whole run.
    """

    curve: list[tuple[int, float]]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    tokens: int
    steps: int


def train(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Any],
    *,
    objective: ObjectiveLike,
    optimizer: OptimizerLike,
    settings: TrainSettings,
    folder: Path,
    validation_rows: Sequence[Any] | None = None,
    resume: bool = True,
    progress: Callable[[int, int, float], None] | None = None,
) -> TrainResult:
    """Train the parameters of ``model`` that require gradients, in place; checkpoints go to ``folder``.

    ``progress(step, total, loss)`` is called after every step. With ``resume`` a run of the same settings, rows and
    model that ``folder`` holds goes on; without it, its checkpoints are removed. The global random state, the dtype of
    the weights, training mode and ``config.use_cache`` are left as they were.

    Raises InputError for a model with nothing to train, a quantised model without an adapter, no rows, a loss that is
    not finite, or checkpoints of another run in ``folder``; KeyboardInterrupt after ctrl-C, when it has saved.
    """
    _check_model(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with _kept_state(model), Interrupt() as interrupt:
        examples = _examples(objective, tokenizer, rows, settings, "rows")
        unpacked = dataclasses.replace(settings, packing=False)
        held_out = _examples(objective, tokenizer, validation_rows, unpacked, "validation") if validation_rows else []
        identity = run_identity(fingerprint(model), examples, objective, optimizer, settings)
        checkpoint = resume_point(folder, identity, resume)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # what prepare computes is compared with the loss, so it runs where and in the precision that the loss does
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16"):
            model.to(device)
            examples = objective.prepare(model, examples, tokenizer)
            held_out = objective.prepare(model, held_out, tokenizer) if held_out else []
        if interrupt.requested:
            raise KeyboardInterrupt
        trainer = Loop(model, tokenizer, examples, held_out, objective, optimizer, settings, folder)
        trainer.interrupt, trainer.progress = interrupt, progress
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if interrupt.requested:
            raise KeyboardInterrupt
        return _result(trainer, settings)


def _result(loop: Loop, settings: TrainSettings) -> TrainResult:
    """Totals and averages of the whole run, resumed parts included."""
    history: list[dict[str, Any]] = [entry for entry in loop.state.log_history if "train_runtime" not in entry]
    if loop.held_out and not any("eval_loss" in entry and entry["step"] == settings.steps for entry in history):
        loop.evaluate()
        history.append(loop.state.log_history[-1])
    steps = [entry for entry in history if "loss" in entry]
    tail = steps[-max(1, len(steps) // 10) :]
    names = [name for name in tail[-1] if name not in ("step", "epoch", "learning_rate", "grad_norm")]
    metrics = {name: float(np.mean([entry[name] for entry in tail if name in entry])) for name in names}
    for entry in history:
        metrics |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    curve = [(int(entry["step"]), float(entry["loss"])) for entry in steps]
    return TrainResult(curve, metrics, history, loop.seconds(), loop.tokens, loop.state.global_step)


@contextlib.contextmanager
def _kept_state(model: Any) -> Iterator[None]:
    """Half-precision trainable weights as float32 inside; random state, types, mode and use_cache restored after."""
    states = random.getstate(), np.random.get_state()
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    types = {p: p.dtype for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    level = logging.getLogger("transformers").level
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for parameter in types:
            parameter.data = parameter.data.float()
        try:
            yield
        finally:
            for parameter in model.parameters():
                parameter.grad = None
            for parameter, dtype in types.items():
                parameter.data = parameter.data.to(dtype)
            for module, mode in modes.items():
                module.training = mode
            if use_cache is not None:
                config.use_cache = use_cache
            random.setstate(states[0])
            np.random.set_state(states[1])
            logging.getLogger("transformers").setLevel(level)


def _check_model(model: Any) -> None:
    adapted = hasattr(model, "peft_config") or hasattr(model, "gossamer_adapter")
    if getattr(model, "is_quantized", False) and not adapted:
        raise InputError(
            "train: a quantised model",
            must="carry an adapter, since its own weights cannot move",
            got="none",
            do="attach an adapter before this step, or train before quantising",
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise InputError(
            "train: model",
            must="have parameters that require gradients",
            got="none",
            do="attach an adapter, or call model.requires_grad_(True)",
        )


def _examples(
    objective: ObjectiveLike, tokenizer: Any, rows: Sequence[Any], settings: TrainSettings, what: str
) -> list[Any]:
    if len(rows) == 0:
        raise InputError(f"train: {what}", must="hold at least one row", got=0)
    examples = objective.examples(rows, tokenizer, max_length=settings.max_length)
    if not settings.packing:
        return examples
    if not getattr(objective, "packs", False):
        raise OptionError("train.packing", must=f"be off with {objective.name}", got=True, do="set packing: false")
    return pack(examples, settings.max_length)
