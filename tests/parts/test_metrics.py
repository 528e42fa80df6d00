"""Text metrics and the bootstrap against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gossamer.core.errors import InputError
from gossamer.parts.metrics import (
    bootstrap,
    chrf,
    compare,
    cut_first_line,
    exact_match,
    paired_bootstrap,
    rouge_l,
    score_texts,
    summarise,
)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("Return x.\nMore", "Return x."),
        ("  Return x.  ", "Return x."),
        ("\n \n\tReturn x.\n\n", "Return x."),
        ("\r\nReturn x.\r\ny", "Return x."),
        (" \n ", ""),
        ("", ""),
        ("a\x0cb\u2028c\nd", "a\x0cb\u2028c"),
    ],
)
def test_cut_first_line(text, line) -> None:
    assert cut_first_line(text) == line


def test_chrf_by_hand() -> None:
    # "abd" against "abc": order 1 matches 2 of 3 and 3, order 2 1 of 2 and 2, order 3 0 of 1 and 1; P = R = 7/18
    np.testing.assert_allclose(chrf(["abd", "abc", "", "zz"], ["abc"] * 4), [100 * 7 / 18, 100, 0, 0], rtol=1e-12)


def test_chrf_weighs_recall_four_times() -> None:
    # "a" against "ab": only order 1 exists on both sides, P = 1, R = 1/2, F2 = 5 P R / (4 P + R) = 5/9
    np.testing.assert_allclose(chrf(["a"], ["ab"]), [100 * 5 / 9], rtol=1e-12)


def test_rouge_l_by_hand() -> None:
    # common subsequence "return sum list": P = 3/4, R = 3/5, F = 2/3; case and punctuation do not count
    scores = rouge_l(["Return sum: of list", "x"], ["return the sum, a list", "y"])
    np.testing.assert_allclose(scores, [100 * 2 / 3, 0], rtol=1e-12)


def test_exact_match_and_score_texts_cut_first() -> None:
    np.testing.assert_array_equal(exact_match(["a ", "A"], ["a", "a"]), [100, 0])
    scores = score_texts(["\nDo it.\nThen more"], ["Do it."])
    assert {name: values.tolist() for name, values in scores.items()} == {
        "chrf": [100.0],
        "rouge_l": [100.0],
        "exact_match": [100.0],
    }


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(InputError, match="1 outputs and 2 references"):
        chrf(["a"], ["a", "b"])
    with pytest.raises(InputError, match="2 and 3 values"):
        paired_bootstrap([1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="nan"):
        bootstrap([1.0, float("nan")])
    with pytest.raises(InputError, match="two finite values"):
        bootstrap([1.0])


def test_bootstrap_of_two_items_by_hand() -> None:
    # the mean of two draws from {0, 1} is 0, 1/2, 1 with chance 1/4, 1/2, 1/4
    assert bootstrap([0, 1], level=0.95) == (0.0, 1.0)
    assert bootstrap([0, 1], level=0.4) == (0.5, 0.5)


def test_bootstrap_agrees_with_the_normal_interval_and_is_seeded() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = bootstrap(values, n=4000, seed=7)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - half, values.mean() + half], atol=0.03)
    assert bootstrap(values, seed=7) == bootstrap(values, seed=7) != bootstrap(values, seed=8)
    assert bootstrap(values, np.median)[0] <= np.median(values) <= bootstrap(values, np.median)[1]


def test_bootstrap_leaves_the_global_random_state() -> None:
    before = np.random.get_state()[1].copy()
    bootstrap([1, 2, 3])
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_paired_p_by_hand() -> None:
    # differences {-1, 3}: a resampled mean is <= 0 only when -1 is drawn twice, chance 1/4, so p is about 1/2
    test = paired_bootstrap([0.0, 3.0], [1.0, 0.0], n=20_000)
    assert test.difference == 1.0
    assert (test.low, test.high, test.n) == (-1.0, 3.0, 2)
    assert test.p_value == pytest.approx(0.5, abs=0.02)


def test_paired_extremes() -> None:
    assert paired_bootstrap([2, 3, 4], [1, 2, 3], n=999).p_value == pytest.approx(2 / 1000)
    same = paired_bootstrap([1, 2, 3], [1, 2, 3])
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)


def test_paired_is_antisymmetric() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.2, 1, 60), rng.normal(0, 1, 60)
    there, back = paired_bootstrap(a, b, seed=4), paired_bootstrap(b, a, seed=4)
    assert there.p_value == back.p_value
    np.testing.assert_allclose([there.difference, there.low, there.high], [-back.difference, -back.high, -back.low])


def test_pairing_sees_what_two_intervals_do_not() -> None:
    hard = np.random.default_rng(0).normal(30, 20, 100)
    test = paired_bootstrap(hard + 1 + 0.1 * np.sin(hard), hard)
    assert test.p_value < 0.01
    assert bootstrap(hard + 1)[0] < bootstrap(hard)[1]


def test_values_for_a_report() -> None:
    value = summarise("chrf", [10.0, 20.0, 30.0])
    assert (value.value, value.unit, value.n, value.better) == (20.0, "points", 3, "higher")
    assert value.low is not None
    assert 10 <= value.low < 20
    comparison = compare("chrf", "after", "before", [10.0, 20.0, 30.0], [1.0, 2.0, 3.0])
    assert comparison.difference.value == 18.0
    assert (comparison.arm, comparison.baseline, comparison.difference.unit) == ("after", "before", "points")
