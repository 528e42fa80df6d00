"""LLM-KICK: marks against the paper's rules written out, fitting prompts, the judge, limits of a grid, bad rows."""

from __future__ import annotations

import csv
import json
import re
import string
from pathlib import Path
from typing import Any

import pytest

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.evaluation.llm_kick import LLMKick
from gossamer.evaluation.llm_kick.grid import Compressor, Grid, sweep
from gossamer.evaluation.llm_kick.items import Item, built_in, ordered, read_items
from gossamer.evaluation.llm_kick.judge import as_judge, compare
from gossamer.evaluation.llm_kick.tasks import mark, request, token_f1
from gossamer.kinds.evaluation import Request
from gossamer.testing.bench import Bench

QUICK: dict[str, Any] = {"num_examples": 3, "shots": 1, "new_tokens": 4, "summary_tokens": 6, "texts": 2}


class Words:
    """A subject of whole words with so much room; it says the same to everything."""

    def __init__(self, room: int | None = None, says: str = "") -> None:
        self.room, self.says = room, says

    def length(self, text: str) -> int:
        return len(text.split())

    def answers(self, prompts: Any, new_tokens: int, line: bool) -> list[str]:
        return [self.says for _ in prompts]

    def logprobs(self, prompt: str, choices: Any) -> list[float]:
        return [-float(place) for place in range(len(choices))]

    def nats(self, texts: Any) -> list[tuple[float, int]]:
        return [(1.5 * len(text), len(text)) for text in texts]


def asked(task: str, *truth: str) -> Request:
    return Request(task, "prompt", truth, truth[0])


@pytest.mark.parametrize(
    ("output", "right"),
    [(" Rome.", 1), ("It is the city of\nRome", 0), ("R o m e", 1), ("Paris or Rome", 1), ("Ro", 0), ("", 0)],
)
def test_facts_are_marked_by_substring_of_the_first_line(output: str, right: float) -> None:
    naive = any(alias.lower().replace(" ", "") in output.strip().split("\n")[0].lower().replace(" ", "")
                for alias in ("Rome", "Roma"))  # fmt: skip
    assert mark(output, asked("facts", "Rome", "Roma")) == float(naive) == right


@pytest.mark.parametrize(
    ("output", "right"),
    [("the Rome", 1), ("Rome, in Italy", 1), ("a", 0), ("", 0), ("the", 0), ("Romeo", 0), ("New", 1), ("York New", 0)],
)
def test_books_are_marked_by_whole_words_in_either_direction(output: str, right: float) -> None:
    assert mark(output, asked("open_book", "New Rome" if "New" not in output else "New York", "Rome")) == right


def test_token_f1_is_the_best_over_the_answers() -> None:
    def naive(output: str, answer: str) -> float:
        clean = [re.sub(rf"[{re.escape(string.punctuation)}]", "", text.lower()).split() for text in (output, answer)]
        said, meant = ([word for word in words if word not in ("a", "an", "the")] for words in clean)
        shared = sum(min(said.count(word), meant.count(word)) for word in set(said))
        return 2 * shared / (len(said) + len(meant)) if shared else 0.0

    output, answers = " The old red, red barn\nnot this", ["red barn", "a red red house", "sea"]
    assert token_f1(output, answers) == max(naive(" The old red, red barn", answer) for answer in answers)


def test_letters_are_exact_and_instructions_allow_only_a_full_stop() -> None:
    assert [mark(text, asked("letter", "B")) for text in (" B", "B\n", "b", "B.", "")] == [1, 1, 0, 0, 0]
    assert [mark(text, asked("instructions", "cold, hot")) for text in (" cold, hot.", "Cold, hot", "hot, cold")] == [
        1,
        0,
        0,
    ]


def test_prompts_lose_examples_then_evidence_and_never_the_question() -> None:
    item = Item("Who keeps the owl?", ("Ivo",), "word " * 40 + "Ivo keeps the owl.", ("Ivo", "Elka"), 0)
    worked = [Item(f"Who keeps pet {number}?", ("Elka",), "", ("Ivo", "Elka"), 1) for number in range(4)]
    full = request("letter", item, worked, Words(), new_tokens=4, evidence=999)
    assert full.prompt.count("Who keeps pet") == 4
    room = len(full.prompt.split()) + 1 - 5
    cut = request("letter", item, worked, Words(room), new_tokens=4, evidence=999)
    assert cut.prompt.count("Who keeps pet") == 3
    assert "pet 3" not in cut.prompt
    assert item.question in cut.prompt
    book = request("open_book", item, [], Words(30), new_tokens=4, evidence=999)
    assert len(book.prompt.split()) + 4 <= 30
    assert book.prompt.endswith("Q: Who keeps the owl?\nA:")
    assert "word" in book.prompt
    with pytest.raises(InputError, match="must fit 9 positions"):
        request("open_book", item, [], Words(9), new_tokens=4, evidence=999)
    assert "owl." not in request("open_book", item, [], Words(), new_tokens=4, evidence=50).prompt


