"""ToxicDetector against the paper's formulas written out, Algorithm 1 with a scripted LLM, protection, refusals."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.core.bundle import Bundle
from gossamer.core.errors import InputError, OptionError
from gossamer.decoding.prompt_lookup import PromptLookup
from gossamer.guards.toxicdetector import ToxicDetector
from gossamer.guards.toxicdetector.classifier import Detector, threshold_at, train
from gossamer.guards.toxicdetector.concepts import AUGMENT, CONCEPTS, augment, distinct, trigrams
from gossamer.parts.hidden_states import last_token_states

NICE = ["bake", "bread", "plant", "tree", "paint", "wall", "how", "the", "a"]
NASTY = ["steal", "spy", "harm"]
WORDS = [*NICE, *NASTY, *sorted({word for texts in CONCEPTS.values() for text in texts for word in text.split()})]


def tokenizer() -> Any:
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys(["<pad>", "<end>", "<unk>", *WORDS, "no", "thanks"]))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def rows(count: int = 24, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for number in range(count):
        words = draw.sample(NICE, 3)
        toxic = number % 2 == 1
        if toxic:
            words.append(draw.choice(NASTY))
        scenario = ("illegal_acts", "violence")[number // 2 % 2]
        row = {"text": " ".join(words), "label": "toxic" if toxic else "benign"}
        out.append(row | ({"scenario": scenario} if toxic else {}))
    return out


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle(llama(), tokenizer())


@pytest.fixture(scope="module")
def fitted(bundle: Bundle) -> ToxicDetector:
    guard = ToxicDetector(epochs=20)
    guard.fit(bundle, rows())
    return guard


def block_inputs(model: Any, ids: list[int]) -> torch.Tensor:
    """[L, d] by transformers' own hidden_states[0 .. L-1]."""
    with torch.no_grad():
        out = model.eval()(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return torch.stack([h[0, -1] for h in out.hidden_states[:-1]])


@pytest.mark.parametrize("make", [llama, lambda: GPT2LMHeadModel(GPT2Config(
    vocab_size=200, n_embd=16, n_layer=3, n_head=2, n_positions=32))])  # fmt: skip
def test_states_are_the_block_inputs_at_the_last_real_token(make: Any) -> None:
    model, texts = make(), [[5, 6, 7, 8], [9], [4, 5]]
    found = last_token_states(model.eval(), texts, [0, 1, 2], batch_size=2)
    for ids, states in zip(texts, found, strict=True):
        torch.testing.assert_close(states, block_inputs(model, ids), atol=1e-5, rtol=1e-4)


def test_the_detector_is_the_papers_formula_in_values_and_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    users, concepts = (torch.randn(n, 3, 4, generator=generator) for n in (14, 2))
    detector = Detector("product", concepts, 24)
    detector.standardise(users)

    features = torch.stack([torch.cat([(u * t).flatten() for t in concepts]) for u in users])
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in detector.mlp.named_parameters()}
    hidden = F.relu(standard @ weights["0.weight"].T + weights["0.bias"])
    for linear, norm in ((2, 3), (5, 6), (8, 9)):
        hidden = hidden @ weights[f"{linear}.weight"].T + weights[f"{linear}.bias"]
        hidden = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        hidden = F.relu(hidden * weights[f"{norm}.weight"] + weights[f"{norm}.bias"])
    logits = (hidden @ weights["11.weight"].T + weights["11.bias"])[:, 0]
    torch.testing.assert_close(detector(users), logits, atol=1e-4, rtol=1e-4)
    assert [layer.out_features for layer in detector.mlp if hasattr(layer, "out_features")] == [200, 100, 50, 20, 1]
    assert all(not layer.bias.any() for layer in detector.mlp if isinstance(layer, torch.nn.Linear))

    logits.square().sum().backward()
    detector(users).square().sum().backward()
    for name, parameter in detector.mlp.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, atol=1e-2, rtol=1e-3)


def test_standardised_products_are_standardised_states_with_signs() -> None:
    generator = torch.Generator().manual_seed(0)
    users, concepts = torch.randn(9, 2, 5, generator=generator), torch.randn(1, 2, 5, generator=generator)
    detector = Detector("product", concepts, 10)
    detector.standardise(users)
    features = (detector.feature(users, concepts) - detector.mean) / detector.std
    flat = users.flatten(1)
    torch.testing.assert_close(features, concepts.sign().flatten() * (flat - flat.mean(0)) / flat.std(0, correction=0))


def test_inner_and_last_features() -> None:
    users, concepts = torch.randn(3, 2, 5), torch.randn(4, 2, 5)
    expected = torch.stack([torch.stack([(u * t).sum(1) for t in concepts]).max(0).values for u in users])
    torch.testing.assert_close(Detector("inner", concepts, 2).feature(users, concepts), expected)
    torch.testing.assert_close(Detector("last", concepts, 10).feature(users, concepts), users.reshape(3, 10))


