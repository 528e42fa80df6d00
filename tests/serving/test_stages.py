"""Stages at work and switched off: a processor, drafters, a guard; and what a start line may say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

import gossamer
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.kinds.guards import REFUSAL
from gossamer.serving.app import build_app
from gossamer.serving.limits import Settings
from gossamer.serving.server import background
from gossamer.serving.stages import Stages, load_stages, parse_stage
from gossamer.testing.bench import PROMPTS, TOXIC, Bench

NEW = 14
QUICK = {"steps": 3, "batch_size": 2, "switch_off": False, "total_tokens": 12, "top_k": 3}
DRAFTERS = ("prompt_lookup", "clover", "chimera", "fspad")


def off(name: str) -> dict[str, Any]:
    return {"gossamer": {"stages": {name: False}}}


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **{"max_tokens": NEW, "temperature": 0, **options})


@pytest.fixture
def served(opened: Any, bundle: Bundle, client_of: Any) -> Iterator[Callable[[Stages], openai.OpenAI]]:
    """``served(stages)``: a client of a server with them."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def serve(stages: Stages) -> openai.OpenAI:
            engine = stack.enter_context(opened(bundle, stages=stages))
            return client_of(stack.enter_context(background(build_app(engine, Settings()))))

        yield serve


def test_proxy_tuning_at_work_and_switched_off(served: Any, client: openai.OpenAI, bundle: Bundle) -> None:
    bench, models = Bench("llama"), {}
    for number, name in enumerate(("small", "plain")):
        models[name] = Bundle(bench.model(seed=10 + number), bench.tokenizer())
    stages = load_stages(["proxy_tuning:expert=small,anti_expert=plain,alpha=1.5"], bundle, models.__getitem__)
    tuned = served(stages)
    plain = [choice.text for choice in complete(client, list(PROMPTS)).choices]
    found = complete(tuned, list(PROMPTS))
    texts = [choice.text for choice in found.choices]
    system: Any = stages.decoding
    for prompt, text, before in zip(PROMPTS, texts, plain, strict=True):
        ids = bundle.processor(prompt)["input_ids"]
        tokens = system.generate(bundle.model, bundle.processor, prompt, max_new_tokens=NEW).tokens[0]
        assert (
            text
            == bundle.processor.decode([*ids[-5:], *tokens], skip_special_tokens=True)[
                len(bundle.processor.decode(ids[-5:], skip_special_tokens=True)) :
            ]
        )
        assert text != before
    assert found.usage.gossamer["stages"]["proxy_tuning"]["ms"] > 0
    without = complete(tuned, list(PROMPTS), extra_body=off("proxy_tuning"))
    assert [choice.text for choice in without.choices] == plain
    assert without.usage.gossamer["stages"] == {}
    # again, from the pasts that the others left
    assert [choice.text for choice in complete(tuned, list(PROMPTS)).choices] == texts
    assert tuned.models.retrieve("tiny").gossamer["stages"] == ["proxy_tuning"]


