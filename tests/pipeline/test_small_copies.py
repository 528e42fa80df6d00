"""LoRAM by recipe: copy, align, quantise, train, recover; broken off anywhere it ends the same; orders refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gossamer.core.errors import InputError
from gossamer.core.recipe import RecipeError, read_recipe
from gossamer.hub.models import resolve
from gossamer.parts.small_copies import read_record
from gossamer.pipeline import engine
from gossamer.pipeline.stage import load_bundle
from gossamer.pipeline.steps import recover, save

STEPS: list[Any] = [
    {"trim_vocabulary": {"corpus": "data"}},
    {"small_copy": {"method": "stru"}},
    {"align": {"corpus": "data", "steps": 2, "batch_size": 4, "max_length": 48}},
    {"rounding": {"bits": 8}},
    {"loram": {"rank": 4}},
    {"train": {"steps": 3, "batch_size": 4, "max_length": 48, "save_every": 1}},
    {"recover": {}},
    {"save": {}},
    {"reload": {}},
]


def recipe(rows_path: str, **changes: Any) -> dict[str, Any]:
    data = {"path": rows_path, "test": 4, "validation": 3}
    return {"model": "llama-7m", "data": data, "seed": 3, "steps": STEPS, **changes}


@pytest.fixture(scope="module")
def unbroken(rows_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    engine.run(recipe(rows_path), out=folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "result" / "adapter" / "adapter_model.safetensors")


def test_the_result_is_a_plain_lora_on_the_model_before_the_copy(unbroken: Path) -> None:
    state = json.loads((unbroken / "state.json").read_text())
    changed = {record["step"]: record["changed"] for record in state}
    parameters = changed["small_copy"]
    assert parameters["parameters_after"] < parameters["parameters_before"]
    assert changed["recover"]["parameters_in_training"] < parameters["parameters_after"]  # the rest is packed
    assert changed["reload"]["round_trip"]["largest"] == 0
    assert not (unbroken / "whole").exists()
    result = unbroken / "result"
    assert json.loads((result / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    base = AutoModelForCausalLM.from_pretrained(result / "model")
    assert read_record(base) is None
    assert base.model.layers[3].mlp.up_proj.weight.shape == (base.config.intermediate_size, base.config.hidden_size)
    assert base.config.vocab_size < 8192
    again = PeftModel.from_pretrained(base, str(result / "adapter"))
    ids = torch.tensor([[5, 9, 12, 30]])
    with torch.no_grad():
        found, expected = again.eval()(ids).logits, load_bundle(result).model.eval()(ids).logits
    assert torch.equal(found, expected)
    assert any(tensor.any() for name, tensor in weights(unbroken).items() if "lora_B" in name)


@pytest.mark.parametrize(("step", "name"), [(recover.Recover, "recover"), (save.Save, "save")])
def test_a_run_that_was_broken_off_ends_the_same(
    step: Any, name: str, unbroken: Path, rows_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(step, "apply", _broken)
        with pytest.raises(RuntimeError, match="the plug is pulled"):
            engine.run(recipe(rows_path), out=folder)
    assert json.loads((folder / "state.json").read_text())[-1]["step"] != name
    engine.resume(folder)
    assert all(torch.equal(tensor, weights(folder)[key]) for key, tensor in weights(unbroken).items())


def _broken(*_: Any) -> None:
    raise RuntimeError("the plug is pulled")


def test_a_published_copy_is_trained_on_and_recovered_onto_a_named_model(rows_path: str, tmp_path: Path) -> None:
    publisher = [
        {"small_copy": {"method": "unst", "compensate": False}},
        {"align": {"corpus": "data", "steps": 1, "batch_size": 4}},
    ]
    engine.run(recipe(rows_path, steps=publisher), out=tmp_path / "copy")
    copied = str(tmp_path / "copy" / "result" / "model")
    steps = [{"loram": {"rank": 4}}, {"train": {"steps": 1, "max_length": 48}}, {"recover": {"base": "full"}}, "merge"]
    user = recipe(rows_path, model=copied, models={"full": "llama-7m"}, steps=steps)
    engine.run(user, out=tmp_path / "run")
    merged = load_bundle(tmp_path / "run" / "result").model
    base = AutoModelForCausalLM.from_pretrained(resolve("llama-7m").path)
    moved = [
        name for name, parameter in merged.named_parameters() if not torch.equal(parameter, base.get_parameter(name))
    ]
    assert moved
    assert all("proj" in name for name in moved)
    with pytest.raises(InputError, match="must be the model that the copy was made of"):
        engine.run({**user, "steps": [*steps[:2], "recover"]}, out=tmp_path / "wrong")


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        (["loram"], "loram needs that a small copy stands for the model"),
        (["small_copy", "small_copy"], "small_copy cannot follow"),
        (["small_copy", "loram", "align"], "align cannot follow: an adapter is attached"),
        (["small_copy", "rounding", "align"], "align needs that weights are floating point"),
        (["small_copy", "loram", "merge", "recover"], "recover needs that an adapter is attached"),
        (["lora", "recover"], "recover needs that a small copy stands for the model"),
    ],
)
def test_wrong_orders_are_refused_before_anything_loads(steps: list[str], reason: str, rows_path: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        read_recipe(recipe(rows_path, steps=steps))


def test_another_adapter_cannot_be_recovered(rows_path: str, tmp_path: Path) -> None:
    steps = [{"small_copy": {"method": "rand"}}, {"lora": {"rank": 2}}, "recover"]
    with pytest.raises(InputError, match="must follow an adapter that can be recovered, got lora"):
        engine.run(recipe(rows_path, steps=steps), out=tmp_path / "run")
