"""The decoding runner in plain torch against transformers."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.core.errors import InputError, OptionError
from gossamer.parts.decode_plan import NotPlanned, read_plan
from gossamer.parts.decode_runner import Runner
from gossamer.testing.bench import FAMILIES, Bench

CAUSAL = tuple(family for family in FAMILIES if family != "clip" and Bench(family).generates)
TOKENS = [7, 30, 51, 98, 200, 11, 45, 12, 8]
PARENTS = [-1, 0, 0, 1, -1, 4, 3, 2]
NEW = [40, 41, 42, 43, 44, 45, 46, 47]


@functools.cache
def model_of(family: str) -> Any:
    return Bench(family).model(seed=3)


@functools.cache
def runner_of(family: str, **options: Any) -> Runner:
    return Runner(model_of(family), max_length=160, **options)


@torch.no_grad()
def plain_logits(model: Any, ids: list[int]) -> Tensor:
    return model(input_ids=torch.tensor([ids])).logits[0].float()


def plain_text(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def is_ancestor(a: int, b: int) -> bool:
    while b > a:
        b = PARENTS[b]
    return a == b


def path_to(leaf: int) -> list[int]:
    found = []
    while leaf >= 0:
        found, leaf = [leaf, *found], PARENTS[leaf]
    return found


def test_the_bench_has_causal_families() -> None:
    assert {"llama", "gemma3", "qwen3", "gpt2", "mixtral"} <= set(CAUSAL)


@pytest.mark.parametrize("family", CAUSAL)
def test_plan_knows_the_family(family: str) -> None:
    assert runner_of(family).reason == ""
    assert len(read_plan(model_of(family)).describe()) == 2


def test_what_transformers_leaves_behind_after_giving_hidden_states_is_no_hook() -> None:
    model = Bench("llama").model()
    model(input_ids=torch.tensor([TOKENS]), output_hidden_states=True)
    assert read_plan(model).family == "Llama"
    model.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.raises(NotPlanned, match="without hooks"):
        read_plan(model)


@pytest.mark.parametrize("family", CAUSAL)
def test_greedy_tokens_are_those_of_generate(family: str) -> None:
    """Far beyond Gemma's window of 6."""
    for prompt in (TOKENS[:1], TOKENS[::-1] * 3):
        assert runner_of(family).generate(prompt, max_new_tokens=30) == plain_text(model_of(family), prompt, 30)


