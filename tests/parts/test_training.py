"""The trainer: normalisation over micro-batches, exact resume, whole checkpoints, and what it leaves untouched."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.core.errors import InputError, OptionError
from gossamer.kinds.objectives import Loss
from gossamer.objectives.sft import SFT
from gossamer.optimizers.adamw import AdamW
from gossamer.optimizers.sophia import Sophia
from gossamer.parts.training import TrainSettings, parameter_groups, rate_factor, train

WORDS = ["<pad>", "</s>", *["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]]
ROWS = [
    {"prompt": "one two", "completion": " three four five six seven"},
    {"prompt": "one", "completion": " two", "weight": 0.5},
    {"prompt": "three four five six", "completion": " seven eight nine"},
    {"text": "ten nine eight seven six five four three two one"},
    {"prompt": "two four six", "completion": " eight ten"},
    {"text": "five five five"},
]
FP32 = {"precision": "fp32", "max_length": 32, "batch_size": 2, "save_every": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    shape = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_dropout": dropout}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2)).to(dtype)


def lora(model: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1))


@pytest.fixture
def run(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def go(model: Any, *, folder: str = "run", rows: Any = ROWS, optimizer: Any = None, **options: Any) -> Any:
        given = {key: options.pop(key) for key in ("validation_rows", "resume", "progress") if key in options}
        settings = TrainSettings(**{**FP32, **options})
        optimizer = optimizer or AdamW(lr=0.01)
        return train(
            model, tokenizer, rows, objective=SFT(), optimizer=optimizer, settings=settings,
            folder=tmp_path / folder, **given,
        )  # fmt: skip

    return go


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(left: Any, right: Any, atol: float = 0.0) -> bool:
    pairs = weights(left), weights(right)
    return all(torch.allclose(pairs[0][name], pairs[1][name], rtol=0, atol=atol) for name in pairs[0])


def test_micro_batches_give_the_step_of_one_large_batch(run: Any) -> None:
    whole, cut = tiny(), tiny()
    # unequal numbers of supervised tokens in the micro-batches are what a mean of means gets wrong
    a = run(whole, folder="a", steps=4, batch_size=6)
    b = run(cut, folder="b", steps=4, batch_size=1, accumulation=6)
    assert same(whole, cut, atol=1e-6)
    assert [loss for _, loss in a.curve] == pytest.approx([loss for _, loss in b.curve], abs=1e-5)
    assert a.tokens == b.tokens > 0


def test_it_learns_and_reports(run: Any) -> None:
    seen: list[tuple[int, int, float]] = []
    model = tiny()
    result = run(model, steps=40, validation_rows=ROWS[:2], eval_every=20, progress=lambda *tick: seen.append(tick))
    assert result.steps == 40
    assert len(result.curve) == 40
    assert result.metrics["loss"] < 0.5 * result.curve[0][1]
    assert [tick[:2] for tick in seen] == [(step, 40) for step in range(1, 41)]
    assert [entry["step"] for entry in result.history if "eval_loss" in entry] == [20, 40]
    assert result.metrics["eval_loss"] < 1.0


@pytest.mark.parametrize("optimizer", [AdamW, Sophia])
@pytest.mark.parametrize("wrap", [lora, lambda model: model])
def test_a_run_that_died_ends_as_an_unbroken_one(run: Any, tmp_path: Path, wrap: Any, optimizer: Any) -> None:
    options = {"steps": 9, "save_every": 2, "batch_size": 2, "accumulation": 2, "optimizer": optimizer(lr=0.01)}
    unbroken, broken, resumed = (wrap(tiny(dropout=0.1)) for _ in range(3))
    expected = run(unbroken, folder="unbroken", **options)

    def die(step: int, total: int, loss: float) -> None:
        if step == 7:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        run(broken, progress=die, **options)
    (tmp_path / "run" / ".checkpoint-8.half").mkdir()
    result = run(resumed, **options)
    assert same(unbroken, resumed)
    assert result.curve == expected.curve
    assert result.tokens == expected.tokens
    assert not list((tmp_path / "run").glob(".*"))
    again = wrap(tiny())
    assert run(again, **options).curve == expected.curve, "a finished run is not trained again"
    assert same(unbroken, again)


def test_a_checkpoint_cut_short_is_passed_over(run: Any, tmp_path: Path) -> None:
    unbroken, resumed = tiny(), tiny()
    run(unbroken, folder="unbroken", steps=6, save_every=2)
    run(tiny(), steps=6, save_every=2)
    optimizer = tmp_path / "run" / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:100])
    steps: list[int] = []
    run(resumed, steps=6, save_every=2, progress=lambda step, *_: steps.append(step))
    assert steps == [5, 6]
    assert same(unbroken, resumed)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_checkpoints_hold_only_what_trains(run: Any, tmp_path: Path) -> None:
    run(lora(tiny()), steps=2, save_every=2)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "trainable.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)


def test_ctrl_c_saves_the_step_and_resumes(run: Any, tmp_path: Path) -> None:
    unbroken, model = tiny(), tiny()
    run(unbroken, folder="unbroken", steps=5, save_every=50)

    def press(step: int, total: int, loss: float) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(model, steps=5, save_every=50, progress=press)
    assert signal.getsignal(signal.SIGINT) is handler
    reached = json.loads(next((tmp_path / "run").glob("checkpoint-*/complete.json")).read_text())["step"]
    assert reached in (3, 4)
    resumed = tiny()
    run(resumed, steps=5, save_every=50)
    assert same(unbroken, resumed)


def test_another_run_in_the_folder_is_refused(run: Any) -> None:
    run(tiny(), steps=2, save_every=1)
    with pytest.raises(InputError, match=r"other settings.*resume=False"):
        run(tiny(), steps=3, save_every=1)
    with pytest.raises(InputError, match="other examples"):
        run(tiny(), steps=2, save_every=1, rows=ROWS[:3])
    assert run(tiny(), steps=3, save_every=1, resume=False).steps == 3


def test_random_state_mode_and_types_are_left_alone(run: Any) -> None:
    model = tiny(dtype=torch.bfloat16).eval()
    before, start = weights(model), torch.get_rng_state()
    run(model, steps=3, precision="bf16")
    assert torch.equal(torch.get_rng_state(), start)
    assert not model.training
    assert model.config.use_cache
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in model.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in weights(model).items())
    with torch.no_grad():
        assert model(torch.tensor([[2, 3]])).logits.dtype == torch.bfloat16, "its own forward is no longer patched"


class Headed(SFT):
    """An objective with a trainable head of its own: it learns the loss from above."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(1, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def modules(self, model: Any) -> Any:
        return self.head

    def loss(self, model: Any, batch: Any) -> Loss:
        plain = super().loss(model, batch)
        miss = (self.head(torch.ones(1, 1)) - 3.0).square().sum()
        return Loss(plain.value + miss * self.amount(batch) / self.normaliser(batch), {"miss": float(miss)})


