"""A request's keys and values: its memory is that of the tokens it holds, not of those it has room for."""

from __future__ import annotations

import pytest
import torch

from gossamer.parts.decode_state import LANES, State

resource = pytest.importorskip("resource")
CAPACITY = 16_384


def opened(blocked: bool) -> State:
    """256 MB of room."""
    return State([(1, 256)] * 8, CAPACITY, torch.float32, "cpu", blocked)


def faults() -> int:
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


@pytest.mark.parametrize("blocked", [False, True])
def test_room_costs_nothing_however_often_it_is_given_back(blocked: bool) -> None:
    state = opened(blocked)
    for keys, values in zip(state.keys, state.values, strict=True):
        keys.fill_(1)
        values.fill_(1)
    del state
    before = faults()
    for _ in range(3):
        state = opened(blocked)
        state.length = 100
        twin = state.fork()
        del state
        assert not any(tensor[:, -1].any() for tensor in (*twin.keys, *twin.values))
    assert faults() - before < 5000  # all of the room would be 65536 pages each time


@pytest.mark.parametrize("blocked", [False, True])
def test_a_fork_has_its_own_copy_of_the_past(blocked: bool) -> None:
    state = State([(2, 8), (1, 4)], 50, torch.float32, "cpu", blocked)
    for tensor in (*state.keys, *state.values):
        tensor.normal_()
        assert tensor.data_ptr() % 64 == 0
    state.length = 20
    twin = state.fork()
    for place, (ours, theirs) in enumerate(zip((*state.keys, *state.values), (*twin.keys, *twin.values), strict=True)):
        end = -(-20 // LANES) if blocked and place < len(state.keys) else 20
        assert torch.equal(ours[:, :end], theirs[:, :end])
        assert not theirs[:, end:].any()
        theirs.zero_()
        assert ours[:, :end].abs().sum() > 0