@pytest.mark.parametrize("family", CAUSAL)
def test_every_step_has_the_logits_of_one_pass(family: str) -> None:
    runner, ids = runner_of(family), TOKENS * 4
    state = runner.open()
    mine = [runner.prefill(state, ids[:1]), *(runner.step(state, token) for token in ids[1:])]
    torch.testing.assert_close(torch.stack(mine), plain_logits(model_of(family), ids), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_bfloat16_is_as_near_to_float32_as_the_model_in_bfloat16(family: str) -> None:
    model = copy.deepcopy(model_of(family)).bfloat16()
    runner = Runner(model, max_length=64, native="never")
    assert runner.dtype == torch.bfloat16
    exact, rounded = plain_logits(model_of(family), TOKENS)[-1], plain_logits(model, TOKENS)[-1]
    mine = runner.prefill(runner.open(), TOKENS)
    assert (mine - exact).norm() < 1.5 * (rounded - exact).norm()
    assert (mine - rounded).norm() < 1.5 * (rounded - exact).norm()


@pytest.mark.parametrize("family", CAUSAL)
def test_tree_is_separate_passes_of_each_branch(family: str) -> None:
    runner, model = runner_of(family), model_of(family)
    state = runner.open()
    runner.prefill(state, TOKENS)
    out = runner.verify(state, NEW, PARENTS, hidden=(0, 1, -1))
    assert out.hidden is not None
    for leaf in range(len(NEW)):
        ids = TOKENS + [NEW[i] for i in path_to(leaf)]
        torch.testing.assert_close(out.logits[leaf], plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        for place, layer in enumerate((0, 1, -1)):
            torch.testing.assert_close(out.hidden[place, leaf], states[layer][0, -1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("path", [[0, 1, 3, 6], [4], [0, 2], []])
def test_kept_path_is_a_fresh_prefill(family: str, path: list[int]) -> None:
    runner, model = runner_of(family), model_of(family)
    state = runner.open()
    runner.prefill(state, TOKENS)
    runner.verify(state, NEW, PARENTS)
    state.keep(path)
    ids = TOKENS + [NEW[i] for i in path]
    assert state.length == len(ids)
    for token in (99, 100):
        ids.append(token)
        torch.testing.assert_close(runner.step(state, token), plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_cropped_state_is_a_fresh_prefill(family: str) -> None:
    runner, model = runner_of(family), model_of(family)
    state = runner.open()
    runner.prefill(state, TOKENS * 3)
    twin = state.fork()
    state.crop(10)
    ids = [*(TOKENS * 3)[:10], 5]
    torch.testing.assert_close(runner.step(state, 5), plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)
    ids = [*TOKENS * 3, 6]
    torch.testing.assert_close(runner.step(twin, 6), plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", CAUSAL)
def test_company_does_not_matter(family: str) -> None:
    prompts = [TOKENS, TOKENS[:2], TOKENS[::-1] * 2]
    runner = runner_of(family)
    assert runner.generate_many(prompts, max_new_tokens=12) == [
        runner.generate(prompt, max_new_tokens=12) for prompt in prompts
    ]


def test_long_prompts_run_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.parts.decode_runner.BLOCK", 4)
    runner = runner_of("gemma3")
    mine = runner.prefill(runner.open(), TOKENS * 3)
    torch.testing.assert_close(mine, plain_logits(model_of("gemma3"), TOKENS * 3)[-1], atol=2e-4, rtol=1e-4)


def test_mask_and_parents_say_the_same() -> None:
    runner = runner_of("llama")
    mask = torch.tensor([[is_ancestor(j, i) for j in range(8)] for i in range(8)])
    found = []
    for given in ({"parents": PARENTS}, {"mask": mask, "positions": [len(path_to(i)) - 1 for i in range(8)]}):
        state = runner.open()
        runner.prefill(state, TOKENS)
        found.append(runner.verify(state, NEW, **given).logits)
    assert torch.equal(*found)
    mask[5, 0] = True
    with pytest.raises(InputError, match="row 5"):
        runner.verify(runner.open(), NEW, mask=mask)
    with pytest.raises(InputError, match="earlier tokens"):
        runner.verify(runner.open(), NEW[:2], [-1, 1])
    with pytest.raises(InputError, match="depths"):
        runner.verify(runner.open(), NEW[:2], [-1, -1], positions=[0, 1])


def test_states_refuse_what_does_not_fit() -> None:
    runner = Runner(model_of("llama"), max_length=10)
    state = runner.open()
    runner.prefill(state, TOKENS)
    runner.verify(state, [4], [-1])
    with pytest.raises(InputError, match="keep"):
        runner.step(state, 4)
    with pytest.raises(InputError, match="path"):
        state.keep([1])
    state.keep([0])
    with pytest.raises(InputError, match="max_length"):
        runner.step(state, 4)
    with pytest.raises(InputError, match="from 0 to 10"):
        state.crop(11)
    with pytest.raises(InputError, match="pending"):
        state.keep([0])
    with pytest.raises(InputError, match="max_length"):
        runner.prefill(runner.open(), TOKENS * 2)
    with pytest.raises(OptionError, match="did you mean 'int8'"):
        Runner(model_of("llama"), weights="in8")
    with pytest.raises(OptionError, match="256 positions"):
        Runner(model_of("llama"), max_length=257)
    with pytest.raises(InputError, match="causal"):
        Runner(Bench("bert").model())


def test_end_token_ends() -> None:
    runner = runner_of("llama")
    text = runner.generate(TOKENS, max_new_tokens=12)
    end = text[5]
    assert runner.generate(TOKENS, max_new_tokens=12, eos=end) == text[: text.index(end) + 1]


def _hooked(model: Any) -> Any:
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 0.5)
    return model


def _subclassed(model: Any) -> Any:
    class Scaled(torch.nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 0.5 * super().forward(input)

    model.model.layers[0].mlp.up_proj.__class__ = Scaled
    return model


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()


def _patched(model: Any) -> Any:
    inner = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = lambda x: 0.5 * inner(x)
    return model


@pytest.mark.parametrize("change", [_hooked, _subclassed, _adapted, _patched])
def test_a_changed_model_runs_its_own_forward(change: Any) -> None:
    model = change(Bench("llama").model(seed=3))
    with pytest.raises(NotPlanned):
        read_plan(model)
    runner = Runner(model, max_length=64)
    assert runner.plan is None
    assert runner.reason
    text = plain_text(model, TOKENS, 20)
    assert not torch.allclose(plain_logits(model, TOKENS), plain_logits(model_of("llama"), TOKENS), atol=1e-3)
    assert runner.generate(TOKENS, max_new_tokens=20) == text
    state = runner.open()
    runner.prefill(state, TOKENS)
    out = runner.verify(state, NEW, PARENTS, hidden=(-1,))
    for leaf in range(len(NEW)):
        ids = TOKENS + [NEW[i] for i in path_to(leaf)]
        torch.testing.assert_close(out.logits[leaf], plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)
    state.keep([0, 1, 3])
    ids = [*TOKENS, 40, 41, 43, 99]
    torch.testing.assert_close(runner.step(state, 99), plain_logits(model, ids)[-1], atol=2e-4, rtol=1e-4)
    state.crop(5)
    torch.testing.assert_close(runner.step(state, 9), plain_logits(model, [*TOKENS[:5], 9])[-1], atol=2e-4, rtol=1e-4)
    with pytest.warns(UserWarning, match="not used"):
        Runner(model, weights="int8")
