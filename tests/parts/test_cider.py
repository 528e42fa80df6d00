"""CIDEr-D against values worked out by hand and its limit cases."""

from __future__ import annotations

import math

import pytest

from gossamer.core.errors import InputError
from gossamer.parts.cider import cider_d

REFERENCES = [["cut the red apple slowly"], ["wash the cup in water"], ["dig a deep round hole"]]


def test_the_reference_itself_scores_ten_and_a_foreign_caption_nothing() -> None:
    scores = cider_d([given[0] for given in REFERENCES], REFERENCES)
    assert scores == pytest.approx([10.0] * 3)
    assert cider_d(["fly high kites today", "", "cut"], REFERENCES) == [0.0, 0.0, 0.0]


def test_a_value_by_hand() -> None:
    # two items; "the" is in both (weight 0), all else in one (weight w = ln 2)
    w = math.log(2)
    (score, _) = cider_d(["the cat ran", "a dog sat"], [["the cat sat here"], ["the dog ran off"]])
    # unigrams: cat is shared; ran is known from the other item, weight w; |c| = w sqrt(2), |r| = w sqrt(3)
    one = w * w / (w * math.sqrt(2) * w * math.sqrt(3))
    # bigrams: "the cat" is shared; c has 2, r has 3, all of weight w; longer ones: none shared
    two = w * w / (w * math.sqrt(2) * w * math.sqrt(3))
    assert score == pytest.approx(10 * math.exp(-1 / 72) * (one + two) / 4)


def test_repeating_a_word_does_not_pay() -> None:
    once, often = (
        cider_d([text, *(given[0] for given in REFERENCES[1:])], REFERENCES)[0]
        for text in ("apple", "apple apple apple apple")
    )
    assert often <= once


def test_rare_words_count_more_than_common_ones() -> None:
    references = [["put the cup down"], ["put the lid down"], ["put the pan down"], ["lift a lamp up"]]
    rare, common = (cider_d([text, "x", "x", "x"], references)[0] for text in ("cup", "put"))
    assert rare > common > 0


def test_the_mean_is_over_references() -> None:
    both = cider_d(["cut bread", "x"], [["cut bread", "dig holes"], ["y"]])[0]
    assert both == pytest.approx(cider_d(["cut bread", "x"], [["cut bread"], ["y"]])[0] / 2)


def test_missing_references_are_refused() -> None:
    with pytest.raises(InputError, match="item 1"):
        cider_d(["a", "b"], [["a"], []])
    with pytest.raises(InputError, match="2 candidates"):
        cider_d(["a", "b"], [["a"]])
