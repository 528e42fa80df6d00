"""DyVTE: all image tokens leave the decoder at once, at a layer that a small gate chooses for each prompt.

After layer i, with h [t, d] its output, a gate looks at the prompt's text alone:

    z = [mean of the text tokens after the image, the last left out ; last token of the prompt]     in R^2d
    g_i(z) = W2 GELU(W1 z)          W1: 2d -> w, W2: w -> 2, no bias; exit where softmax(g_i)[1] > threshold

The first gate that says exit wins: image tokens are deleted, the others keep their positions, deeper layers cache no
image keys. No gate is asked while single tokens are decoded.

Gates are trained on a frozen model from rows {image, question, answer}. For a layer drawn uniformly the forward pass is
continued twice from the same states, with and without image keys, and a row's label is

    y = 1 (exit)   iff   more than `agree` of the likeliest tokens agree and loss_without < loss_ratio loss_with

with cross-entropy on g_i(z). The continuation without image keys removes the image tokens, which is the same for text.
:meth:`DyVTE.analyse` is the paper's empirical part: attention masses, and what is lost by removal after each layer.

Different from the paper: several layers may be drawn for a batch (one forward pass gives the states of all); rows of a
batch exit one by one; the rate is set for small gates (paper: 6e-5, batches of 128, one pass over 1 % of LLaVA's data).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.acceleration.dyvte.gates import Gates, gate_input
from gossamer.acceleration.dyvte.removal import passes
from gossamer.core.card import Card
from gossamer.core.errors import InputError, OptionError
from gossamer.core.options import Config, option
from gossamer.kinds.acceleration import Acceleration
from gossamer.kinds.base import FittedSystem, State
from gossamer.kinds.objectives import without_dropout
from gossamer.parts.fingerprint import fingerprint
from gossamer.parts.selection_costs import costs
from gossamer.parts.token_layouts import Layout
from gossamer.parts.token_selection import Decoder, Run, TokenSelection

CARD = Card(
    title="Dynamic Visual-Token Exit",
    paper="2411.19628",
    year=2024,
    modality=("text", "image"),
    claim="at equal mean cost, answers better than one fixed exit layer for all prompts and than random exits",
    traits=("needs_fit",),
    families=("llava",),
    limits="public benchmarks and models beyond the nursery's are not shown here",
)
WARMUP = 0.03  # share of the steps


class DyVTEConfig(Config):
    gate_width: int | None = option(None, "width of a gate; the model's own, at most 2048, where not given", ge=1)
    min_layer: int = option(1, "layers that always see the image", ge=1)
    threshold: float = option(0.5, "exit where its probability is above this", ge=0, le=1)
    agree: float = option(0.99, "label exit: more than this share of likeliest answer tokens agree", ge=0, le=1)
    loss_ratio: float = option(1.03, "label exit: loss without the image below this times the loss with it", gt=0)
    balance_classes: bool = option(False, "weigh exit and keep alike in the gates' loss, layer by layer")
    fixed_exit: int | None = option(None, "leave after this many layers whatever the prompt (no gates)", ge=1)
    steps: int = option(300, "training steps of the gates", ge=1)
    batch_size: int = option(16, "rows a step", ge=1)
    layers_per_batch: int = option(1, "layers drawn for each batch", ge=1)
    rate: float = option(1e-3, "peak learning rate (AdamW, cosine)", gt=0)


class DyVTE(FittedSystem, Acceleration):
    config_class = DyVTEConfig
    config: DyVTEConfig
    _selection: TokenSelection | None = None
    _gates: Gates | None = None

    def accelerate(self, model: Any, processor: Any = None) -> tuple[Any, Any]:
        fixed = self.config.fixed_exit
        if fixed is None and self._gates is None:
            do = "call fit(bundle, rows), load a saved state, or set fixed_exit"
            raise InputError(f"{self.name}.accelerate", must="be fitted first", got="no gates", do=do)
        if fixed is None and fingerprint(model) != self.fingerprint:
            do = "fit it on this model"
            raise InputError(f"{self.name}.accelerate", must="get the model it was fitted on", got="another", do=do)
        selection = TokenSelection(model, self._policy, renumber=False)
        _inside("fixed_exit", fixed or 1, len(selection.decoder.layers))
        _inside("min_layer", self.config.min_layer, len(selection.decoder.layers))
        selection.install()
        self._selection = selection
        return model, processor

    def release(self, model: Any) -> Any:
        self.released(model)
        TokenSelection.take_off(model)
        return model

    def report(self) -> dict[str, Any]:
        """As :func:`gossamer.parts.selection_costs.costs`, gates included, with ``exits``.

        ``exits`` gives for each row how many layers saw the image: all of them where it never left, 0 without one.
        """
        run = self._selection.last if self._selection is not None else None
        if run is None or self._selection is None:
            do = "accelerate a model and run it on a prompt"
            raise InputError(f"{self.name}.report", must="follow a prefill", got="none yet", do=do)
        found = costs(run, self._selection.decoder, self.name)
        gates = 0
        if self._gates is not None and self.config.fixed_exit is None:
            gates = run.notes.get("asked", 0) * self._gates.operations
        exits = [sum(count > 0 for count in row) for row in found["visual"]]
        return {**found, "operations": found["operations"] + gates, "gate_operations": gates, "exits": exits}

    def learn(self, bundle: Any, data: Any) -> State:
        """Train the gates; rows without an image are left out."""
        rows = [row for row in data if row.get("image") is not None]
        if not rows:
            raise InputError(f"{self.name}.fit", must="get rows with an image, a question and an answer", got="none")
        decoder = Decoder(bundle.model)
        layers = len(decoder.layers)
        _inside("min_layer", self.config.min_layer, layers)
        if self.config.fixed_exit is not None:
            return State({}, {"layers": layers})
        width = self.config.gate_width or min(2048, decoder.config.hidden_size)
        generator = torch.Generator().manual_seed(self.seed)
        gates = Gates(layers, decoder.config.hidden_size, width, generator).to(bundle.model.device)
        with without_dropout(bundle.model):
            self._train(gates, decoder, rows, bundle.processor, generator)
        return State({name: tensor.detach().cpu() for name, tensor in gates.state_dict().items()}, {"layers": layers})

    def ready(self, bundle: Any) -> None:
        assert self.state is not None
        self._gates = None
        if self.state.tensors:
            layers, width, twice = self.state.tensors["first"].shape
            self._gates = Gates(layers + 1, twice // 2, width, torch.Generator())
            self._gates.load_state_dict(self.state.tensors)
            self._gates.to(bundle.model.device)

    def confusion(self, bundle: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = 16) -> Tensor:
        """Counts [layers - 1, 2, 2] of held-out rows: by layers done (from 1), by label, by the gate's word."""
        assert self._gates is not None, "fit it first"
        decoder = Decoder(bundle.model)
        counts = torch.zeros(len(decoder.layers) - 1, 2, 2, dtype=torch.long)
        with without_dropout(bundle.model):
            for passed in passes(decoder, rows, bundle.processor, batch_size):
                for done in range(1, len(decoder.layers)):
                    labels = passed.labels(done, self.config.agree, self.config.loss_ratio)
                    words = self._exits(done, passed.hidden[done], passed.layout, passed.run)
                    for label, word in zip(labels.tolist(), words.tolist(), strict=True):
                        counts[done - 1, int(label), int(word)] += 1
        return counts

    @staticmethod
    def analyse(bundle: Any, rows: Sequence[Mapping[str, Any]], batch_size: int = 16) -> dict[str, list[float]]:
        """The empirical part. Per layer, mean over rows: what a text token's attention gives to image and to text, an
        image token's to image, the last prompt token's to image. Per number of layers done from 0 to all: ``correct``,
        share of answers that are the likeliest tokens throughout when the image leaves then, and ``agreement``, share
        of likeliest tokens as in the full model."""
        decoder = Decoder(bundle.model)
        layers = len(decoder.layers)
        masses = torch.zeros(4, layers, dtype=torch.float64)
        ends = torch.zeros(2, layers + 1, dtype=torch.float64)
        count = 0
        with without_dropout(bundle.model):
            for passed in passes(decoder, rows, bundle.processor, batch_size):
                count += len(passed.run.image)
                for layer in range(layers):
                    masses[:, layer] += passed.masses(layer)
                for done in range(layers + 1):
                    end = passed.without(done)
                    ends[:, done] += torch.stack([end.correct.double().sum(), end.agreement.double().sum()]).cpu()
        names = ("text_to_image", "text_to_text", "image_to_image", "last_to_image")
        found = dict(zip(names, (masses / count).tolist(), strict=True))
        return found | dict(zip(("correct", "agreement"), (ends / count).tolist(), strict=True))

    def _train(
        self, gates: Gates, decoder: Decoder, rows: Sequence[Any], processor: Any, draw: torch.Generator
    ) -> None:
        """Cross-entropy of the drawn layers' gates against labels from both continuations."""
        choices = range(self.config.min_layer, len(decoder.layers))
        optimizer = torch.optim.AdamW(gates.parameters(), lr=self.config.rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, self.config.steps))
        seen = torch.ones(len(decoder.layers), 2, device=gates.first.device)
        for chosen in itertools.islice(_drawn(rows, self.config.batch_size, draw), self.config.steps):
            (passed,) = passes(decoder, chosen, processor, len(chosen))
            drawn = torch.randperm(len(choices), generator=draw)[: self.config.layers_per_batch].tolist()
            losses = []
            for done in (choices[number] for number in drawn):
                labels = passed.labels(done, self.config.agree, self.config.loss_ratio).long()
                seen[done] += F.one_hot(labels, 2).sum(0)
                weight = seen[done].sum() / (2 * seen[done]) if self.config.balance_classes else None
                with torch.enable_grad():
                    z = gate_input(passed.hidden[done], passed.layout, passed.run)
                    losses.append(F.cross_entropy(gates(done, z), labels, weight=weight))
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
            schedule.step()

    def _policy(self, layer: int, hidden: Tensor, layout: Layout, run: Run) -> Tensor | None:
        """bool [b, t]: all tokens but the images of rows that exit now, with ``layer`` layers done."""
        image = layout.of(run.image & ~run.asks)
        there = image.any(1)
        if layer < self.config.min_layer or not bool(there.any()):
            return None
        if self.config.fixed_exit is not None:
            leave = there & (layer >= self.config.fixed_exit)
        else:
            run.notes["asked"] = run.notes.get("asked", 0) + int(there.sum())
            leave = there & self._exits(layer, hidden, layout, run)
        return layout.mask & ~(image & leave[:, None])

    @torch.no_grad()
    def chances(self, done: int, hidden: Tensor, layout: Layout, run: Run) -> Tensor:
        """Each row's probability of exit by the gate after ``done`` layers, float32 [b]."""
        assert self._gates is not None, "fit it first"
        logits: Tensor = self._gates(done, gate_input(hidden, layout, run))
        return logits.softmax(-1)[:, 1]

    def _exits(self, done: int, hidden: Tensor, layout: Layout, run: Run) -> Tensor:
        return self.chances(done, hidden, layout, run) > self.config.threshold


def _drawn(rows: Sequence[Any], size: int, generator: torch.Generator) -> Iterator[list[Any]]:
    """Batches for ever, one shuffled pass over the rows after another."""
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), size):
            yield [rows[number] for number in order[start : start + size]]


def _rate(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def _inside(name: str, value: int, layers: int) -> None:
    if value >= layers:
        do = "the last layer's output is no longer read by others"
        raise OptionError(f"dyvte.{name}", must=f"be below the number of layers, {layers}", got=value, do=do)
