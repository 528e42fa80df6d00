"""The report model: JSON round trip, refusals, best marks, numbers as people read them."""

from __future__ import annotations

import json
import math

import pytest

from gossamer.core.errors import InputError
from gossamer.core.report import (
    Arm,
    BudgetLine,
    Comparison,
    Report,
    Sample,
    StepRecord,
    Value,
    measured,
    show,
    show_interval,
    show_p,
)


def small_report() -> Report:
    return Report(
        title="t",
        model="m",
        data="d",
        seed=3,
        created="2026-01-02T03:04:05",
        device={"cores": 2},
        versions={"torch": "2.13"},
        arms=[
            Arm("before", "Before", {"chrf": measured("chrf", 10, 8.0, 12.0, 96), "x": Value(1.0)}, untouched=True),
            Arm("after", "After", {"chrf": measured("chrf", 20.5), "total_bytes": measured("total_bytes", 5e6)}, "n"),
        ],
        comparisons=[Comparison("chrf", "after", "before", Value(10.5, 8.0, 13.0), 0.001)],
        steps=[StepRecord("train", {"lr": 1e-3}, 2.5, {"loss": [3.0, 2.0]}, "note")],
        samples=[Sample("def f():", "Do f.", {"before": "", "after": "Do f."})],
        budget=[BudgetLine("size_mb", 6.0, 5.0, True)],
        curves={"training loss": [(1.0, 3.0), (2.0, 2.5)]},
        notes=["n"],
    )


def test_round_trip_through_json_text() -> None:
    report = small_report()
    assert Report.from_dict(json.loads(json.dumps(report.as_dict(), allow_nan=False))) == report


def test_not_finite_is_null_in_json_and_nan_again() -> None:
    report = small_report()
    report.arms[0].values["chrf"] = Value(math.inf)
    data = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert data["arms"][0]["values"]["chrf"]["value"] is None
    assert math.isnan(Report.from_dict(data).arms[0].values["chrf"].value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(sead=1), "did you mean 'seed'"),
        (lambda d: d.pop("model"), "have model"),
        (lambda d: d.update(seed="0"), "report.seed: must be int"),
        (lambda d: d["arms"][1]["values"]["chrf"].update(value="20"), r"report.arms\[1\].values.chrf.value"),
        (lambda d: d["curves"].update(bad=[[1.0]]), "report.curves.bad"),
        (lambda d: d["arms"][1]["values"]["chrf"].update(better="bigger"), "better"),
    ],
)
def test_damaged_data_is_refused_with_its_place(change, words) -> None:
    data = json.loads(json.dumps(small_report().as_dict()))
    change(data)
    with pytest.raises(InputError, match=words):
        Report.from_dict(data)


def test_best_needs_a_rival_and_a_direction() -> None:
    report = small_report()
    assert report.best("chrf") == {"after"}
    assert report.best("total_bytes") == set()
    assert report.best("x") == set()
    report.arms[0].values["perplexity"] = measured("perplexity", 5)
    report.arms[1].values["perplexity"] = measured("perplexity", 9)
    assert report.best("perplexity") == {"before"}
    report.arms[1].values["perplexity"] = measured("perplexity", 5)
    assert report.best("perplexity") == set()


def test_metrics_are_listed_known_first_and_headline_arms_named() -> None:
    report = small_report()
    assert report.metrics() == ["chrf", "total_bytes", "x"]
    assert [arm.name for arm in report.ends() or ()] == ["before", "after"]
    report.baseline = "befor"
    with pytest.raises(InputError, match="did you mean 'before'"):
        report.ends()


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (86_400_000, "bytes", "86.4 MB"),
        (536_223_056, "bytes", "536.2 MB"),
        (1_250_000_000, "bytes", "1.25 GB"),
        (999_999, "bytes", "1.00 MB"),
        (512, "bytes", "512 B"),
        (268_098_176, "count", "268.1 M"),
        (31.24, "points", "31.2"),
        (4.25, "bits", "4.25 bits"),
        (12.5, "%", "12.5 %"),
        (6.237, "times", "6.24×"),
        (123.4, "s", "2 min 03 s"),
        (7265, "s", "2 h 01 min"),
        (0.25, "s", "250 ms"),
        (21834.0, "", "21,834"),
        (-2.0, "points", "−2.0"),
        (None, "points", "–"),
        (math.nan, "bytes", "–"),
    ],
)
def test_show(number, unit, text) -> None:
    assert show(number, unit) == text


def test_show_sign_interval_and_p() -> None:
    assert show(1.5, "points", signed=True) == "+1.5"
    assert show_interval(Value(1, 0.5, 1.5, "points")) == "0.5 – 1.5"
    assert show_interval(Value(1, 0.5, 1.5, "tokens/s")) == "0.5 – 1.5 tokens/s"
    assert show_interval(Value(1, 9e5, 2e6, "bytes")) == "900.0 kB – 2.00 MB"
    assert show_interval(Value(1)) == ""
    assert (show_p(0.0002), show_p(0.0123), show_p(None)) == ("p < 0.001", "p = 0.012", "")
