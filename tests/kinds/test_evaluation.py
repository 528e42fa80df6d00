"""Scores: the mean with its interval, chance by shuffled truth, a model as a subject, evaluations in a recipe."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from gossamer.core.errors import InputError, OptionError
from gossamer.core.recipe import RecipeError, read_recipe
from gossamer.kinds.evaluation import Evaluation, ModelSubject, Request, Scores, Subject, scored
from gossamer.parts.scorer import perplexity, score_choices
from gossamer.pipeline import engine
from gossamer.testing.bench import Bench


class Echo(Evaluation):
    """Each of ``count`` requests has one of ``kinds`` truths, and is right where the output is the truth."""

    count, kinds = 40, 4

    def requests(self, subject: Subject, data: Any = None) -> list[Request]:
        names = [str(number % self.kinds) for number in range(self.count)]
        return [Request("echo", f"{place:03d}", (name,), name) for place, name in enumerate(names)]

    def mark(self, output: str, request: Request) -> float:
        return float(output == request.truth[0])


class Says:
    room = None

    def __init__(self, says: Any) -> None:
        self.says = says

    def length(self, text: str) -> int:
        return 1

    def answers(self, prompts: Any, new_tokens: int, line: bool) -> list[str]:
        return [self.says(int(prompt)) for prompt in prompts]

    def logprobs(self, prompt: str, choices: Any) -> list[float]:
        raise AssertionError("no choices here")

    def nats(self, texts: Any) -> list[tuple[float, int]]:
        raise AssertionError("no texts here")


def test_chance_is_the_rate_at_which_truths_agree() -> None:
    right = Echo().evaluate(Says(lambda place: str(place % 4))).tasks["echo"]
    assert (right.value, right.low, right.high) == (1, 1, 1)
    assert right.chance == pytest.approx(9 / 39, abs=0.12)
    assert right.informative
    constant = Echo().evaluate(Says(lambda place: "0")).tasks["echo"]
    assert constant.value == 0.25
    assert not constant.informative


def test_a_subject_a_little_above_chance_has_to_show_it() -> None:
    lucky = Echo().evaluate(Says(lambda place: "0" if place else "x")).tasks["echo"]
    assert not lucky.informative
    half = Echo().evaluate(Says(lambda place: str(place % 4) if place % 2 else "x")).tasks["echo"]
    assert half.informative
    assert half.low < half.value < half.high


def test_one_item_has_no_interval() -> None:
    with pytest.raises(InputError, match="at least two"):
        scored([1.0])


def test_the_same_seed_gives_the_same_chance() -> None:
    def found(seed: int) -> Scores:
        return Echo(seed=seed).evaluate(Says(lambda place: str(place % 3)))

    assert found(1).as_dict() == found(1).as_dict()
    assert found(1).tasks["echo"].value == found(2).tasks["echo"].value


def test_a_model_is_asked_through_the_scorer_and_the_generator() -> None:
    bundle = Bench().bundle()
    subject = ModelSubject(bundle)
    assert subject.room == 256
    assert subject.length("One two") == len(bundle.processor("One two")["input_ids"])
    choices = [" dog", " a grey roof"]
    assert (
        subject.logprobs("The", choices)
        == score_choices(bundle.model, bundle.processor, "The", choices).logprobs.tolist()
    )
    texts = ["Rain falls on the roof.", "One two three"]
    nats = subject.nats(texts)
    whole = perplexity(bundle.model, bundle.processor, texts)
    assert sum(tokens for _, tokens in nats) == whole.tokens
    assert sum(nat for nat, _ in nats) == pytest.approx(whole.tokens * whole.nll_per_token, rel=1e-5)
    answers = subject.answers(["The quick", "One"], 5, False)
    with torch.no_grad():
        ids = bundle.processor("One", return_tensors="pt")["input_ids"]
        out = bundle.model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert answers[1] == bundle.processor.decode(out, skip_special_tokens=True)


def test_recipes_check_evaluations_by_name_and_options() -> None:
    recipe: dict[str, Any] = {"model": "m", "steps": [], "measure": {"quantities": ["perplexity", "llm_kick"]}}
    assert read_recipe(recipe).measure is not None
    with pytest.raises(RecipeError, match="did you mean 'llm_kick'"):
        read_recipe({**recipe, "measure": ["llm_kik"]})
    with pytest.raises(RecipeError, match="did you mean 'shots'"):
        read_recipe({**recipe, "measure": {"quantities": ["llm_kick"], "evaluations": {"llm_kick": {"shot": 1}}}})
    with pytest.raises(RecipeError, match="num_examples: must be >= 2"):
        read_recipe(
            {**recipe, "measure": {"quantities": ["llm_kick"], "evaluations": {"llm_kick": {"num_examples": 1}}}}
        )
    with pytest.raises((RecipeError, OptionError), match="evaluation"):
        read_recipe({**recipe, "measure": {"quantities": ["llm_kick"], "evaluations": {"sft": {}}}})
    with pytest.raises(RecipeError, match=r"measure\.quantities"):
        read_recipe({**recipe, "steps": ["llm_kick"]})


def test_a_recipe_measures_before_and_after_and_its_report_shows_both(tmp_path: Any) -> None:
    rows = [{"question": f"What is {n} plus one?", "answers": [str(n + 1)]} for n in range(5)]
    questions = tmp_path / "rows.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    options = {"tasks": ["facts", "perplexity"], "num_examples": 4, "new_tokens": 4, "texts": 2}
    report = engine.run(
        {
            "model": "llama-7m",
            "steps": [{"rounding": {"bits": 8}}],
            "measure": {"quantities": ["llm_kick"], "evaluations": {"llm_kick": options}, "questions": str(questions)},
        },
        out=tmp_path / "run",
    )
    before, after = report.arm("untouched").values, report.arm("result").values
    assert before["llm_kick facts"].n == 4
    assert 1 < before["llm_kick perplexity"].value < after["llm_kick perplexity"].value * 1.2
    assert before["llm_kick perplexity"].value != after["llm_kick perplexity"].value
    assert [line.metric for line in report.comparisons] == ["llm_kick facts"]
    assert any("uninformative" in note and "facts" in note for note in report.notes)
