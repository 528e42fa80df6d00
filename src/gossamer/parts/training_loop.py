"""The loop under the trainer: transformers' Trainer with the objective's loss, own checkpoints, and hooks.

What is replaced, and why: the sampler (one order for the whole run, a function of the seed), the loss and its
normaliser (over all micro-batches of a step), autocast (around the loss alone, since accelerate would leave the model's
forward patched), checkpoints (whole or absent, trainable weights only), evaluation (the objective's own loss).
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from gossamer.core.errors import InputError, OptionError
from gossamer.core.paths import atomic_dir, write_json
from gossamer.parts.checkpoints import checkpoints, load_trainable, trainable_state
from gossamer.parts.scheduled import penalties, tell_step

if TYPE_CHECKING:
    from gossamer.parts.training import TrainSettings

KEPT = 2  # checkpoints that stay: the newest, and one to fall back on

Batch = dict[str, Any]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


class ObjectiveLike(Protocol):
    """What the trainer needs of an objective; see :class:`gossamer.kinds.objectives.Objective`."""

    @property
    def name(self) -> str: ...
    def examples(self, rows: Sequence[Any], tokenizer: Any, *, max_length: int) -> list[Any]: ...
    def prepare(self, model: nn.Module, examples: list[Any], tokenizer: Any) -> list[Any]: ...
    def collate(self, examples: list[Any], tokenizer: Any) -> Batch: ...
    def amount(self, batch: Batch) -> float: ...
    def loss(self, model: nn.Module, batch: Batch) -> Any: ...
    def modules(self, model: nn.Module) -> nn.Module | None: ...


class OptimizerLike(Protocol):
    """What the trainer needs of an optimizer; see :class:`gossamer.kinds.optimizers.Optimizer`."""

    @property
    def name(self) -> str: ...
    def build(self, params: Any) -> torch.optim.Optimizer: ...
    def callbacks(self, model: nn.Module, objective: Any) -> list[Any]: ...


class StepHook(Protocol):
    """A callback of an optimizer that sees the batches. ``step`` counts the finished steps, so the first is 0.

    ``before_step`` runs before the forward passes of a step, with all gradients empty, and leaves them empty;
    ``after_step`` runs after the update and returns figures to log.
    """

    def before_step(
        self, step: int, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], autocast: Autocast
    ) -> None: ...
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> dict[str, float]: ...


def parameter_groups(*modules: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with the optimizer's weight decay, vectors without."""
    unique = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    matrices = [p for p in unique.values() if p.ndim >= 2]
    vectors = [p for p in unique.values() if p.ndim < 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def rate_factor(step: int, settings: TrainSettings) -> float:
    """Share of the full learning rate at ``step`` (0 ... steps - 1): linear warm-up, then the schedule, never 0."""
    warm = round(settings.warmup * settings.steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warm) / max(1, settings.steps - warm))
    return 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class Stream(Dataset[Any]):
    """All rows of a run in the order they are trained on: one shuffled pass over the examples after another."""

    def __init__(self, examples: Sequence[Any], settings: TrainSettings) -> None:
        self.examples = examples
        wanted = settings.steps * settings.batch_size * settings.accumulation
        shuffle = np.random.default_rng(settings.seed)
        passes = -(-wanted // len(examples))
        self.order = np.concatenate([shuffle.permutation(len(examples)) for _ in range(passes)])[:wanted]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Any:
        return self.examples[int(self.order[place])]


class Loop(Trainer):
    """One run. ``batches`` are those of the present step, ``tokens`` all real tokens seen so far."""

    model: Any
    optimizer: Any
    objective: ObjectiveLike
    interrupt: Interrupt
    progress: Callable[[int, int, float], None] | None

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        examples: list[Any],
        held_out: list[Any],
        objective: ObjectiveLike,
        optimizer: OptimizerLike,
        settings: TrainSettings,
        folder: Path,
    ) -> None:
        self.objective, self.optimizer_system, self.settings, self.folder = objective, optimizer, settings, folder
        self.tokenizer, self.held_out = tokenizer, held_out
        self.heads = objective.modules(model)
        self.tokens, self.started, self.seconds_before = 0, time.perf_counter(), 0.0
        self.batches: list[Batch] = []
        self.figures: dict[str, float] = {}
        callbacks = optimizer.callbacks(model, objective)
        self.hooks: list[StepHook] = [hook for hook in callbacks if hasattr(hook, "before_step")]
        arguments = _arguments(settings, folder, evaluates=bool(held_out))
        try:
            super().__init__(
                model=model,
                args=arguments,
                data_collator=lambda chosen: objective.collate(chosen, tokenizer),
                train_dataset=Stream(examples, settings),
                eval_dataset=held_out or None,
                callbacks=[_Steps(self), *(item for item in callbacks if isinstance(item, TrainerCallback))],
            )
        except (ValueError, RuntimeError, ImportError) as error:
            if not settings.trackers:
                raise
            raise OptionError(
                "train.trackers", must="be installed and known", got=f"{settings.trackers}: {error}"
            ) from error
        self.remove_callback(PrinterCallback)
        self.loss_is_scaled_for_ga = True

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        """Autocast around the loss alone, which leaves the model's own forward as it is."""
        stack = contextlib.ExitStack()
        if self.settings.precision == "bf16":
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Batch], None]:
        self.batches = [self._prepare_inputs(next(epoch_iterator)) for _ in range(num_batches)]
        total = sum(self.objective.amount(batch) for batch in self.batches)
        if total <= 0:
            raise InputError(
                f"training step {self.state.global_step + 1}",
                must="have something to learn from",
                got="rows without supervised tokens or with weight 0",
                do="raise max_length, or look at the rows with `gossamer check`",
            )
        for batch in self.batches:
            batch["normaliser"] = total
            self.tokens += int(batch["attention_mask"].sum())
        return self.batches, None

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        assert not return_outputs, "evaluation is the objective's own"
        result = self.objective.loss(self.model, inputs)
        share = self.objective.amount(inputs) / inputs["normaliser"]
        for name, value in result.parts.items():
            self.figures[name] = self.figures.get(name, 0.0) + share * value
        value = result.value
        for name, term in penalties(self.model).items():
            self.figures[name] = self.figures.get(name, 0.0) + share * float(term.detach())
            value = value + share * term
        return value

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Mean loss and parts over the validation rows, weighted by amount."""
        was_training = self.model.training
        self.model.eval()
        sums: dict[str, float] = {}
        amount = 0.0
        try:
            for first in range(0, len(self.held_out), self.settings.batch_size):
                chunk = self.held_out[first : first + self.settings.batch_size]
                batch = self._prepare_inputs(self.objective.collate(chunk, self.tokenizer))
                with torch.no_grad(), self.compute_loss_context_manager():
                    result = self.objective.loss(self.model, batch)
                weight = self.objective.amount(batch)
                amount += weight
                for name, value in {"loss": float(result.value), **result.parts}.items():
                    sums[name] = sums.get(name, 0.0) + weight * value
        finally:
            self.model.train(was_training)
        metrics = {f"eval_{name}": value / amount for name, value in sums.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = logs | self.figures
            self.figures = {}
            if self.progress is not None:
                self.progress(self.state.global_step, self.state.max_steps, logs["loss"])
        super().log(logs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        modules = [self.model] if self.heads is None else [self.model, self.heads.to(self.args.device)]
        groups = parameter_groups(*modules)
        self.trainable = [p for group in groups for p in group["params"]]
        self.optimizer = self.plain_optimizer = self.optimizer_system.build(groups)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        target = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(target, lambda step: rate_factor(step, self.settings))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def floating_point_ops(self, inputs: Batch) -> int:
        return 0

    def _clip_grad_norm(self, model: Any) -> Tensor:
        return nn.utils.clip_grad_norm_(self.trainable, self.args.max_grad_norm)

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        step = self.state.global_step
        with atomic_dir(self.folder / f"checkpoint-{step}") as path:
            save_file(trainable_state(self.model, self.heads), path / "trainable.safetensors")
            self._save_optimizer_and_scheduler(str(path))
            self._save_rng_state(str(path))
            self.state.save_to_json(str(path / "trainer_state.json"))
            sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
            totals = {"step": step, "tokens": self.tokens, "seconds": self.seconds()}
            write_json(path / "complete.json", {**totals, "files": sizes})
        for old in checkpoints(self.folder)[:-KEPT]:
            shutil.rmtree(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        path = Path(resume_from_checkpoint)
        totals = json.loads((path / "complete.json").read_text(encoding="utf-8"))
        self.tokens, self.seconds_before = totals["tokens"], totals["seconds"]
        load_trainable(self.model, self.heads, load_file(path / "trainable.safetensors"))

    def seconds(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + time.perf_counter() - self.started


class _Steps(TrainerCallback):
    """Runs the hooks around every step and ends the run after the step in which ctrl-C was pressed."""

    def __init__(self, trainer: Loop) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        tell_step(self.trainer.model, state.global_step, state.max_steps)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        for hook in trainer.hooks:
            hook.before_step(
                state.global_step, trainer.plain_optimizer, trainer.batches, trainer.compute_loss_context_manager
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.heads is not None:
            trainer.heads.zero_grad()
        for hook in trainer.hooks:
            trainer.figures |= hook.after_step(state.global_step - 1, trainer.plain_optimizer)
        tell_step(trainer.model, state.global_step, state.max_steps)
        if trainer.interrupt.requested:
            control.should_training_stop = True
            control.should_save = trainer.settings.save_every > 0


class Interrupt:
    """Turns the first ctrl-C into a request; the second one raises at once. Only the main thread has signals."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _note(self, *_: Any) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


def _arguments(settings: TrainSettings, folder: Path, *, evaluates: bool) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        max_grad_norm=settings.clip,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps" if settings.save_every else "no",
        save_steps=settings.save_every or settings.steps,
        eval_strategy="steps" if settings.eval_every and evaluates else "no",
        eval_steps=settings.eval_every or None,
        seed=settings.seed,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=list(settings.trackers) or "none",
        use_cpu=not torch.cuda.is_available(),
    )
    if arguments.world_size > 1:
        raise InputError("train", must="run in one process", got=arguments.world_size, do="start it without torchrun")
    # several visible GPUs would make the Trainer wrap the model in DataParallel
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
