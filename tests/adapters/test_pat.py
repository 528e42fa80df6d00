"""PAT: mask, losses and operators by the paper's formulas, the schedule under the trainer, and an exact merge."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.adapters.pat import PAT
from gossamer.core.errors import InputError, UsageError
from gossamer.objectives.sft import SFT
from gossamer.optimizers.adamw import AdamW
from gossamer.parts.residual_stream import residual_stream, untie
from gossamer.parts.scheduled import penalties, tell_step
from gossamer.parts.training import TrainSettings, train
from gossamer.testing.bench import Bench

FAMILIES = ("llama", "gemma3", "qwen3")


def attached(family: str = "llama", **options: Any) -> tuple[PAT, Any]:
    system = PAT(**{"lora_dropout": 0.0, "inner": 6, "lora_rank": 3, **options})
    return system, system.attach(Bench(family).model())


def moved(model: Any, size: float = 0.1) -> Any:
    """What PAT adds off its start, as training would leave it."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.gossamer_adapter.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def mask_of(model: Any) -> Any:
    return model.gossamer_adapter.mask


def logits(model: Any, family: str = "llama") -> Tensor:
    return model(**Bench(family).inputs()).logits


def naive_mask(w: Tensor, t: int, span: int) -> Tensor:
    held = max(1, min(t, 0.8 * span))
    tau = 1 / (1 - math.log(held) / math.log(span) + 1e-6)
    return torch.sigmoid(tau * w) + max(0.5 - t / span, 0)


def naive_weights(plain: Any, modules: Any, mask: Tensor) -> dict[str, Tensor]:
    """Every weight with its update and operator multiplied out; the model is untied."""
    stream, weights = residual_stream(plain, "test"), {}
    projected = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear) and n != stream.head]
    for path, update in zip(projected, modules.updates, strict=True):
        weights[path] = plain.get_submodule(path).weight + update.scale * update.b @ update.a
    weights[stream.embedding] = plain.get_submodule(stream.embedding).weight.T
    for path, operator in zip((stream.embedding, *stream.writers), modules.operators, strict=True):
        full = torch.diag(operator.v * mask) @ (torch.eye(stream.width) + operator.d1 @ operator.d0)
        weights[path] = full @ weights[path]
    weights[stream.embedding] = weights[stream.embedding].T
    return {f"{path}.weight": weight for path, weight in weights.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_naive_form_in_values_and_gradients(family: str) -> None:
    plain = Bench(family).model()
    _, model = attached(family)
    moved(model)
    tell_step(model, 3, 10)
    model.train()
    if residual_stream(plain, "test").tied:
        untie(plain)
    modules, parameters = model.gossamer_adapter, list(model.gossamer_adapter.parameters())
    mask = naive_mask(modules.mask.logits, 3, 10)
    naive = torch.func.functional_call(plain, naive_weights(plain, modules, mask), kwargs=Bench(family).inputs()).logits
    found = logits(model, family)
    assert torch.allclose(found, naive, atol=2e-4)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * direction).mean(), parameters)
    theirs = torch.autograd.grad((naive * direction).mean(), parameters)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-7)


@pytest.mark.parametrize("t", [0, 1, 7, 50, 79])
def test_the_mask_of_a_step(t: int) -> None:
    _, model = attached()
    moved(model)
    tell_step(model, t, 100)
    model.train()
    mask = mask_of(model)
    assert torch.allclose(mask(), naive_mask(mask.logits, t, 100))
    if t >= 50:
        assert (mask() >= 0.5).equal(mask.logits >= 0), "no offset is left"
    model.eval()
    assert set(mask().tolist()) <= {0.0, 1.0}
    assert mask().equal((naive_mask(mask.logits, t, 100) >= 0.5).float())


