"""AdamW: torch's own, with the options passed on."""

from __future__ import annotations

import pytest
import torch

from gossamer.core.errors import InputError
from gossamer.optimizers.adamw import AdamW


def test_one_step_is_the_formula() -> None:
    p = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = AdamW(lr=0.1, beta1=0.8, beta2=0.9, weight_decay=0.5, eps=1e-6).build([p])
    g = torch.tensor([[0.3, -0.01]])
    p.grad = g.clone()
    optimizer.step()
    # after one step the corrected averages are g and g^2
    expected = torch.tensor([[1.0, -2.0]]) * (1 - 0.1 * 0.5) - 0.1 * g / (g.abs() + 1e-6)
    assert torch.allclose(p, expected, atol=1e-6)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="at least one trainable parameter"):
        AdamW().build([])