@pytest.mark.parametrize("name", DRAFTERS)
def test_text_with_a_drafter_is_that_without(
    name: str, served: Any, client: openai.OpenAI, bundle: Bundle, tmp_path: Path
) -> None:
    from gossamer.core import registry

    known = {spec.name for spec in registry.find(name).options}
    system = gossamer.system(name, **{key: value for key, value in QUICK.items() if key in known})
    line = f"{name}:switch_off=false"
    if hasattr(system, "fit"):
        system.fit(bundle, Bench("llama").rows(("text",)))
        system.save(tmp_path / "drafter")
        line += f",path={tmp_path / 'drafter'}"
    drafted = served(load_stages([line], bundle, dict[str, Bundle]().__getitem__))
    prompts = [*PROMPTS, "x"]
    for options in ({}, {"temperature": 1.2, "seed": 3}, {"stop": ["e"]}):
        plain = [(choice.text, choice.finish_reason) for choice in complete(client, prompts, **options).choices]
        for _ in range(2):  # the second time from what the first left
            found = complete(drafted, prompts, **options)
            assert [(choice.text, choice.finish_reason) for choice in found.choices] == plain
        report = found.usage.gossamer["stages"][name]
        assert report["ms"] > 0
        assert report["forwards"] <= report["tokens"]
    without = complete(drafted, prompts, extra_body=off(name))
    assert [choice.text for choice in without.choices] == [c.text for c in complete(client, prompts).choices]
    assert without.usage.gossamer["stages"] == {}
    longer = [prompt + " and then" for prompt in PROMPTS]
    reused = complete(drafted, longer)
    assert [choice.text for choice in reused.choices] == [c.text for c in complete(client, longer).choices]
    last = list(complete(drafted, PROMPTS[0], stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage.gossamer["stages"][name]["ms"] > 0


def test_an_error_of_a_drafter_ends_one_answer(opened: Any, bundle: Bundle, client_of: Any) -> None:
    system = gossamer.system("prompt_lookup", switch_off=False)
    draft = system.draft

    def broken(states: Any, k: int) -> Any:
        if any(40 in state.prompt for state in states):
            raise RuntimeError("bang")
        return draft(states, k)

    system.draft = broken
    with opened(bundle, stages=Stages(system)) as engine, background(build_app(engine, Settings())) as address:
        client = client_of(address)
        plain = complete(client, [5, 6, 7], extra_body=off("prompt_lookup")).choices[0].text
        with pytest.raises(openai.InternalServerError):
            complete(client, [[5, 6, 7], [5, 40, 7]])
        assert complete(client, [5, 6, 7]).choices[0].text == plain
        assert complete(client, [5, 40, 7], extra_body=off("prompt_lookup")).choices[0].text is not None


@pytest.fixture(scope="module")
def guard_folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    guard = gossamer.system("toxicdetector", epochs=150)
    guard.fit(bundle, Bench("llama").guard_rows())
    folder = tmp_path_factory.mktemp("guard") / "state"
    guard.save(folder)
    return folder


def test_a_guard_at_work_and_switched_off(
    served: Any, client: openai.OpenAI, bundle: Bundle, guard_folder: Path
) -> None:
    stages = load_stages([f"toxicdetector:path={guard_folder}"], bundle, dict[str, Bundle]().__getitem__)
    guarded = served(stages)
    flagged = [text for text in TOXIC if stages.guards[0].judge(text).flagged]
    clear = [text for text in PROMPTS if not stages.guards[0].judge(text).flagged]
    assert flagged
    assert clear
    plain = complete(client, clear[0]).choices[0].text
    for found in (complete(guarded, flagged[0]), complete(guarded, [clear[0], flagged[0]])):
        assert found.choices[-1].text == REFUSAL
        assert found.choices[-1].finish_reason == "content_filter"
    assert found.choices[0].text == plain
    report = found.usage.gossamer["stages"]["toxicdetector"]
    assert report["ms"] > 0
    turns = [{"role": "user", "content": flagged[0]}, {"role": "assistant", "content": "No."},
             {"role": "user", "content": clear[0]}]  # fmt: skip
    chat = guarded.chat.completions.create(model="tiny", messages=turns, max_tokens=4)
    assert chat.choices[0].message.content == REFUSAL
    assert chat.usage.gossamer["stages"]["toxicdetector"]["label"] == "flagged"
    chunks = list(guarded.chat.completions.create(model="tiny", messages=turns, max_tokens=4, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == REFUSAL
    assert chunks[-1].choices[0].finish_reason == "content_filter"
    without = complete(guarded, flagged[0], extra_body=off("toxicdetector"))
    assert without.choices[0].text == complete(client, flagged[0]).choices[0].text
    assert without.usage.gossamer["stages"] == {}
    with pytest.raises(openai.BadRequestError, match="toxicdetector"):
        complete(guarded, clear[0], extra_body=off("toxicdetecter"))


def test_start_lines() -> None:
    assert parse_stage("clover") == ("clover", {})
    assert parse_stage("clover:path=a=b/c,switch_off=false") == ("clover", {"path": "a=b/c", "switch_off": False})
    for wrong in ("clover:path", "clover:=1", "clover:path=a,path=b"):
        with pytest.raises(OptionError):
            parse_stage(wrong)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["clovr"], "did you mean 'clover'"),
        (["mos"], "decoding or guards"),
        (["clover"], "where its state lies"),
        (["clover:path=nowhere"], "state.json"),
        (["clover:path=nowhere,heads=3"], "changes no output"),
        (["prompt_lookup:ngrams=3"], "did you mean 'ngram'"),
        (["prompt_lookup:ngram=0"], "be >= 1"),
        (["prompt_lookup", "prompt_lookup"], "twice"),
        (["prompt_lookup", "proxy_tuning:expert=a,anti_expert=a"], "at most one decoding system"),
    ],
)
def test_a_wrong_start_line_is_refused(lines: list[str], message: str, bundle: Bundle) -> None:
    with pytest.raises((OptionError, InputError), match=message):
        load_stages(lines, bundle, {"a": bundle}.__getitem__)


def test_a_stage_of_another_base_is_refused(bundle: Bundle, guard_folder: Path) -> None:
    other = Bench("llama").bundle(seed=3)
    with pytest.raises(InputError, match="fit this model"):
        load_stages([f"toxicdetector:path={guard_folder}"], other, dict[str, Bundle]().__getitem__)
    drafter = gossamer.system("medusa", steps=1, batch_size=1)
    drafter.fit(bundle, Bench("llama").rows(("text",)))
    other.parts["medusa"] = drafter
    with pytest.raises(InputError, match="model that it was fitted on"):
        load_stages(["medusa"], other, dict[str, Bundle]().__getitem__)
    bundle_with = Bundle(bundle.model, bundle.processor, parts={"medusa": drafter})
    assert load_stages(["medusa"], bundle_with, dict[str, Bundle]().__getitem__).names == ["medusa"]


def test_a_stage_moves_scores_or_guesses() -> None:
    from gossamer.kinds.decoding import LoopDecoding

    class Loop(LoopDecoding):
        begin = step = None  # type: ignore[assignment]

    Loop.__abstractmethods__ = frozenset()
    with pytest.raises(InputError, match="move scores or guess"):
        Stages(Loop())