def test_from_the_freezing_step_on_logits_and_temperature_stay() -> None:
    _, model = attached(freeze_at=0.5, exact=False)
    moved(model)
    mask = mask_of(model.train())
    tell_step(model, 49, 100)
    assert mask().requires_grad
    tell_step(model, 50, 100)
    held = mask()
    assert not held.requires_grad
    assert set(penalties(model)) == {"identity"}
    tell_step(model, 90, 100)
    assert mask().equal(held)
    assert torch.allclose(held, torch.sigmoid(mask.logits / (1 - math.log(50) / math.log(100) + 1e-6)))


@pytest.mark.parametrize("shift", [0.0, 0.4, -0.4])
def test_the_penalties_in_values_and_gradients(shift: float) -> None:
    """Also where no logit is positive or none negative, which has a mean of nothing in it."""
    _, model = attached(budget_weight=7.0, identity_weight=0.5)
    mask, operators = mask_of(moved(model)), model.gossamer_adapter.operators
    with torch.no_grad():
        mask.logits.clamp_(-0.3, 0.3).add_(shift)
    found = penalties(model)
    w = mask.logits.detach().clone().requires_grad_(True)
    count = int((w >= 0).sum())
    assert float(found["budget"].detach()) == pytest.approx(7 * abs(count - 48) / 48)
    up, down = w[w > 0], w[w <= 0]
    expected = sum((side - pole).square().mean() for side, pole in ((up, 0.5), (down, -0.5)) if len(side))
    assert torch.allclose(found["polarisation"], expected)
    gram = [operator.d0 @ operator.d0.T - torch.eye(6) for operator in operators]
    assert torch.allclose(found["identity"], 0.5 * sum(each.square().mean() for each in gram))
    push = torch.autograd.grad(found["budget"], mask.logits, retain_graph=True)[0]
    assert torch.allclose(push, torch.full((64,), 7 / 48 * (count > 48) - 7 / 48 * (count < 48)))
    pull = torch.autograd.grad(found["polarisation"], mask.logits)[0]
    assert torch.allclose(pull, torch.autograd.grad(expected, w)[0])
    turn = torch.autograd.grad(found["identity"], operators[0].d0)[0]
    assert torch.allclose(turn, 0.5 * 4 / 36 * gram[0] @ operators[0].d0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_is_the_masked_one(family: str, tmp_path: Path) -> None:
    """v, D1 D0 and LoRA are all far from their start; the result is a stock class's checkpoint."""
    system, model = attached(family)
    moved(model).eval()
    system.settle(model)
    before = logits(model, family).detach()
    kinds = [type(module) for module in Bench(family).model().modules()]
    small = system.merge(model)
    assert small.config.hidden_size == 48
    assert not small.config.tie_word_embeddings
    assert {type(module) for module in small.modules()} <= set(kinds)
    assert torch.allclose(logits(small, family), before, rtol=0, atol=1e-4)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)
    assert logits(again, family).equal(logits(small, family))
    tokens = Bench(family).inputs()
    assert again.generate(**tokens, max_new_tokens=4, do_sample=False).shape[1] == 16


def test_without_v_the_merged_model_would_differ() -> None:
    system, model = attached()
    moved(model).eval()
    system.settle(model)
    full = logits(model).detach()
    with torch.no_grad():
        for operator in model.gossamer_adapter.operators:
            operator.v.fill_(1.0)
    assert not torch.allclose(logits(system.merge(model)), full, atol=0.1)


def test_the_attached_model_generates_what_the_merged_one_does() -> None:
    system, model = attached("gemma3")
    moved(model, 0.02).eval()
    system.settle(model)
    options = {**Bench("gemma3").inputs(), "max_new_tokens": 5, "do_sample": False}
    assert model.generate(**options).equal(system.merge(model).generate(**options))


def test_the_head_is_tied_again_after_detach() -> None:
    system, model = attached("gemma3")
    plain = system.detach(moved(model))
    assert residual_stream(plain, "test").tied
    assert logits(plain, "gemma3").equal(logits(Bench("gemma3").model(), "gemma3"))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    _, model = attached()
    tell_step(moved(model), 3, 10)
    model.train()
    parameters = list(model.gossamer_adapter.parameters())
    plain = torch.autograd.grad(logits(model).square().mean(), parameters)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = torch.autograd.grad(logits(model).square().mean(), parameters)
    assert all(torch.allclose(one, two, atol=1e-6) for one, two in zip(plain, again, strict=True))


