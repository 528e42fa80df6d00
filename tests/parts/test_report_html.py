"""The HTML report and console tables: one file that loads nothing, says what was measured, escapes everything."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from gossamer.core.report import (
    Arm,
    BudgetLine,
    Comparison,
    Report,
    Sample,
    StepRecord,
    Value,
    measured,
)
from gossamer.parts.report_console import console_tables
from gossamer.parts.report_html import changes, headline, matched, rival, write_html

SCORES = {
    "zero": {"chrf": (14.2, 12.6, 15.9), "rouge_l": (9.8, 7.9, 11.9), "exact_match": (0.0, 0.0, 0.0)},
    "few": {"chrf": (18.6, 16.4, 20.9), "rouge_l": (16.1, 13.4, 18.9), "exact_match": (1.04, 0.0, 3.1)},
    "tuned": {"chrf": (31.9, 28.7, 35.3), "rouge_l": (30.4, 26.9, 34.1), "exact_match": (7.3, 2.1, 12.5)},
    "after": {"chrf": (31.2, 28.0, 34.5), "rouge_l": (29.7, 26.1, 33.2), "exact_match": (6.25, 2.1, 11.5)},
}
SIZES = {
    "zero": (536_223_056, 33_384_570, 1_832, 268_098_176, 16.0),
    "tuned": (214_380_112, 1_402_118, 2_011, 107_189_000, 16.0),
    "after": (61_845_040, 1_402_118, 2_480, 107_189_000, 4.62),
    "gguf": (253_110_000, 0, 0, 268_098_176, 7.55),
}
PROMPT = """def chunked(iterable, n, strict=False):
    iterator = iter(partial(take, n, iter(iterable)), [])
    if strict:
        if n is None:
            raise ValueError('n must not be None when using strict mode.')

        def ret():
            for chunk in iterator:
                if len(chunk) != n:
                    raise ValueError('iterable is not divisible by n.')
                yield chunk

        return ret()
    return iterator
\"\"\""""

ITEMS = (
    (PROMPT, "Break *iterable* into lists of length *n*."),
    ("def add(left, right):\n    return left + right\n", "Return the sum of both numbers."),
)
ANSWERS = ("Break an iterable into chunks of length n.", "Return the sum of left and right.")