def test_a_feature_that_never_varies_stays_finite_and_large_norms_keep_their_digits() -> None:
    users = torch.randn(10, 1, 4) * torch.tensor([1.0, 1e4, 1e-3, 0.0]) + torch.tensor([0.0, 0.0, 0.0, 3.0])
    detector = Detector("last", users[:0], 4)
    detector.standardise(users)
    standard = (users.flatten(1) - detector.mean) / detector.std
    assert torch.isfinite(standard).all()
    torch.testing.assert_close(standard[:, :3].std(0, correction=0), torch.ones(3), atol=1e-3, rtol=1e-3)


def test_classes_weigh_the_same_however_many_rows_they_have() -> None:
    torch.manual_seed(0)
    users, classes = torch.zeros(50, 1, 2), torch.tensor([1.0] * 5 + [0.0] * 45)
    detector = Detector("last", users[:0], 2)
    train(detector, users, classes, epochs=60, patience=None)
    # nothing tells the rows apart, so the weighted optimum is even odds
    assert float(detector.scores(users[:1])) == pytest.approx(0.5, abs=0.15)


def test_early_stopping_keeps_the_best_epoch_and_holds_rows_out() -> None:
    torch.manual_seed(0)
    users, classes = torch.randn(40, 1, 3), (torch.rand(40) > 0.5).float()
    used = train(Detector("last", users[:0], 3), users, classes, epochs=50, patience=2)
    assert int((~used).sum()) == sum(max(1, int(0.2 * int((classes == c).sum()))) for c in (0, 1))


def test_threshold_for_a_false_positive_rate() -> None:
    benign = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.3])
    for rate, flagged in ((0.0, 0), (0.2, 1), (0.5, 2)):
        cut = threshold_at(benign, rate)
        assert int((benign.double() >= cut).sum()) == flagged


class Script:
    """An LLM that answers by the concept it is asked about."""

    def __init__(self, answers: dict[str, list[str]]) -> None:
        self.answers, self.asked = answers, list[str]()

    def __call__(self, prompt: str) -> str:
        concept = prompt.rsplit(": ", 1)[-1]
        self.asked.append(concept)
        return "\n".join(f"{n}. {line}" for n, line in enumerate(self.answers.get(concept, []), 1))


def planar(texts: Any) -> torch.Tensor:
    """Sentence vectors on the circle: the number in the text is its angle in degrees."""
    angles = torch.tensor([float(text.split()[-1]) for text in texts]) * torch.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_algorithm_1_compares_with_everything_kept_and_stops_after_a_barren_round() -> None:
    # below 0.8 means more than 36.9 degrees apart
    writer = Script(
        {
            "c 0": ["c 20", "c 40", "c 50"],  # 20 is near 0, 50 is near 40
            "c 100": ["c 45", "c 140"],  # 45 is far from its parent 100 but near 40, kept from another parent
            "c 140": ["c 180", "c 150"],
        }
    )
    kept = augment(["c 0", "c 100"], writer, planar, 0.8, limit=99)
    assert kept == ["c 0", "c 100", "c 40", "c 140", "c 180"]
    assert writer.asked == ["c 0", "c 100", *["c 0", "c 100", "c 40", "c 140"], *kept]
    assert augment(["c 0", "c 100"], writer, planar, 0.8, limit=3) == ["c 0", "c 100", "c 40"]
    assert augment([], writer, planar, 0.8, limit=3) == []


def test_shipped_lists_pass_the_filter_and_trigrams_tell_copies() -> None:
    for texts in CONCEPTS.values():
        assert len(distinct(texts, trigrams, 0.8, 9)) == len(texts) == 5
    assert distinct(["asks for a key", "Asks for a key", "wants bread"], trigrams, 0.8, 9) == [
        "asks for a key",
        "wants bread",
    ]


def test_concepts_come_from_rows_then_the_llm_then_the_lists_then_the_name(bundle: Bundle) -> None:
    data = [*rows(), {"text": "wants to harm the tree", "label": "concept", "scenario": "violence"}]
    guard = ToxicDetector(epochs=1, concepts=2)
    found = guard.fit(bundle, data).values["concepts"]
    assert [c["text"] for c in found if c["scenario"] == "violence"] == ["wants to harm the tree"]
    assert [c["text"] for c in found if c["scenario"] == "illegal_acts"] == list(CONCEPTS["illegal_acts"][:2])

    def writer(prompt: str) -> str:
        return "asks how to steal bread" if prompt.startswith(AUGMENT[:12]) else "wants to spy on a wall"

    guard = ToxicDetector(epochs=1, concepts=2, writer="llm", companions={"llm": writer})
    texts = [c["text"] for c in guard.fit(bundle, rows()).values["concepts"]]
    assert texts == ["wants to spy on a wall", "asks how to steal bread"] * 2
    strange = [{**row, "scenario": "odd_things"} for row in rows()]
    with pytest.warns(UserWarning, match="its name stands for it"):
        assert ToxicDetector(epochs=1).fit(bundle, strange).values["concepts"][0]["text"] == "odd things"


