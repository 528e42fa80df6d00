"""The decode benchmark's arms and figures, on a tiny model."""

from __future__ import annotations

import math

import pytest

from gossamer.benchmarks import _decode_drafters, decode
from gossamer.decoding.prompt_lookup import PromptLookup
from gossamer.parts.decode_runner import Runner
from gossamer.testing.bench import Bench

WINDOWS = [[1, 40, 41, 42, 50, 60, 7], [1, 9, 9, 8, 100]]


def test_arms_measure_the_same_thing() -> None:
    model = Bench("gemma3").model(seed=3)
    plain, mine = decode._transformers_arm(model), decode._runner_arm(Runner(model, max_length=64), 7)
    assert mine.nll(WINDOWS) == pytest.approx(plain.nll(WINDOWS), abs=1e-4)
    for arm in (plain, mine):
        moments = arm.decode([1, 5, 9], 6)
        assert len(moments) == 6
        assert moments == sorted(moments)
        arm.prefill([1, 5, 9])
    assert mine.bytes == 7
    assert plain.bytes == sum(parameter.nbytes for parameter in model.parameters())


def _arm(speed: float, perplexity: float, size: int) -> decode.Arm:
    return decode.Arm(lambda ids, n: [], print, lambda windows: 0.0, size, 1.0, [speed] * 3, [speed] * 3, perplexity)


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
    lines = {line["text"]: line["met"] for line in decode._targets(arms, ratios, 100, [])}
    assert lines.pop("small arm, bits per weight") is False  # 4.8
    assert lines.pop("its perplexity over llama_cpp_q4_0's") is False
    assert all(lines.values())
    del arms["llama_cpp_q4_k_m"]
    assert len(decode._targets(arms, decode._ratios(arms), 100, [])) == 3


def test_turns_count_after_warming_up() -> None:
    model = Bench("llama").model()
    arm = decode._runner_arm(Runner(model, max_length=64), 7)
    decode._take_turns({"arm": arm}, [[1, 2], [3]], list(range(4, 40)), 2, 4)
    assert len(arm.decoded) == len(arm.prefilled) == 2
    assert all(math.isfinite(speed) and speed > 0 for speed in arm.decoded)


def test_drafters_are_compared_with_plain_decoding_on_every_base() -> None:
    model = Bench("llama").model()
    systems = {"prompt_lookup": PromptLookup(tokens=4), "eager": PromptLookup(ngram=1, switch_off=False)}
    rows = []
    for base, weights in _decode_drafters.BASES.items():
        for system in systems.values():
            system.bind(model, weights=weights)
        for kind in _decode_drafters.KINDS:
            head = {"base": base, "text": kind}
            rows += _decode_drafters._turns(systems, model, [[5, 9, 5, 9, 5], [7, 8, 7, 8]], 10, head)
    assert all(row["equal"] == 1 for row in rows)
    assert all(row["ratio"] > 0 for row in rows)
    assert any(row["guessing_steps"] for row in rows if row["drafter"] == "eager")
    lines = _decode_drafters.targets(rows)
    assert len(lines) == 11
    assert lines[-1][1] == 1