def full_report() -> Report:
    labels = {
        "zero": "Untouched, zero-shot",
        "few": "Untouched, 3-shot",
        "tuned": "Trained, bf16",
        "after": "Result, 4-bit",
        "gguf": "GGUF as shipped",
    }
    arms = []
    for name, label in labels.items():
        values = {key: measured(key, *numbers, n=96) for key, numbers in SCORES.get(name, {}).items()}
        if name in SIZES:
            weights, tokenizer, other, count, bits = SIZES[name]
            total = weights + tokenizer + other
            for key, number in zip(
                ("total_bytes", "weights_bytes", "tokenizer_bytes", "other_bytes", "parameters", "bits_per_weight"),
                (total, weights, tokenizer, other, count, bits),
                strict=True,
            ):
                values[key] = measured(key, number)
        arms.append(Arm(name, label, values, untouched=name in ("zero", "few", "gguf")))
    zero, _, tuned, after, gguf = arms
    gguf.notes = "bytes only; its weights are what the bf16 conversion was made from."
    for arm, perplexity, peak, speed in (
        (zero, 24.8, 1.62e9, 17.4),
        (tuned, 9.1, 1.05e9, 25.2),
        (after, 9.6, 0.61e9, 38.7),
    ):
        arm.values["perplexity"] = measured("perplexity", perplexity)
        arm.values["peak_rss_bytes"] = measured("peak_rss_bytes", peak)
        arm.values["net_rss_bytes"] = measured("net_rss_bytes", peak - 0.42e9)
        arm.values["tokens_per_s"] = measured("tokens_per_s", speed, speed * 0.93, speed * 1.04, 5)
    return Report(
        title="One-line docstrings from a model of 62 MB",
        model="gemma-3-270m (dequantised Q4_K_M)",
        data="python_functions, 1200 train, 96 test",
        seed=0,
        created="2026-01-02T03:04:05+00:00",
        device={"device": "AMD EPYC", "cores": 2, "memory_bytes": 16.4e9, "threads": 2, "python": "3.11.7"},
        versions={"gossamer": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        arms=arms,
        comparisons=[
            Comparison("chrf", "after", "zero", Value(17.0, 13.9, 20.2, "points", 96, "higher"), 0.0004),
            Comparison("chrf", "after", "few", Value(12.6, 9.4, 15.9, "points", 96, "higher"), 0.0004),
            Comparison("chrf", "after", "tuned", Value(-0.7, -1.9, 0.4, "points", 96, "higher"), 0.21),
        ],
        steps=[
            StepRecord(
                "trim_vocabulary",
                {"corpus": "data", "keep": 65536},
                21.4,
                {
                    "vocabulary": [262144, 40211],
                    "parameters": [268_098_176, 107_189_000],
                    "total_bytes": [5.7e8, 2.16e8],
                },
                "Text of the task tokenises as before; any other text falls back to bytes.",
            ),
            StepRecord("mos", {"rank": 8, "budget": 2}, 0.6, {"trainable": [0, 474_000]}),
            StepRecord(
                "train",
                {"objective": "sft", "optimizer": "adamw", "steps": 80, "learning_rate": 2e-4},
                231.0,
                {
                    "training loss": [4.12, 2.31],
                    "facts": [["adapter_attached"], ["adapter_attached", "adapter_trained"]],
                },
            ),
            StepRecord("merge", {}, 1.2, {"largest difference of logits": 3.1e-6}),
            StepRecord(
                "finequant", {"bits": 4}, 44.0, {"bits_per_weight": [16.0, 4.62], "total_bytes": [2.16e8, 6.33e7]}
            ),
        ],
        samples=[
            Sample(
                *ITEMS[number % 2],
                {
                    "zero": "The function takes an iterable and returns an iterator over the" if number % 3 else "",
                    "few": "Return an iterator that yields the elements of the iterable",
                    "after": ANSWERS[number % 2],
                },
            )
            for number in range(10)
        ],
        budget=[
            BudgetLine("size_mb", 200e6, 63.25e6, True, "bytes"),
            BudgetLine("task_drop", 2.0, 0.7, True, "points"),
        ],
        curves={
            "training loss": [(float(x), 2.2 + 2 * math.exp(-x / 15) + 0.15 * math.sin(9 * x)) for x in range(1, 81)]
        },
        notes=[
            "The model is a dequantised Q4_K_M file, not the original checkpoint.",
            "Every arm is cut at its first line, so nothing is won by stopping alone.",
        ],
        result="after",
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that what opens closes."""

    VOID = frozenset(["meta", "br", "path", "use", "rect", "link", "img", "line", "circle"])

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(report: Report, folder: Path) -> tuple[str, Page]:
    write_html(report, folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def test_page_stands_alone_and_says_what_was_measured(tmp_path: Path) -> None:
    text, page = page_of(full_report(), tmp_path)
    loads = {"src", "srcset", "href", "xlink:href", "data", "action", "poster"}
    targets = [value or "" for _, attributes in page.tags for name, value in attributes.items() if name in loads]
    assert all(target.startswith("#") for target in targets)
    assert "http" not in text
    assert "@import" not in text
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _ in page.tags}
    words = " ".join(" ".join(page.words).split())
    for piece in ("63.2 MB", "9.0 times smaller", "31.2", "28.0 – 34.5", "p < 0.001", "2.2 times faster", "4 min 58 s"):
        assert piece in words, piece
    assert sum(tag == "article" for tag, _ in page.tags) == 10
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(target[1:] in ids for target in targets)
    assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", text), "a stand-in colour was left in a plot"


def test_same_report_same_bytes(tmp_path: Path) -> None:
    assert page_of(full_report(), tmp_path)[0] == page_of(full_report(), tmp_path)[0]


def test_everything_from_outside_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>\" onload=\"y$\\frac$"
    report = full_report()
    report.title = report.model = report.data = evil
    report.arms[0].label = report.arms[0].notes = report.notes[0] = report.steps[0].note = evil
    report.steps[0].options = {evil: evil}
    report.steps[0].changed = {evil: [evil, evil]}
    report.samples[0] = Sample(evil, evil, {evil: evil, "after": evil})
    report.budget[0] = BudgetLine(evil, 1, 1, True, evil)
    report.curves = {evil: [(1.0, 2.0), (2.0, 1.0)]}
    report.device = report.versions = {evil: evil}
    text, page = page_of(report, tmp_path)
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert "<script>" in " ".join(page.words)


def test_report_with_nothing_measured_is_still_a_page(tmp_path: Path) -> None:
    report = Report("t", "m", "d", 0, "2026-01-01")
    assert page_of(report, tmp_path)[1].words
    assert console_tables(report) == []
    report.arms = [Arm("only", "Only", {"chrf": Value(math.nan), "odd_thing": Value(2.5)})]
    text, page = page_of(report, tmp_path)
    assert "Odd thing" in " ".join(page.words)
    assert "nan" not in re.sub(r"<style>.*?</style>", "", text, flags=re.S)


def test_headline_takes_the_nearest_rival_and_tells_losses() -> None:
    report = full_report()
    nearest = rival(report)
    assert nearest is not None
    assert nearest.baseline == "few"
    size, task, speed, memory = headline(report)
    assert (size.after, size.before, size.change, size.good) == ("63.2 MB", "569.6 MB", "9.0 times smaller", True)
    assert (task.after, task.before, task.change) == ("31.2", "18.6", "+12.6 chrF")
    assert task.detail == "against Untouched, 3-shot, 95 % interval 9.4 – 15.9, p < 0.001"
    assert (speed.change, memory.change) == ("2.2 times faster", "2.7 times less")
    after = report.arm("after")
    after.values["total_bytes"] = measured("total_bytes", 1.2 * 569_609_458)
    after.values["tokens_per_s"] = measured("tokens_per_s", 17.4 * 0.75)
    after.values["peak_rss_bytes"] = measured("peak_rss_bytes", 1.62e9)
    report.comparisons[1] = Comparison("chrf", "after", "few", Value(-1.0, -2.5, 0.4, "points", 96, "higher"), 0.2)
    size, task, speed, memory = headline(report)
    assert (size.change, size.good) == ("20 % larger", False)
    assert (speed.change, speed.good) == ("25 % slower", False)
    assert (memory.change, memory.good) == ("the same", None)
    assert (task.change, task.good) == ("−1.0 chrF", None)


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ({"total_bytes": [2e8, 6e7]}, [("Bytes on disk", "200.0 MB", "60.0 MB")]),
        ({"facts": [[], ["merged"]]}, [("Facts", "none", "merged")]),
        ({"largest difference": 0.001}, [("Largest difference", "", "0.001")]),
        ({"tied": [True, False]}, [("Tied", "yes", "no")]),
        ({"head_bytes": [None, 512]}, [("Head bytes", "none", "512 B")]),
    ],
)
def test_changes_read_as_before_and_after(changed, lines) -> None:
    assert changes(StepRecord("s", changed=changed)) == lines


def test_matched_words_ignore_case_and_lose_nothing() -> None:
    pieces = matched("Return the  Sum,\nnow", "return a sum")
    assert "".join(piece for piece, _ in pieces) == "Return the  Sum,\nnow"
    assert [piece for piece, hit in pieces if hit] == ["Return", "Sum"]


def test_console_tables_show_the_numbers_and_keep_brackets() -> None:
    report = full_report()
    report.arms[0].label = "[red]zero[/red]"
    report.budget[1] = BudgetLine("task_drop", 0.5, 0.7, False, "points")
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for grid in console_tables(report):
        console.print(grid)
    text = console.export_text()
    for piece in ("[red]zero[/red]", "63.2 MB", "28.0 – 34.5", "262,144 → 40,211", "−0.7", "not met", "< 0.001"):
        assert piece in text, piece