def test_it_learns_and_a_saved_state_judges_alike_and_refuses_another_model(
    fitted: ToxicDetector, bundle: Bundle, tmp_path: Path
) -> None:
    texts = [row["text"] for row in rows(20, seed=5)]
    truth = [row["label"] == "toxic" for row in rows(20, seed=5)]
    verdicts = [fitted.judge(text) for text in texts]
    assert sum(v.flagged == t for v, t in zip(verdicts, truth, strict=True)) >= 16
    torch.testing.assert_close(
        fitted.scores(texts)[0], torch.tensor([v.score for v in verdicts]).double(), atol=1e-4, rtol=1e-3
    )
    fitted.save(tmp_path / "guard")
    loaded = ToxicDetector.load(tmp_path / "guard", bundle)
    assert [loaded.judge(text) for text in texts] == verdicts
    with pytest.raises(InputError, match="must fit this model"):
        ToxicDetector.load(tmp_path / "guard", Bundle(llama(9), bundle.processor))


def test_per_scenario_scores_and_their_maximum(bundle: Bundle) -> None:
    guard = ToxicDetector(epochs=4, per_scenario=True, target_fpr=0.3)
    guard.fit(bundle, rows(40))
    verdict = guard.judge("bake the steal")
    assert set(verdict.scores) == {"illegal_acts", "violence"}
    assert verdict.score == max(verdict.scores.values())
    assert guard.state is not None
    assert guard.threshold == guard.state.values["threshold"]


def test_fitting_is_seeded_and_leaves_random_state_and_model_alone(bundle: Bundle) -> None:
    before, weights = torch.get_rng_state(), {k: v.clone() for k, v in bundle.model.state_dict().items()}
    bundle.model.train()
    states = [ToxicDetector(epochs=2, seed=s).fit(bundle, rows()).tensors["0.mlp.0.weight"] for s in (1, 1, 2)]
    assert bundle.model.training
    bundle.model.eval()
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in bundle.model.state_dict().items())


def padded(tok: Any, texts: list[str]) -> Any:
    return tok(texts, padding=True, padding_side="left", return_tensors="pt", return_token_type_ids=False)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_protected_model_refuses_flagged_rows_in_the_same_prefill(
    fitted: ToxicDetector, bundle: Bundle, beams: int
) -> None:
    model, tok = bundle.model, bundle.processor
    texts = [row["text"] for row in rows(20, seed=5)]
    flagged = next(text for text in texts if len(text.split()) == 4 and fitted.judge(text).flagged)
    clear = next(text for text in texts if len(text.split()) == 3 and not fitted.judge(text).flagged)
    inputs = padded(tok, [flagged, clear])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    plain = model.generate(**inputs, **options)
    refusal = tok("no thanks")["input_ids"]
    widths: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, named: widths.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    guarded = fitted.protect(model, refusal)
    try:
        out = guarded.generate(**inputs, **options)
        assert [v.flagged for v in model.gossamer_verdicts[::beams]] == [True, False]
        with pytest.raises(InputError, match="padded on the left"):
            guarded.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(1))
        with pytest.raises(InputError, match="one plain prefill"):
            PromptLookup().generate(model, tok, [clear], max_new_tokens=2)
    finally:
        fitted.release(model)
        handle.remove()
    width = inputs["input_ids"].shape[1]
    assert sum(w > 1 for w in widths) == 1
    assert out[0, width : width + 3].tolist() == [*refusal, 1]
    assert torch.equal(out[1, : plain.shape[1]], plain[1, : out.shape[1]])
    after = model.generate(**inputs, **options)
    assert torch.equal(after, plain)


def test_what_cannot_be_used_is_refused(bundle: Bundle, fitted: ToxicDetector) -> None:
    with pytest.raises(InputError, match="toxic and benign"):
        ToxicDetector().fit(bundle, [row for row in rows() if row["label"] == "toxic"])
    with pytest.raises(InputError, match="row 1, label"):
        ToxicDetector().fit(bundle, [rows()[0], {"text": "a", "label": "bad"}])
    with pytest.raises(InputError, match="row 0, text"):
        ToxicDetector().fit(bundle, [{"text": " ", "label": "toxic"}])
    with pytest.raises(InputError, match="a prompt with text"):
        fitted.judge("  ")
    with pytest.raises(InputError, match="be fitted first"):
        ToxicDetector().judge("bake")
    with pytest.raises(OptionError, match="numbers from -3 to 2"):
        ToxicDetector(layers="0,7").fit(bundle, rows())
    with pytest.raises(InputError, match="2 rows of each class"):
        ToxicDetector(patience=1).fit(bundle, rows()[:3])
    with pytest.raises(InputError, match="model that it was fitted on"):
        fitted.protect(llama(9))