def test_a_fact_and_its_prompt_are_at_most_three_times_the_prompt() -> None:
    found = request("facts", Item("Who?", ("I",)), [], Words(), new_tokens=500, evidence=9)
    assert found.new_tokens == 2 * len(found.prompt.split())


def test_rows_go_where_their_fields_carry_them() -> None:
    rows: list[dict[str, Any]] = [
        {"question": "a?", "answers": ["b"]},
        {"question": "a?", "answers": ["b"], "context": "b a"},
        {"question": "a?", "choices": ["b", "c"], "gold": 1},
        {"task": "summary", "context": "b a", "answers": ["b"]},
    ]
    assert [item.tasks for item in read_items(rows)] == [
        ("facts",), ("facts", "closed_book", "open_book"), ("choice", "letter"), ("summary",),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a?", "answer": ["b"]}, "did you mean 'answers'"),
        ({"question": "a?", "answers": "b"}, "answers: must be a list of non-empty texts"),
        ({"question": "a?", "answers": [" "]}, "answers: must be a list of non-empty texts"),
        ({"question": "", "answers": ["b"]}, "question: must be a text"),
        ({"question": "a?", "choices": ["b", "c"], "gold": 2}, "gold: must be from 0 to 1, got 2"),
        ({"question": "a?", "choices": ["b", "c"]}, "gold: must be from 0 to 1, got None"),
        ({"question": "a?", "choices": ["b"], "gold": 0}, "choices: must be 2 to 26"),
        ({"question": "a?", "answers": ["b"], "task": "retrieval"}, "must have the fields of its task"),
        ({"question": "a?", "answers": ["b"], "task": "open_bok"}, "did you mean 'open_book'"),
    ],
)
def test_bad_rows_are_refused_with_their_place(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "ok?", "answers": ["x"]}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        LLMKick(**QUICK).evaluate(Bench().bundle(), path)
    assert "row 2" in str(caught.value)


def test_rows_without_the_chosen_tasks_and_single_rows_are_refused() -> None:
    with pytest.raises(InputError, match="must have rows for letter"):
        LLMKick(tasks=("letter",)).evaluate(Words(), [{"question": "a?", "answers": ["b"]}])
    with pytest.raises(InputError, match="must have at least two rows"):
        LLMKick(tasks=("facts",)).evaluate(Words(), [{"question": "a?", "answers": ["b"]}])


def test_rambling_gets_credit_and_is_marked_as_chance() -> None:
    rows = [{"question": f"{n}?", "answers": [f"word{n}x"]} for n in range(12)]
    everything = " ".join(row["answers"][0] for row in rows)
    found = LLMKick(tasks=("facts",)).evaluate(Words(says=everything), rows).tasks["facts"]
    assert found.value == found.chance == 1
    assert not found.informative


def test_built_in_items_hold_their_truth() -> None:
    items = built_in(0)
    for item in items:
        if "choice" in item.tasks:
            assert item.choices[item.gold] == item.answers[0]
            assert len(set(item.choices)) == len(item.choices)
        if {"open_book", "retrieval"} & set(item.tasks):
            assert item.answers[0] in item.context
        if "summary" in item.tasks:
            assert all(fact.lower() in item.answers[0].lower() for fact in item.facts)
    assert len({item.key for item in items}) == len(items)
    assert ordered(items, 0, "a") == ordered(items[::-1], 0, "a") != ordered(items, 1, "a")


def test_perplexity_is_over_all_tokens_and_lower_is_better() -> None:
    found = LLMKick(tasks=("perplexity",), texts=3).evaluate(Words())
    score = found.tasks["perplexity"]
    assert score.value == pytest.approx(2.718281828**1.5)
    assert (score.better, score.chance, score.n) == ("lower", None, 3)
    assert not found.asked


def test_a_judge_scores_both_orders_and_bias_cancels() -> None:
    def prefers_first(prompt: str) -> str:
        return "9 9 9 9 5 5 5 5"

    def prefers_long(prompt: str) -> str:
        first, second = (re.search(rf"Summary {n}: (.*)", prompt) for n in (1, 2))
        assert first is not None
        assert second is not None
        return "8 8 8 8 4 4 4 4" if len(first[1]) > len(second[1]) else "4 4 4 4 8 8 8 8"

    biased = compare(prefers_first, "story", "one", "two")
    assert biased is not None
    assert (biased.score, biased.swapped) == (1.0, True)
    fair = compare(prefers_long, "story", "a longer one", "two")
    assert fair is not None
    assert (fair.score, fair.swapped) == (2.0, False)
    assert compare(lambda prompt: "I like it, 10 of 10", "story", "one", "two") is None
    assert compare(lambda prompt: "99 1 1 1 1 1 1 1", "story", "one", "two") is None


