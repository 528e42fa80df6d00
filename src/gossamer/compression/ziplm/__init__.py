"""ZipLM: heads and neurons removed until a speed-up that is measured on the user's machine is met.

Kurtic, Frantar, Alistarh, NeurIPS 2023 (arXiv 2302.04089). Per block two layers are pruned, the attention output
``W_o`` by groups of heads and the FFN output ``W_2`` by neurons, with what feeds them (:mod:`gossamer.parts.surgery`).

1. Hessians ``H = 2/n sum x x^T`` of both layers' inputs on calibration data (:mod:`gossamer.parts.calibration`).
2. Units are removed one at a time, the one first whose removal, made up for by all other weights, costs least
   (:mod:`gossamer.compression.ziplm.removal`). Levels are kept: every count of heads, FFN widths
   ``round(d_ff levels_ffn^i)`` down to 1 %, and the module gone, bias included. The prior of a level is
   ``p_{l,s} = |W_s X - W X|^2 / |W X|^2``, 1 for a module that is gone.
3. A table says what each width costs: seconds here (:mod:`gossamer.compression.ziplm.costs`), parameters or bytes.
   The budget is ``T = whole / target - (whole - prunable)``.
4. Dynamic programming picks levels for given coefficients; local search over coefficients keeps what has the lowest
   real loss of the whole model with these levels (:mod:`gossamer.compression.ziplm.search`).
5. The tensors are cut. With ``tune_steps`` (gradual) the model is then distilled from the uncut one
   (:mod:`gossamer.compression.ziplm.tuning`), and the next target starts from there with new Hessians.

:meth:`ZipLM.family` gives a model for each target; ``compress`` gives the last: one-shot for that target alone,
gradually by way of those before.

Differences from the paper: errors count in units of real loss. ``p_{l,s}`` is multiplied by the slope of the loss over
it, from one and a half times to half of the units that matrix l keeps where one density for all meets the budget, the
other matrices as they are there: an error of attention costs a model far less than one of an FFN, and next to the whole
model hardly anything costs what it will among other cuts. The first start of the search has all coefficients 1; the
loss is looked at on the first ``search_tokens`` of the calibration; the token loss is SquareHead's, divided by the
teacher's size. Where a model has neither labels nor a next token to predict, the loss is the distance from its own
outputs.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.compression.ziplm.costs import Costs, compare, counted, head_counts, measured
from gossamer.compression.ziplm.removal import Levels, Removal, build_levels, ffn_widths, install, remove_units
from gossamer.compression.ziplm.search import Found, even, search
from gossamer.compression.ziplm.tuning import loss_of, tune
from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Compressed, Compression, CompressionReport, held_bytes
from gossamer.parts.calibration import Batch, check_batches, token_count
from gossamer.parts.surgery import Block, Keep, cut, find_blocks
from gossamer.parts.surgery_format import KEY

CARD = Card(
    title="ZipLM",
    paper="2302.04089",
    year=2023,
    claim="at 1.5 to 3 times the speed, loss below magnitude pruning's, below scores without update, below one level",
    requires=("float_weights",),
    forbids=("adapter_attached",),
    provides=("pruned",),
    registers=("widths:gossamer_widths",),
    families=("llama", "gpt2"),
    limits="recovery by long training and latencies on GPUs are not shown",
)
_LEAST = 0.3  # of the mean slope of its kind, since slopes are noisy


class ZipLMConfig(Config):
    targets: tuple[float, ...] = option(
        (1.5,), "how many times as fast, or as small; rising, the last one counts", ge=1
    )
    metric: str = option("latency", "what the targets are about", choices=("latency", "params", "memory"))
    tune_steps: int = option(0, "steps of distillation after each target; 0: one-shot", ge=0)
    timing: str = option("", "file with a table of costs; empty: measure or count", effect="speed")
    shape: tuple[int, ...] = option((1, 128), "rows and tokens that are timed and cached", ge=1, effect="speed")
    levels_ffn: float = option(0.9, "each FFN width over the one before", gt=0, lt=1)
    damp: float = option(0.01, "added to a singular Hessian, in mean diagonals", gt=0)
    search_tokens: int = option(16384, "calibration tokens on which the search looks at the loss", ge=1)
    search_starts: int = option(10, "coefficient vectors that the search starts from", ge=1)
    search_steps: int = option(50, "steps of local search", ge=0)
    mutate: float = option(0.1, "share of the coefficients that a step draws anew", gt=0, le=1)
    tune_rate: float = option(5e-5, "learning rate of the distillation", gt=0)
    distil: tuple[float, ...] = option((0.0, 1.0, 0.5), "weights of task, logit and token loss", ge=0)


class ZipLM(Compression):
    """Cuts a model to the targets. ``data`` is a list of token batches, 512 sequences or more where they can be had."""

    config_class = ZipLMConfig
    calibrates = True

    def check(self, model: Any, data: Any = None) -> None:
        super().check(model, data)
        config = self.config
        if not config.targets or any(b <= a for a, b in itertools.pairwise(config.targets)):
            raise OptionError(f"{self.name}.targets", must="be one or more rising numbers", got=config.targets)
        if len(config.shape) != 2:
            raise OptionError(f"{self.name}.shape", must="be two numbers, rows and tokens", got=config.shape)
        if len(config.distil) != 3 or not any(config.distil):
            raise OptionError(f"{self.name}.distil", must="be three weights, not all 0", got=config.distil)

    def compress(self, model: Any, data: Any = None) -> Compressed:
        """Cut ``model`` in place to the last target.

        InputError for unknown blocks, no or too little data or NaN Hessians; OptionError for a target out of reach.
        """
        run = Run(self, model, data)
        targets = self.config.targets if self.config.tune_steps else self.config.targets[-1:]
        reports = [run.reach(target) for target in targets]
        return Compressed(model, reports[-1])

    def family(self, model: Any, data: Any) -> Iterator[Compressed]:
        """A model for each target, in their order; ``model`` stays as it is. Errors as :meth:`compress`.

        One-shot, all come from the same levels of the uncut model. Gradually, each is the one before, cut further in
        place: save it before asking for the next.
        """
        self.check(model, data)
        if self.config.tune_steps:
            run = Run(self, copy.deepcopy(model), data)
            for target in self.config.targets:
                yield Compressed(run.model, run.reach(target))
            return
        first = Run(self, copy.deepcopy(model), data)
        levels = first.levels()
        for target in self.config.targets:
            found = first.search(levels, target)
            run = first.copied()
            yield Compressed(run.model, run.finish(levels, found, target))


class Run:
    """One model on its way to the targets; its costs are those of the uncut model throughout."""

    def __init__(self, system: ZipLM, model: Any, data: Any) -> None:
        self.config, self.seed, self.name, self.model = system.config, system.seed, system.name, model
        blocks = find_blocks(model)
        widest = max((max(b.neurons, b.heads * b.head_width) for b in blocks), default=1)
        self.batches = check_batches(data, self.name, width=widest)
        self.widths = ffn_widths(max(block.neurons for block in blocks), self.config.levels_ffn)
        self.costs = self._costs(blocks)
        self.bytes_before = held_bytes(model)
        self.loss = loss_of(model, _first(self.batches, self.config.search_tokens))
        self.loss_before = self.loss(model)
        self.teacher = copy.deepcopy(model) if self.config.tune_steps else None
        if self.config.tune_steps and self.config.distil[0] and not self._has_task():
            do = "set the first weight to 0, or give batches with labels"
            raise InputError(f"{self.name}.distil", must="have a task to learn", got="batches without labels", do=do)

    def reach(self, target: float) -> CompressionReport:
        """Cut the model to ``target``, and tune it where that is asked for."""
        levels = self.levels()
        return self.finish(levels, self.search(levels, target), target)

    def levels(self, removal: Removal | None = None) -> list[Levels]:
        """Levels of the model as it is now."""
        removal = removal or functools.partial(remove_units, damp=self.config.damp)
        return build_levels(self.model, self.batches, find_blocks(self.model), self.widths, removal)

    def search(self, levels: Sequence[Levels], target: float) -> Found:
        """The best levels for ``target``; the model is as before afterwards. OptionError where it is out of reach."""
        config, costs, budget = self.config, self.level_costs(levels), self.budget(target)
        if sum(cost[0] for cost in costs) <= budget:
            return Found((0,) * len(levels), self.loss(self.model), 1)
        start = self.even(levels, target)
        scales = self._scales(levels, start)
        errors = [scale * np.array(matrix.errors) for scale, matrix in zip(scales, levels, strict=True)]
        found = search(
            functools.partial(self.stitched_loss, levels), errors, costs, budget,
            starts=config.search_starts, steps=config.search_steps, mutate=config.mutate, seed=self.seed,
        )  # fmt: skip
        self._install(levels, [0] * len(levels))
        if found is None:
            raise self._unreachable(target)
        return found

    def even(self, levels: Sequence[Levels], target: float) -> tuple[int, ...]:
        """The levels of the largest density that meets ``target`` where all have it; OptionError where none does."""
        found = even([matrix.units for matrix in levels], self.level_costs(levels), self.budget(target))
        if found is None:
            raise self._unreachable(target)
        return found

    def stitched_loss(self, levels: Sequence[Levels], choice: Sequence[int]) -> float:
        """The real loss of the model with these levels, whose weights it is left with."""
        self._install(levels, choice)
        return self.loss(self.model)

    def level_costs(self, levels: Sequence[Levels]) -> list[Any]:
        """Costs of the levels of each matrix, by the table."""
        return [np.array(self._level_costs(matrix)) for matrix in levels]

    def budget(self, target: float) -> float:
        """``T``: what heads and neurons may cost together."""
        return self.costs.whole / target - self._rest

    def finish(self, levels: Sequence[Levels], found: Found, target: float) -> CompressionReport:
        """Cut the model to what was found, tune it, and say what came of it."""
        keeps: dict[int, Keep] = {}
        self._install(levels, found.levels)
        for matrix, level in zip(levels, found.levels, strict=True):
            keep = keeps.get(matrix.block.index, Keep())
            kept = matrix.levels[level].keep.tolist()
            keeps[matrix.block.index] = dataclasses.replace(keep, **{matrix.kind: kept})
        prices = self.level_costs(levels)
        spent = float(sum(price[level] for price, level in zip(prices, found.levels, strict=True)))
        cut(self.model, keeps)
        values = {
            "target": target,
            "metric": self.config.metric,
            "predicted": self.costs.whole / (self._rest + spent),
            "widths": getattr(self.model.config, KEY),
            "loss_before": self.loss_before,
            "loss": found.loss,
            "choices_scored": found.scored,
        }
        if self.config.tune_steps:
            config = self.config
            curve = tune(
                self.model, self.teacher, self.batches, steps=config.tune_steps, rate=config.tune_rate,
                weights=config.distil, seed=self.seed,
            )  # fmt: skip
            values |= {"loss_tuned": self.loss(self.model), "tuning": [value for _, value in curve]}
        if self.config.metric == "latency":
            values |= {"seconds_before": self.costs.whole, "seconds": compare([self.model], self.config.shape)[0]}
        return CompressionReport(self.bytes_before, held_bytes(self.model), values=values)

    def copied(self) -> Run:
        """The same run on a copy of the model."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        return other

    def _scales(self, levels: Sequence[Levels], start: Sequence[int]) -> list[float]:
        """The real loss over each matrix's error, between more and fewer of its units, the others at ``start``."""
        self._install(levels, start)
        slopes = []
        for matrix, level in zip(levels, start, strict=True):
            more, fewer = matrix.around(level)
            losses = []
            for place in (more, fewer):
                install(self.model, matrix, matrix.levels[place])
                losses.append(self.loss(self.model))
            install(self.model, matrix, matrix.levels[level])
            rise = matrix.errors[fewer] - matrix.errors[more]
            slopes.append((losses[1] - losses[0]) / rise if rise > 0 else 0.0)
        self._install(levels, [0] * len(levels))
        kinds = np.array([matrix.kind for matrix in levels])
        rising = np.maximum(slopes, 0.0)
        means = [rising[kinds == kind].mean() or rising.mean() or 1.0 for kind in kinds]
        return [max(scale, _LEAST * float(mean)) for scale, mean in zip(rising, means, strict=True)]

    def _unreachable(self, target: float) -> OptionError:
        most = self.costs.whole / self._rest
        return OptionError(
            f"{self.name}.targets",
            must=f"be at most {most:.2f}, what a model without any heads and neurons reaches",
            got=target,
            do="lower it, or time another shape",
        )

    def _install(self, levels: Sequence[Levels], choice: Sequence[int]) -> None:
        for matrix, level in zip(levels, choice, strict=True):
            install(self.model, matrix, matrix.levels[level])

    def _costs(self, blocks: Sequence[Block]) -> Costs:
        heads = {count for block in blocks for count in head_counts(block)}
        neurons = {*self.widths, *(block.neurons for block in blocks)}
        shape = (self.config.shape[0], self.config.shape[1])
        if self.config.timing:
            costs = Costs.load(Path(self.config.timing))
        elif self.config.metric == "latency":
            costs = measured(self.model, shape, heads, neurons)
        else:
            costs = counted(self.model, shape, heads, neurons, memory=self.config.metric == "memory")
        missing = sorted(heads - set(costs.heads)), sorted(neurons - set(costs.neurons))
        if any(missing):
            got = f"none for heads {missing[0]} and neurons {missing[1]}"
            raise InputError(f"{self.name}.timing", must="have a cost for every width", got=got, do="measure it anew")
        # a timing can come out below the sum of its parts
        self._rest = max(costs.whole - costs.prunable(blocks), 1e-3 * costs.whole)
        return costs

    def _level_costs(self, matrix: Levels) -> list[float]:
        if matrix.kind == "neurons":
            return [self.costs.neurons[len(level.keep)] for level in matrix.levels]
        return [self.costs.heads[count] for count in head_counts(matrix.block)]

    def _has_task(self) -> bool:
        return all("labels" in batch for batch in self.batches) or self.model.can_generate()


def _first(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """The first batches, until there are ``tokens``."""
    found: list[Batch] = []
    for batch in batches:
        found.append(batch)
        tokens -= token_count(batch)
        if tokens <= 0:
            break
    return found