def test_the_fixed_mask_lets_the_last_channels_decay() -> None:
    system, model = attached(trainable_mask=False)
    mask = mask_of(model.train())
    assert "logits" not in dict(mask.named_parameters())
    assert mask().equal(torch.ones(64))
    tell_step(model, 5, 10)
    assert torch.allclose(mask(), torch.where(torch.arange(64) < 48, 1.0, math.exp(-2.77 / 2)))
    assert set(penalties(model)) == {"identity"}
    assert mask_of(model.eval())().equal((torch.arange(64) < 48).float())
    assert system.merge(model).config.hidden_size == 48


def test_parts_are_float32_on_a_bfloat16_model() -> None:
    system = PAT(inner=6, lora_rank=3)
    model = system.attach(Bench("gemma3").model().to(torch.bfloat16))
    assert {parameter.dtype for parameter in model.gossamer_adapter.parameters()} == {torch.float32}
    assert logits(model, "gemma3").dtype == torch.bfloat16
    moved(model, 0.02).eval()
    system.settle(model)
    before = logits(model, "gemma3").detach()
    small = system.merge(model)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert torch.allclose(logits(small, "gemma3"), before, rtol=0, atol=0.1 * float(before.float().std()))


def test_saved_and_loaded_the_mask_goes_on_from_its_step(tmp_path: Path) -> None:
    system, model = attached()
    tell_step(moved(model).eval(), 7, 10)
    assert system.channels(model)["kept"] < 64
    system.save(model, tmp_path / "saved")
    again = PAT(system.config).load(Bench().model(), tmp_path / "saved")
    assert mask_of(again).clock.tolist() == [7, 10]
    assert logits(again.eval()).equal(logits(model))


def test_disabled_it_is_the_model_without() -> None:
    system, model = attached()
    moved(model).eval()
    full = logits(model)
    with system.disabled(model):
        assert logits(model).equal(logits(Bench().model()))
    assert logits(model).equal(full)


# the schedule under the trainer

ROWS = Bench().rows(("completion",))


def trained(model: Any, folder: Path, **options: Any) -> Any:
    settings = {"steps": 5, "batch_size": 2, "max_length": 32, "precision": "fp32", "save_every": 0, "clip": 0.0}
    progress = options.pop("progress", None)
    return train(
        model, Bench().tokenizer(), ROWS, objective=SFT(), optimizer=AdamW(lr=0.03), folder=folder,
        settings=TrainSettings(**{**settings, **options}), progress=progress,
    )  # fmt: skip


def test_training_meets_the_target_and_the_steps_are_the_optimizers(tmp_path: Path) -> None:
    system, model = attached()
    seen: list[int] = []
    result = trained(
        model, tmp_path, batch_size=1, accumulation=2, progress=lambda *_: seen.append(int(mask_of(model).clock[0]))
    )
    assert sorted(set(seen)) == list(range(min(seen), min(seen) + 5)), "one tick a step, whatever the micro-batches"
    assert mask_of(model).clock.tolist() == [5, 5]
    assert system.channels(model) == {"width": 64, "target": 48, "kept": 48}
    assert {"budget", "polarisation", "identity"} <= set(result.history[0])
    assert system.merge(model).config.hidden_size == 48


def test_penalties_count_once_a_step(tmp_path: Path) -> None:
    """Micro-batches of unequal size give the weights of one large batch."""
    models = [attached()[1] for _ in range(2)]
    trained(models[0], tmp_path / "whole", steps=2, batch_size=4)
    trained(models[1], tmp_path / "cut", steps=2, batch_size=1, accumulation=4)
    for one, two in zip(*(model.gossamer_adapter.parameters() for model in models), strict=True):
        assert torch.allclose(one, two, atol=1e-4)


