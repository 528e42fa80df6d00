"""The decode benchmark's arms and figures, on a tiny model."""

from __future__ import annotations

import math

import pytest

from gossamer.benchmarks import decode
from gossamer.parts.decode_runner import Runner
from gossamer.testing.bench import Bench

WINDOWS = [[1, 40, 41, 42, 50, 60, 7], [1, 9, 9, 8, 100]]


def test_arms_measure_the_same_thing() -> None:
    model = Bench("gemma3").model(seed=3)
    plain, mine = decode._transformers_arm(model), decode._runner_arm(Runner(model, max_length=64))
    assert mine.nll(WINDOWS) == pytest.approx(plain.nll(WINDOWS), abs=1e-4)
    for arm in (plain, mine):
        moments = arm.decode([1, 5, 9], 6)
        assert len(moments) == 6
        assert moments == sorted(moments)
        arm.prefill([1, 5, 9])
    assert mine.bytes < plain.bytes  # norms are not counted
    assert mine.bytes > 0.95 * plain.bytes


def _arm(speed: float, perplexity: float, size: int) -> decode.Arm:
    return decode.Arm(lambda ids, n: [], print, lambda windows: 0.0, size, [speed] * 3, [speed] * 3, perplexity)


def test_targets_follow_the_figures() -> None:
    arms = {
        "transformers_bf16": _arm(10, 20, 200),
        "quality_arm": _arm(60, 20.1, 110),
        "small_arm": _arm(80, 25, 60),
        "llama_cpp_q4_k_m": _arm(40, 20.2, 100),
        "llama_cpp_q4_0": _arm(50, 24, 60),
        "llama_cpp_q4_0_pure": _arm(50, 30, 55),
    }
    ratios = decode._ratios(arms)
    assert ratios["quality_arm/llama_cpp_q4_k_m"] == 1.5
    lines = {line["text"]: line["met"] for line in decode._targets(arms, ratios, 100)}
    assert lines.pop("small arm, bits per weight") is False  # 4.8
    assert lines.pop("its perplexity over llama_cpp_q4_0's") is False
    assert all(lines.values())
    del arms["llama_cpp_q4_k_m"]
    assert len(decode._targets(arms, decode._ratios(arms), 100)) == 2


def test_turns_count_after_warming_up() -> None:
    model = Bench("llama").model()
    arm = decode._runner_arm(Runner(model, max_length=64))
    decode._take_turns({"arm": arm}, [[1, 2], [3]], list(range(4, 40)), 2, 4)
    assert len(arm.decoded) == len(arm.prefilled) == 2
    assert all(math.isfinite(speed) and speed > 0 for speed in arm.decoded)
