"""Training drafters: hidden states of the base captured once, labels of three sorts, one loop.

A window is a row's tokens 0..n-1; ``states`` [layers, n, d] are the base's, taken by the decoding runner itself, so
that a drafter learns from what it will be given (int8 too). With p the place that a distribution is read at, the label
of place p is

    text         token p + 1
    base_argmax  argmax of the base's distribution at p
    base_soft    that distribution, cross-entropy against it

and a head that is ``shift`` places ahead at index t is compared with the label of place t + shift. Only places whose
next token has weight in the row count. The base's output matrix is shared and frozen (:class:`Reading`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.core.errors import InputError, OptionError
from gossamer.parts.data import tokenise
from gossamer.parts.data_tokens import IGNORE, Example
from gossamer.parts.decode_native import Library, NativeWeight
from gossamer.parts.decode_plan import NotPlanned, read_plan
from gossamer.parts.decode_runner import BLOCK, Runner
from gossamer.parts.decode_state import Chunk, chain
from gossamer.parts.decode_weights import float_weight, rounded

LABELS = ("text", "base_argmax", "base_soft")
_MANY = 8  # windows that the runner sees at a time


@dataclasses.dataclass(frozen=True)
class Window:
    """``counts[p]``: whether token p is one that is learnt; ``states`` [layers, n, d] float32."""

    ids: list[int]
    counts: list[bool]
    states: Tensor


@dataclasses.dataclass(frozen=True)
class Batch:
    """Windows padded on the right: ids, counts [b, n]; states [layers, b, n, d]."""

    ids: Tensor
    counts: Tensor
    states: Tensor


class Reading:
    """The base's output matrix over all tokens, or over those of ``vocabulary`` [v]. Gradients go to the input only."""

    def __init__(self, model: Any, vocabulary: Tensor | None = None) -> None:
        try:
            plan = read_plan(model)
            matrix = float_weight(plan.head, "float32", torch.float32)
            weight, bias, self.cap = matrix.weight, matrix.bias, plan.softcap
        except NotPlanned:
            head = model.get_output_embeddings()
            weight, bias, self.cap = head.weight.detach().float(), getattr(head, "bias", None), None
        self.whole, self.vocabulary = weight, vocabulary
        self.weight = weight if vocabulary is None else weight[vocabulary]
        self.bias = bias if bias is None or vocabulary is None else bias[vocabulary]
        self.columns: Tensor | None = None
        if vocabulary is not None:
            self.columns = torch.full((len(weight),), IGNORE, device=weight.device)
            self.columns[vocabulary] = torch.arange(len(vocabulary), device=weight.device)
        self._quick: NativeWeight | None = None

    def quicken(self, library: Library) -> None:
        """Read by the kernels of the runner, in 8 bits, wherever no gradient is asked for."""
        self._quick = NativeWeight(rounded(self.weight, self.bias, 8), library)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [..., v] from normed states [..., d]."""
        if self._quick is None or torch.is_grad_enabled():
            scores = F.linear(x, self.weight, self.bias)
        else:
            scores = self._quick(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def rows(self, ids: Tensor) -> Tensor:
        """The matrix's own rows [..., d] of token ids."""
        return self.whole[ids]

    def tokens(self, columns: Tensor) -> Tensor:
        """Token ids of columns."""
        return columns if self.vocabulary is None else self.vocabulary[columns]


class Targets:
    """The labels of a batch, ``labels`` among :data:`LABELS`; ``last`` [b, n, d] are the base's last, normed states."""

    def __init__(self, batch: Batch, last: Tensor, labels: str, reading: Reading) -> None:
        self.counts = batch.counts[:, 1:]
        with torch.no_grad():
            base = reading(last[:, :-1]) if labels != "text" else None
        self.soft = base.softmax(-1) if base is not None and labels == "base_soft" else None
        if base is not None:
            self.hard = base.argmax(-1)
        else:
            self.hard = batch.ids[:, 1:] if reading.columns is None else reading.columns[batch.ids[:, 1:]]
        self.hard = self.hard.masked_fill(~self.counts, IGNORE)

    def loss(self, logits: Tensor, shift: int) -> Tensor:
        """Mean cross-entropy (nats) of logits [b, m, v] at indices 0..m-1 with the labels ``shift`` places on."""
        count = min(logits.shape[1], self.hard.shape[1] - shift)
        hard = self.hard[:, shift : shift + count]
        logits = logits[:, :count]
        if self.soft is not None:
            each = -(self.soft[:, shift : shift + count] * logits.log_softmax(-1)).sum(-1)
            return (each * (hard != IGNORE)).sum() / (hard != IGNORE).sum().clamp(min=1)
        total = F.cross_entropy(logits.flatten(0, 1), hard.flatten(), ignore_index=IGNORE, reduction="sum")
        return total / (hard != IGNORE).sum().clamp(min=1)