def test_a_judge_may_be_a_model_with_its_tokenizer_and_nothing_else() -> None:
    bundle = Bench().bundle()
    assert isinstance(as_judge(bundle)("Rate"), str)
    with pytest.raises(InputError, match="tokenizer"):
        as_judge(bundle.model)
    with pytest.raises(InputError, match="callable"):
        as_judge(7)


def test_judged_summaries_are_a_task_of_their_own() -> None:
    rows = [{"task": "summary", "context": f"s{n}", "answers": [f"r{n}"], "facts": [f"r{n}"]} for n in range(3)]
    kick = LLMKick(tasks=("summary",), judge="j", companions={"j": lambda prompt: "8 8 8 8 4 4 4 4"})
    found = kick.evaluate(Words(says="r1 and more"), rows)
    assert found.tasks["summary_judged"].value == 1
    assert found.values["judge_swapped"] == 1
    assert found.values["judge_unreadable"] == 0
    assert found.values["summary_facts"] == pytest.approx(1 / 3)


def cell(**values: float) -> dict[str, Any]:
    tasks = {
        task: {"value": value, "low": value, "high": value, "n": 9, "chance": None if task == "perplexity" else 0.1,
               "informative": task != "guess", "better": "lower" if task == "perplexity" else "higher", "items": []}
        for task, value in values.items()
    }  # fmt: skip
    return {"tasks": tasks, "values": {}, "asked": []}


def grid(tolerance: float = 0.05) -> Grid:
    wanda = [cell(facts=f, guess=0.1, perplexity=p) for f, p in ((0.80, 10.0), (0.70, 10.2), (0.79, 12.0))]
    plain = [cell(facts=f, guess=0.1, perplexity=p) for f, p in ((0.77, 10.6), (0.20, 20.0), (0.10, 99.0))]
    one, two = (Compressor(label, "pruning", "ratio", (0.1, 0.2, 0.3)) for label in ("wanda", "plain"))
    return Grid(cell(facts=0.8, guess=0.1, perplexity=10.0), (one, two), {"wanda": wanda, "plain": plain}, tolerance)


def test_limits_end_at_the_first_drop_beyond_the_tolerance() -> None:
    found = grid()
    assert found.limit("wanda", "facts") == 0.1  # 0.3 is within again, and does not count
    assert found.limit("wanda", "perplexity") == 0.2
    assert found.limit("plain", "facts") == 0.1
    assert found.limit("plain", "perplexity") is None
    assert found.drop("wanda", 2, "perplexity") == pytest.approx(0.2)
    assert found.drop("wanda", 1, "facts") == pytest.approx(0.125)


def test_tolerance_moves_the_limits() -> None:
    assert grid(0.2).limit("wanda", "facts") == 0.3
    assert grid(0.01).limit("plain", "facts") is None


def test_uninformative_tasks_have_no_drop_and_the_verdict_says_so(tmp_path: Path) -> None:
    found = grid()
    assert found.drop("wanda", 0, "guess") is None
    assert found.limit("wanda", "guess") is None
    assert found.ranks("facts") == {f"ratio={ratio}": ["wanda", "plain"] for ratio in (0.1, 0.2, 0.3)}
    found.write(tmp_path)
    assert re.search(r"\| guess .* uninformative \| uninformative \|", (tmp_path / "verdict.md").read_text())
    assert len(list(csv.DictReader((tmp_path / "grid.csv").open()))) == 3 * 7
    assert json.loads((tmp_path / "grid.json").read_text())["limits"]["plain"]["perplexity"] is None
    assert "<svg" in (tmp_path / "drops.svg").read_text()


def test_a_sweep_prunes_fresh_models_and_goes_on_where_it_was(tmp_path: Path) -> None:
    loads: list[Any] = []

    def load() -> Bundle:
        loads.append(Bench().bundle())
        return loads[-1]

    kick = LLMKick(**{**QUICK, "tasks": ("facts", "letter", "perplexity")})
    chosen = [Compressor("magnitude", "pruning", "ratio", (0.0, 0.9), {"method": "magnitude"})]
    found = sweep(load, chosen, kick, Bench().questions(), folder=tmp_path)
    assert found.cells["magnitude"][0]["tasks"] == found.dense["tasks"]
    assert found.cells["magnitude"][1]["tasks"] != found.dense["tasks"]
    again = sweep(load, chosen, kick, Bench().questions(), folder=tmp_path)
    assert again.as_dict() == found.as_dict()
    assert len(loads) == 3


def test_a_sweep_checks_everything_before_a_model_is_loaded() -> None:
    def load() -> Bundle:
        raise AssertionError("loaded")

    with pytest.raises(OptionError, match="ratio: must be < 1"):
        sweep(load, [Compressor("a", "pruning", "ratio", (0.5, 1.5))], LLMKick())
    with pytest.raises(InputError, match="labels of their own"):
        sweep(load, [Compressor("a", "pruning", "ratio", (0.5,))] * 2, LLMKick())
    with pytest.raises(OptionError, match="compression"):
        sweep(load, [Compressor("a", "sft", "ratio", (0.5,))], LLMKick())
