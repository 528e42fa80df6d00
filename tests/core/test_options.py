"""Options: values are checked where they are given, with the sentence that says what to do."""

from __future__ import annotations

import pytest

from gossamer.core.errors import OptionError
from gossamer.core.options import Config, check_options, option


class Sample(Config):
    rank: int = option(8, "rank of a layer", ge=1, le=64)
    rate: float = option(1e-3, "step size", gt=0)
    mode: str = option("fast", "how", choices=("fast", "exact"))
    names: tuple[str, ...] = option(("a",), "which")
    bound: float | None = option(None, "limit", lt=1)
    on: bool = option(False, "switch")
    weights: dict[str, float] = option({"a": 1.0}, "weights by name")
    way: str | dict[str, str] = option("sft", "which system", system="objectives")


def test_defaults_and_frozen():
    sample = Sample()
    assert (sample.rank, sample.names, sample.weights) == (8, ("a",), {"a": 1.0})
    with pytest.raises(AttributeError):
        sample.rank = 3


def test_lists_become_tuples_and_ints_become_floats():
    sample = Sample(names=["x", "y"], rate=1)
    assert sample.names == ("x", "y")
    assert isinstance(sample.rate, float)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "must be >= 1, got 0"),
        ({"rank": 65}, "must be <= 64"),
        ({"rank": 2.5}, "must be int, got 2.5 (float)"),
        ({"rank": True}, "must be int"),
        ({"rate": 0.0}, "must be > 0"),
        ({"rate": "1"}, "must be float"),
        ({"mode": "fats"}, "did you mean 'fast'?"),
        ({"names": "x"}, "must be tuple[str, ...]"),
        ({"names": [1]}, "must be tuple[str, ...]"),
        ({"bound": 1.0}, "must be < 1"),
        ({"on": 1}, "must be bool"),
        ({"weights": {"a": "b"}}, "must be dict[str, float]"),
        ({"way": {"dpo": 3}}, "must be a name or {name: {options}}"),
        ({"rnak": 4}, "did you mean 'rank'?"),
    ],
)
def test_wrong_values_are_refused(options, words):
    with pytest.raises(OptionError) as error:
        Sample.build(options, "sample")
    assert words in str(error.value)
    assert str(error.value).startswith("sample.")


def test_check_options_adds_no_defaults():
    assert check_options({"rank": 4}, Sample.specs, "sample") == {"rank": 4}


def test_a_default_dict_is_not_shared():
    first = Sample()
    first.weights["b"] = 2.0
    assert Sample().weights == {"a": 1.0}
