from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.acceleration.dyvte import DyVTE
from gossamer.acceleration.dyvte.gates import Gates, gate_input
from gossamer.acceleration.dyvte.removal import Pass, passes
from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.parts.token_layouts import whole
from gossamer.parts.token_selection import Decoder, read_call
from gossamer.parts.visual_rows import visual_batch
from gossamer.testing.acceleration import PATCHES, picture, processor, prompts, rows, single
from gossamer.testing.bench import IMAGE_TOKEN, Bench

LAYERS = 8


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(Bench("llava").model(layers=LAYERS), processor(Bench("llava")))


@pytest.fixture(scope="module")
def fitted(bundle: Bundle) -> DyVTE:
    system = DyVTE(steps=40, batch_size=4, layers_per_batch=3, rate=5e-3, agree=0.0, loss_ratio=1.2)
    system.fit(bundle, rows())
    return system


def masked(model: Any, batch: dict[str, Tensor], done: int) -> Any:
    """The plain model where image tokens stay, but are no keys from layer ``done`` on."""
    image = batch["input_ids"] == IMAGE_TOKEN
    real = batch["attention_mask"].bool()
    width = image.shape[1]
    allowed = torch.ones(width, width).tril().bool() & (real & ~image)[:, None]
    allowed = (allowed | torch.eye(width).bool())[:, None]

    def before(layer: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "attention_mask": allowed}

    hooks = [
        layer.register_forward_pre_hook(before, with_kwargs=True) for layer in model.model.language_model.layers[done:]
    ]
    out = model(**batch, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("done", [1, 4, 7])
def test_generation_after_an_exit_is_generation_with_a_masked_image(bundle: Bundle, done: int) -> None:
    model, batch = bundle.model, prompts()
    system = DyVTE(fixed_exit=done)
    system.accelerate(model)
    made = model.generate(**batch, max_new_tokens=6, do_sample=False, output_logits=True,
                          return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
    system.release(model)
    mask = F.pad(batch["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        out = masked(model, {**batch, "input_ids": made.sequences, "attention_mask": mask}, done)
    width = batch["input_ids"].shape[1]
    torch.testing.assert_close(torch.stack(made.logits, 1), out.logits[:, width - 1 : -1], atol=1e-4, rtol=1e-4)
    assert [layer.keys.shape[-2] for layer in made.past_key_values.layers[done - 1 : done + 1]] == [18, 14]


def test_labels_are_those_of_masked_keys_at_the_same_states(bundle: Bundle) -> None:
    model, batch = bundle.model, visual_batch(rows(), bundle.processor)
    passed = Pass(Decoder(model), batch)
    labels = batch.pop("labels")
    with torch.no_grad():
        full = model(**batch).logits
    seen = set()
    for done in range(1, LAYERS):
        with torch.no_grad():
            less = masked(model, batch, done).logits
        for row in range(4):
            said = (labels[row] != -100).nonzero()[:, 0]
            answer, a, b = labels[row, said], full[row, said - 1], less[row, said - 1]
            agreement = (a.argmax(-1) == b.argmax(-1)).float().mean()
            with_image, without = F.cross_entropy(a, answer), F.cross_entropy(b, answer)
            expected = bool(agreement > 0.5) and bool(without < 1.1 * with_image)
            assert bool(passed.labels(done, 0.5, 1.1)[row]) == expected
            torch.testing.assert_close(passed.without(done).loss[row], without, atol=1e-4, rtol=1e-4)
            seen.add(expected)
    assert seen == {True, False}
    assert passed.without(LAYERS) is passed.full


def test_gates_are_the_papers_in_values_and_gradients(bundle: Bundle) -> None:
    model, batch = bundle.model, visual_batch(rows(), bundle.processor)
    run = read_call(model, dict(batch))
    labels = batch.pop("labels")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[3]
    z = gate_input(hidden, whole(run.real), run)
    for row in range(4):
        ids = batch["input_ids"][row]
        prompt = [t for t in range(len(ids)) if batch["attention_mask"][row, t] and labels[row, t] == -100]
        end = max(t for t in prompt if ids[t] == IMAGE_TOKEN)
        text = [t for t in prompt if t > end and t != prompt[-1]]
        expected = torch.cat([hidden[row, text].mean(0), hidden[row, prompt[-1]]])
        torch.testing.assert_close(z[row], expected, atol=1e-5, rtol=1e-4)
    gates = Gates(LAYERS, 64, 32, torch.Generator().manual_seed(0))
    one, two = (w[2].detach().clone().requires_grad_() for w in (gates.first, gates.second))
    truth = torch.tensor([0, 1, 1, 0])
    naive = (0.5 * (z @ one.T) * (1 + torch.erf(z @ one.T / 2**0.5))) @ two.T
    torch.testing.assert_close(gates(3, z), naive, atol=1e-4, rtol=1e-4)
    F.cross_entropy(gates(3, z), truth).backward()
    (naive.logsumexp(1) - naive[torch.arange(4), truth]).mean().backward()
    assert gates.first.grad is not None
    assert one.grad is not None
    torch.testing.assert_close(gates.first.grad[2], one.grad, atol=1e-5, rtol=1e-3)
    assert not gates.first.grad[[0, 1, 3, 4, 5, 6]].any()


def test_gate_input_without_text_behind_the_image(bundle: Bundle) -> None:
    ids = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * PATCHES]])
    hidden = torch.arange(7.0)[None, :, None]
    run = read_call(bundle.model, {"input_ids": ids})
    assert gate_input(hidden, whole(run.real), run).tolist() == [[1.0, 6.0]]
    alone = torch.tensor([[*[IMAGE_TOKEN] * PATCHES, 5]])
    run = read_call(bundle.model, {"input_ids": alone})
    assert gate_input(hidden[:, :5], whole(run.real), run).tolist() == [[4.0, 4.0]]


def test_an_image_at_the_very_end_keeps_the_token_that_answers(bundle: Bundle) -> None:
    model = bundle.model
    ids = torch.tensor([[5, 6, 7, *[IMAGE_TOKEN] * PATCHES]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": prompts()["pixel_values"][:1]}
    system = DyVTE(fixed_exit=2)
    system.accelerate(model)
    assert model(**batch).logits.isfinite().all()
    assert system.report()["visual"][0] == [4, 4, 1, 1, 1, 1, 1, 1]
    system.release(model)


def test_the_first_gate_that_says_exit_wins_row_by_row(bundle: Bundle, fitted: DyVTE) -> None:
    model, batch = bundle.model, prompts()
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    run = read_call(model, dict(batch))
    expected = []
    for row in range(2):
        said = [done for done in range(1, LAYERS) if fitted._exits(done, hidden[done], whole(run.real), run)[row]]
        expected.append(said[0] if said else LAYERS)
    fitted.accelerate(model)
    model(**batch)
    report = fitted.report()
    fitted.release(model)
    assert report["exits"] == [*expected, 0]
    assert report["gate_operations"] == sum(min(e, LAYERS - 1) for e in expected) * (64 * 128 + 2 * 64)
    assert len(set(expected)) == 2 or expected[0] < LAYERS


def test_a_higher_threshold_never_exits_earlier(bundle: Bundle, fitted: DyVTE) -> None:
    found = []
    for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
        system = DyVTE(threshold=threshold)
        system.state, system.fingerprint = fitted.state, fitted.fingerprint
        system.ready(bundle)
        system.accelerate(bundle.model)
        bundle.model(**prompts())
        found.append(system.report()["exits"][:2])
        system.release(bundle.model)
    assert found[0] == [1, 1]
    assert found[-1] == [LAYERS, LAYERS]
    assert all(a <= b for one, two in itertools.pairwise(found) for a, b in zip(one, two, strict=True))


def test_gates_learn_their_labels(bundle: Bundle, fitted: DyVTE) -> None:
    counts = fitted.confusion(bundle, rows())
    assert counts.sum((1, 2)).tolist() == [4] * (LAYERS - 1)
    right = counts.diagonal(dim1=1, dim2=2).sum()
    assert int(right) > 0.8 * int(counts.sum())


def test_balancing_weighs_the_rare_class(bundle: Bundle) -> None:
    """Three of four rows may exit: an unbalanced gate leans further towards exit than a balanced one."""
    one = next(iter(passes(Decoder(bundle.model), rows(), bundle.processor, 4)))
    ratios = (one.without(7).loss / one.full.loss).sort().values
    limit = float(ratios[2:].mean())
    assert one.labels(7, 0.0, limit).sum() == 3
    found = []
    for balance in (False, True):
        system = DyVTE(steps=6, batch_size=4, agree=0.0, loss_ratio=limit, min_layer=7, balance_classes=balance)
        system.fit(bundle, rows())
        assert system._gates is not None
        with torch.no_grad():
            logits = system._gates(7, gate_input(one.hidden[7], one.layout, one.run))
        found.append(float(logits.softmax(-1)[:, 1].mean()))
    assert found[0] > found[1]


def test_analysis_is_attention_and_removal(bundle: Bundle) -> None:
    model = bundle.model
    found = DyVTE.analyse(bundle, rows(), batch_size=4)
    assert found["agreement"][-1] == 1.0
    assert len(found["correct"]) == LAYERS + 1
    batch = visual_batch(rows(), bundle.processor)
    labels = batch.pop("labels")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**batch, output_attentions=True).attentions[5].mean(1)
    model.set_attn_implementation("sdpa")
    image = batch["input_ids"] == IMAGE_TOKEN
    last = [int(((labels[row] == -100) & batch["attention_mask"][row].bool()).nonzero().max()) for row in range(4)]
    mass = torch.stack([weights[row, last[row]][image[row]].sum() for row in range(4)]).mean()
    assert found["last_to_image"][5] == pytest.approx(float(mass), abs=1e-4)


def test_a_saved_state_exits_alike_and_refuses_another_model(bundle: Bundle, fitted: DyVTE, tmp_path: Path) -> None:
    fitted.save(tmp_path / "gates")
    loaded = DyVTE.load(tmp_path / "gates", bundle)
    found = []
    for system in (fitted, loaded):
        system.accelerate(bundle.model)
        found.append(bundle.model(**prompts()).logits)
        system.release(bundle.model)
    assert torch.equal(*found)
    other = Bundle(Bench("llava").model(seed=1, layers=LAYERS), bundle.processor)
    with pytest.raises(InputError, match="must fit this model"):
        DyVTE.load(tmp_path / "gates", other)
    with pytest.raises(InputError, match="the model it was fitted on"):
        fitted.accelerate(other.model)


def test_fitting_leaves_model_and_random_state_alone(bundle: Bundle) -> None:
    model = bundle.model
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    model.model.language_model.train()
    DyVTE(steps=2, batch_size=2).fit(bundle, rows())
    assert model.model.language_model.training
    assert not model.training
    model.eval()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_rows_become_batches(bundle: Bundle) -> None:
    batch = visual_batch([rows()[1], {"image": None, "prompt": "one two", "answer": " three"}], bundle.processor)
    assert batch["pixel_values"].shape == (1, 3, 16, 16)
    assert batch["labels"].shape == batch["input_ids"].shape
    assert batch["attention_mask"][1, 0] == 0
    tokenizer = bundle.processor.tokenizer
    for row, answer in enumerate((" two dogs", " three")):
        said = batch["labels"][row][batch["labels"][row] != -100].tolist()
        assert tokenizer.decode(said) == answer + tokenizer.eos_token
        assert batch["input_ids"][row, -len(said) :].tolist() == said
    assert (batch["input_ids"][0] == IMAGE_TOKEN).sum() == PATCHES
    alone = single(batch, 1)
    assert "pixel_values" not in alone


def test_what_cannot_work_is_refused(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="be fitted first"):
        DyVTE().accelerate(bundle.model)
    for options in ({"fixed_exit": LAYERS}, {"fixed_exit": 2, "min_layer": LAYERS}):
        with pytest.raises(OptionError, match="below the number of layers, 8"):
            DyVTE(**options).accelerate(bundle.model)
    with pytest.raises(InputError, match="rows with an image"):
        DyVTE().fit(bundle, [{"image": None, "prompt": "a", "answer": "b"}])
    with pytest.raises(InputError, match="row 0: must have a question and an answer"):
        DyVTE(steps=1).fit(bundle, [{"image": picture(0), "question": "a"}])
    system = DyVTE(fixed_exit=1)
    system.accelerate(bundle.model)
    with pytest.raises(InputError, match="the plain model"):
        DyVTE(steps=1).fit(bundle, rows())
    system.release(bundle.model)