def capture(
    runner: Runner, rows: Sequence[Any], tokenizer: Any, *, length: int, hidden: Sequence[int], where: str
) -> list[Window]:
    """Windows of at most ``length`` tokens with the base's states; rows as :func:`gossamer.parts.data.tokenise` takes
    them, those of fewer than four tokens left out. Raises InputError where none is left."""
    if length > runner.max_length:
        raise OptionError(f"{where}: length", must=f"be at most the base's {runner.max_length} tokens", got=length)
    examples = [tokenise(row, tokenizer, max_length=length) for row in rows]
    chosen = [one for one in examples if isinstance(one, Example) and len(one.input_ids) > 3]
    if not chosen:
        raise InputError(
            f"{where}.fit", must="get rows of text, completions or messages of four tokens or more", got=len(rows)
        )
    found = []
    for start in range(0, len(chosen), _MANY):
        part = chosen[start : start + _MANY]
        for example, states in zip(part, _states(runner, [e.input_ids for e in part], hidden), strict=True):
            counts = [label != IGNORE for label in example.labels]
            found.append(Window(example.input_ids, counts, states))
    return found


def frequent(windows: Sequence[Window], size: int | None, total: int) -> Tensor | None:
    """The ``size`` most frequent tokens, sorted; ``None`` for all of ``total``. Ids seen nowhere fill it up."""
    if size is None or size >= total:
        return None
    counts = Counter(itertools.chain.from_iterable(window.ids for window in windows))
    ranked = [token for token, _ in counts.most_common(size)]
    rest = itertools.islice((token for token in range(total) if token not in counts), max(0, size - len(ranked)))
    return torch.tensor(sorted([*ranked, *rest]))


def train(
    module: nn.Module,
    loss: Callable[[Batch], Tensor],
    windows: Sequence[Window],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    betas: tuple[float, float] = (0.9, 0.95),
    warmup: float = 0.05,
    cosine: bool = True,
    clip: float = 0.5,
) -> list[float]:
    """AdamW without decay on ``module``, warm-up over a share of the steps, then cosine or linear; losses by step."""
    device = next(module.parameters()).device
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=betas, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, warmup, cosine))
    found = []
    module.train()
    for chosen in itertools.islice(_drawn(windows, batch_size, seed), steps):
        with torch.enable_grad():
            value = loss(_batch(chosen, device))
            optimizer.zero_grad()
            value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        schedule.step()
        found.append(float(value.detach()))
    module.eval()
    return found


def _states(runner: Runner, texts: Sequence[list[int]], hidden: Sequence[int]) -> list[Tensor]:
    """[layers, n, d] of each text."""
    states = [runner.open() for _ in texts]
    parts: list[list[Tensor]] = [[] for _ in texts]
    for start in range(0, max(map(len, texts)), BLOCK):
        live = [n for n, text in enumerate(texts) if len(text) > start]
        pieces = [texts[n][start : start + BLOCK] for n in live]
        chunks = [Chunk(states[n], p, chain(len(p)), "none") for n, p in zip(live, pieces, strict=True)]
        for n, out in zip(live, runner.run(chunks, hidden), strict=True):
            assert out.hidden is not None
            parts[n].append(out.hidden.float())
    return [torch.cat(part, 1) for part in parts]


def _batch(windows: Sequence[Window], device: Any) -> Batch:
    n = max(len(window.ids) for window in windows)
    ids = torch.tensor([w.ids + [0] * (n - len(w.ids)) for w in windows], device=device)
    counts = torch.tensor([w.counts + [False] * (n - len(w.ids)) for w in windows], device=device)
    states = torch.stack([F.pad(w.states, (0, 0, 0, n - len(w.ids))) for w in windows], 1)
    return Batch(ids, counts, states.to(device))


def _drawn(windows: Sequence[Window], size: int, seed: int) -> Iterator[list[Window]]:
    """Batches for ever, one shuffled pass after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(windows), generator=generator).tolist()
        for start in range(0, len(windows), size):
            yield [windows[number] for number in order[start : start + size]]


def _rate(step: int, steps: int, warmup: float, cosine: bool) -> float:
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.5 * (1 + math.cos(math.pi * done)) if cosine else 1 - done
