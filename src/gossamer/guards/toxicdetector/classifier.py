"""Features of a prompt against concepts, and the small network that judges them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (200, 100, 50, 20)
RATE, WEIGHT_DECAY, BATCH = 0.01, 2e-4, 20
HELD_OUT = 0.2  # share of rows kept from training where it stops early or a false-positive rate is aimed at

Feature = Callable[[Tensor, Tensor], Tensor]


def product(users: Tensor, concepts: Tensor) -> Tensor:
    """e_u * e_t, element-wise: [n, L, d] and [C, L, d] -> [n, C L d]."""
    return (users[:, None] * concepts[None]).flatten(1)


def inner(users: Tensor, concepts: Tensor) -> Tensor:
    """max over concepts of <e_u, e_t> per layer: [n, L, d] and [C, L, d] -> [n, L]."""
    return torch.einsum("nld,cld->ncl", users, concepts).amax(1)


def last(users: Tensor, concepts: Tensor) -> Tensor:
    """The states themselves, no concept: [n, L, d] -> [n, L d]."""
    return users.flatten(1)


FEATURES: dict[str, Feature] = {"product": product, "inner": inner, "last": last}


class Detector(nn.Module):
    """Standardised features through Linear 200, ReLU, then Linear, LayerNorm, ReLU of 100, 50, 20, then Linear 1."""

    mean: Tensor
    std: Tensor

    def __init__(self, feature: str, concepts: Tensor, width: int) -> None:
        """``concepts`` [C, L, d] (unused by "last"); ``width`` is the number of features."""
        super().__init__()
        self.feature, self.concepts = FEATURES[feature], concepts
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        layers: list[nn.Module] = [nn.Linear(width, WIDTHS[0]), nn.ReLU()]
        for before, after in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(before, after), nn.LayerNorm(after), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(WIDTHS[-1], 1))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, users: Tensor) -> Tensor:
        """States [n, L, d] -> logits [n]."""
        return self.mlp((self.feature(users, self.concepts) - self.mean) / self.std)[:, 0]

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """Probabilities of being toxic, float64 [n]."""
        parts = [self(part).double().sigmoid() for part in users.split(64)]
        return torch.cat(parts)

    def standardise(self, users: Tensor) -> None:
        """Take mean and deviation of each feature over the training rows; features that never vary are only centred."""
        count = len(users)
        total = sum((self.feature(part, self.concepts).double().sum(0) for part in users.split(64)), torch.zeros(()))
        mean = (total / count).float()
        squares = sum(
            ((self.feature(part, self.concepts) - mean).double().square().sum(0) for part in users.split(64)),
            torch.zeros(()),
        )
        std = (squares / count).sqrt().float()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.ones_like(std)))


def train(detector: Detector, users: Tensor, classes: Tensor, *, epochs: int, patience: int | None) -> Tensor:
    """Fit on states [n, L, d] and classes [n]; returns which rows took part, bool [n].

    Class-weighted cross-entropy, Adam at 0.01 with weight decay 2e-4, batches of 20. With ``patience`` a fifth of the
    rows is held out, and the weights of the epoch with the lowest held-out loss are kept once it has not fallen for
    that many epochs. Random numbers come from torch's global generator.
    """
    used = torch.ones(len(classes), dtype=torch.bool)
    if patience is not None:
        used = ~held_out(classes)
    weights = torch.where(classes == 1, 1 / classes[used].sum(), 1 / (1 - classes[used]).sum()) * used.sum() / 2
    detector.standardise(users[used])
    optimizer = torch.optim.Adam(detector.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY, fused=True)
    best, kept, since = float("inf"), detector.state_dict(), 0
    for _ in range(epochs):
        for rows in _batches(used.nonzero()[:, 0]):
            loss = F.binary_cross_entropy_with_logits(detector(users[rows]), classes[rows], weights[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if patience is None:
            continue
        with torch.no_grad():
            value = float(F.binary_cross_entropy_with_logits(detector(users[~used]), classes[~used], weights[~used]))
        if value < best:
            best, kept, since = value, copy.deepcopy(detector.state_dict()), 0
        else:
            since += 1
            if since == patience:
                break
    detector.load_state_dict(kept)
    return used


def held_out(classes: Tensor) -> Tensor:
    """A random fifth of each class, at least one row: bool [n]."""
    chosen = torch.zeros(len(classes), dtype=torch.bool)
    for value in (0, 1):
        rows = (classes == value).nonzero()[:, 0]
        chosen[rows[torch.randperm(len(rows))[: max(1, int(HELD_OUT * len(rows)))]]] = True
    return chosen


def threshold_at(benign: Tensor, rate: float) -> float:
    """The lowest threshold at which at most ``rate`` of the benign scores [n] are flagged."""
    ordered = benign.double().sort(descending=True).values
    allowed = int(rate * len(ordered))
    if allowed >= len(ordered):
        return 0.0
    return float(torch.nextafter(ordered[allowed], torch.tensor(2.0, dtype=torch.float64)))


def pack(detectors: Mapping[str, Detector]) -> dict[str, Tensor]:
    """All weights and statistics under ``<number>.<name>``."""
    return {
        f"{number}.{name}": tensor.detach().clone()
        for number, detector in enumerate(detectors.values())
        for name, tensor in detector.state_dict().items()
    }


def unpack(detector: Detector, number: int, tensors: Mapping[str, Tensor]) -> Detector:
    """``detector`` with the weights that :func:`pack` wrote as ``number``."""
    start = f"{number}."
    detector.load_state_dict({k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)})
    return detector.eval()


def _batches(rows: Tensor) -> Iterator[Tensor]:
    return iter(rows[torch.randperm(len(rows))].split(BATCH))