def test_a_run_that_died_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    options = {"save_every": 2, "steps": 6}
    unbroken, broken, resumed = (attached()[1] for _ in range(3))
    trained(unbroken, tmp_path / "a", **options)

    def die(step: int, total: int, loss: float) -> None:
        if step == 5:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        trained(broken, tmp_path / "b", progress=die, **options)
    trained(resumed, tmp_path / "b", **options)
    expected = unbroken.gossamer_adapter.state_dict()
    for name, value in resumed.gossamer_adapter.state_dict().items():
        assert value.equal(expected[name]), name


def test_a_second_run_leaves_the_mask_as_it_is(tmp_path: Path) -> None:
    system, model = attached()
    trained(model, tmp_path / "a", steps=4)
    mask = mask_of(model)
    before, kept = mask.logits.detach().clone(), mask.kept()
    trained(model, tmp_path / "b", steps=2)
    assert mask.clock.tolist() == [4, 4]
    assert mask.logits.equal(before)
    assert mask.kept().equal(kept)
    assert system.channels(model)["kept"] == 48


def test_a_schedule_longer_than_the_run_is_refused(tmp_path: Path) -> None:
    _, model = attached(mask_steps=5)
    with pytest.raises(InputError, match=r"pat\.mask_steps: must be at most the 4 steps of the run, got 5"):
        trained(model, tmp_path, steps=4)


def test_a_schedule_shorter_than_the_run_ends_at_its_own_step() -> None:
    _, model = attached(mask_steps=5)
    tell_step(moved(model), 5, 100)
    assert mask_of(model).frozen
    assert len(mask_of(model).kept()) == 48


# what is refused


def test_merging_before_the_budget_is_met() -> None:
    system, model = attached()
    with pytest.raises(InputError, match=r"keeps 48 of 64 channels, got 64; .*settle\(model\)"):
        system.merge(model)
    inexact, other = attached(exact=False)
    tell_step(moved(other), 10, 10)
    assert inexact.channels(other)["kept"] != 48
    with pytest.raises(InputError, match="exact: true"):
        inexact.merge(other)
    inexact.settle(other)
    largest = mask_of(other).logits.topk(48).indices.sort().values
    assert mask_of(other).kept().equal(largest)
    assert inexact.merge(other).config.hidden_size == 48


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_ratio": 0.01}, "leave some of the 64 channels"),
        ({"keep_ratio": 0.99}, "drop some, in steps of 8"),
        ({"inner": 65}, "be at most the width 64"),
        ({"lora_rank": 60}, "lora_rank: must be at most 32"),
    ],
)
def test_options_that_do_not_fit_the_model(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        attached(**options)


def test_the_number_kept_is_one_that_the_heads_divide() -> None:
    system = PAT(keep_ratio=0.7, round_to=1)
    assert system.kept_channels(Bench().model()) == 44


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_models_with_another_stream_are_refused(family: str) -> None:
    with pytest.raises(InputError, match="Llama-, Mistral-, Qwen- or Gemma-type"):
        attached(family)


def test_a_copy_of_an_attached_model_is_one_of_its_own() -> None:
    _, model = attached()
    moved(model).eval()
    before = logits(model)
    twin = copy.deepcopy(model)
    moved(twin, 0.3)
    assert logits(model).equal(before)
    assert not logits(twin).equal(before)


def test_a_recipe_from_pat_to_a_saved_narrow_model(rows_path: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from gossamer.pipeline import engine

    steps = [
        {"pat": {"inner": 8, "lora_rank": 4}},
        {"train": {"steps": 4, "batch_size": 2, "max_length": 48}},
        {"merge": {}},
        {"save": {}},
    ]
    data = {"path": rows_path, "test": 2, "validation": 2}
    folder = tmp_path / "run"
    report = engine.run({"model": "llama-7m", "data": data, "steps": steps, "measure": None}, out=folder)
    assert report.steps[2].changed["round_trip.largest"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(folder / "result" / "model")
    assert model.config.hidden_size == 192
    assert model.model.layers[7].mlp.down_proj.weight.shape == (192, 512)