def test_heads_of_the_objective_train_and_resume(tokenizer: Any, tmp_path: Path) -> None:
    settings = TrainSettings(**{**FP32, "steps": 6, "save_every": 3, "clip": 0.0})

    def go(folder: str, objective: Headed) -> Any:
        model = tiny()
        train(
            model, tokenizer, ROWS, objective=objective, optimizer=AdamW(lr=0.05), settings=settings,
            folder=tmp_path / folder,
        )  # fmt: skip
        return model

    unbroken, resumed = Headed(), Headed()
    model = go("run", unbroken)
    assert unbroken.head.bias.item() > 0.1
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert same(model, go("run", resumed))
    assert torch.equal(unbroken.head.bias, resumed.head.bias)


def test_packing_reaches_the_same_kind_of_loss_in_fewer_rows(run: Any) -> None:
    packed = run(tiny(), folder="packed", steps=1, batch_size=1, packing=True, rows=ROWS)
    plain = run(tiny(), folder="plain", steps=1, batch_size=6, rows=ROWS)
    # six rows fit two packed ones of 32 tokens, so one of those holds several
    assert packed.tokens > plain.tokens / 2


def test_the_schedule() -> None:
    settings = TrainSettings(steps=10, warmup=0.2, schedule="linear")
    rates = [rate_factor(step, settings) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(1 / 8)
    cosine = TrainSettings(steps=10, warmup=0.0)
    assert rate_factor(0, cosine) == 1.0
    assert rate_factor(5, cosine) == pytest.approx(0.5)


def test_vectors_do_not_decay() -> None:
    matrices, vectors = parameter_groups(tiny())
    assert "weight_decay" not in matrices
    assert all(p.ndim == 2 for p in matrices["params"])
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in vectors["params"])


def test_refusals(run: Any) -> None:
    with pytest.raises(InputError, match="require gradients"):
        run(tiny().requires_grad_(False), steps=1)
    quantised = tiny()
    quantised.is_quantized = True
    with pytest.raises(InputError, match="carry an adapter"):
        run(quantised, steps=1)
    with pytest.raises(InputError, match="at least one row"):
        run(tiny(), steps=1, rows=[])
    with pytest.raises(InputError, match="something to learn from"):
        run(tiny(), steps=1, rows=[{"text": "one two", "weight": 0.0}])
    with pytest.raises(OptionError, match="did you mean 'cosine'"):
        TrainSettings(schedule="cosin")
    with pytest.raises(OptionError, match=r"train.steps: must be >= 1"):
        TrainSettings(steps=0)
    with pytest.raises(OptionError, match="trackers"):
        run(tiny(), steps=1, trackers=("nonesuch",))
