"""Save, merge and quantise are caught when they lie: a merge of nothing, another chat template, a lost weight."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.core.bundle import Bundle
from gossamer.core.errors import GossamerError
from gossamer.core.options import Config
from gossamer.core.recipe import read_recipe
from gossamer.hub.nursery import load_nursery
from gossamer.parts.roundtrip import difference, probe, prove_changed, prove_same
from gossamer.pipeline.job import Job, Silent
from gossamer.pipeline.steps.merge import Merge, MergeConfig
from gossamer.pipeline.steps.reload import Reload, ReloadConfig
from gossamer.pipeline.steps.save import Save

TEXTS = ["The function returns a list.", "def f(x):\n    return x\n"]


@pytest.fixture
def bundle():
    return Bundle(*load_nursery("llama-7m"))


@pytest.fixture
def job(tmp_path):
    return Job(read_recipe({"model": "llama-7m", "steps": []}), tmp_path, Silent(), tmp_path / "work", base="llama-7m")


def adapted(bundle, *, trained=True):
    from gossamer.pipeline.single import system

    mos = system("mos", rank=4)
    bundle.model = mos.attach(bundle.model)
    bundle.adapters.append(mos)
    bundle.lineage.append({"step": "train"})
    if trained:
        with torch.no_grad():
            for parameter in bundle.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
    return bundle


def merge(bundle, job):
    return Merge(MergeConfig()).apply(bundle, job)


def test_an_honest_merge_passes(bundle, job):
    step = Merge(MergeConfig())
    merged = step.apply(adapted(bundle), job)
    assert isinstance(merged.model, LlamaForCausalLM)
    assert step.notes["round_trip"]["largest"] < 1e-3


def test_a_merge_that_does_nothing_is_caught(bundle, job, monkeypatch):
    adapted(bundle)
    monkeypatch.setattr(type(bundle.adapters[-1]), "merge", lambda self, model: model.unload())
    with pytest.raises(GossamerError, match="change no log-probability"):
        merge(bundle, job)


def test_a_merge_of_an_adapter_that_learned_nothing_is_caught(bundle, job):
    with pytest.raises(GossamerError, match="merge: must change the model's output"):
        merge(adapted(bundle, trained=False), job)


def test_another_chat_template_is_caught(bundle, job):
    bundle.processor.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
    Save(Config()).apply(bundle, job)
    Reload(ReloadConfig()).apply(bundle, job)
    bundle.processor.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(GossamerError, match="chat template: must render as before"):
        Reload(ReloadConfig()).apply(bundle, job)


def test_a_dropped_weight_is_caught(bundle, job):
    from safetensors.torch import load_file, save_file

    Save(Config()).apply(bundle, job)
    path = job.folder / "result" / "model" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(GossamerError):
        Reload(ReloadConfig()).apply(bundle, job)


def test_a_zeroed_weight_is_caught(bundle, job):
    Save(Config()).apply(bundle, job)
    with torch.no_grad():
        bundle.model.model.layers[3].mlp.up_proj.weight.zero_()
    with pytest.raises(GossamerError, match="change no log-probability"):
        Reload(ReloadConfig()).apply(bundle, job)


def test_weights_that_come_and_go_are_named(bundle):
    before = probe(bundle.model, bundle.processor, TEXTS)
    config = LlamaConfig(**{**bundle.model.config.to_dict(), "num_hidden_layers": 7})
    after = probe(LlamaForCausalLM(config).to(bundle.model.dtype), bundle.processor, TEXTS, like=before)
    with pytest.raises(GossamerError, match=r"weights: must be the ones that were there, got lost \['model\.layers\.7"):
        prove_same(before, after, what="save", largest=1e9)


def test_a_quantisation_that_breaks_the_model_is_caught(bundle, job):
    from gossamer.core.recipe import StepCall
    from gossamer.core.registry import find
    from gossamer.pipeline.system_steps import take_system

    call = StepCall("rounding", {"bits": 2, "group": -1}, find("rounding"))
    with pytest.raises(GossamerError, match="rounding: must leave a model within 2 nats"):
        take_system(call, bundle, job, seed=0)


def test_the_same_model_has_no_difference(bundle):
    before = probe(bundle.model, bundle.processor, TEXTS)
    again = probe(bundle.model, bundle.processor, TEXTS, like=before)
    assert difference(before, again) == type(difference(before, again))(0.0, 0.0, 1.0)
    with pytest.raises(GossamerError, match="must change"):
        prove_changed(before, again, what="x")
