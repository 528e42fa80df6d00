"""DPO against a naive loop, the closed-form optimum, and TRL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gossamer.core.errors import InputError
from gossamer.objectives.dpo import DPO, DPOConfig, pair_loss
from gossamer.optimizers.adamw import AdamW
from gossamer.parts.training import TrainSettings, train

ROWS = [
    {"prompt": "ab", "chosen": "cdefg", "rejected": "xy"},
    {"prompt": "hello ", "chosen": "you", "rejected": "them all"},
    {"prompt": "a", "chosen": "b", "rejected": "cccc"},
]


def logprob(model: Any, ids: list[int], labels: list[int]) -> torch.Tensor:
    rows = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum((rows[t - 1, ids[t]] for t in range(1, len(ids)) if labels[t] != -100), torch.tensor(0.0))


def naive(model: Any, reference: Any, pairs: list[Any], beta: float, smoothing: float = 0.0) -> torch.Tensor:
    losses = []
    for pair in pairs:
        ratios = []
        for one in (pair.chosen, pair.rejected):
            with torch.no_grad():
                base = logprob(reference, one.input_ids, one.labels)
            ratios.append(logprob(model, one.input_ids, one.labels) - base)
        u = beta * (ratios[0] - ratios[1])
        losses.append(-(1 - smoothing) * torch.sigmoid(u).log() - smoothing * torch.sigmoid(-u).log())
    return torch.stack(losses).mean()


def batch_of(objective: DPO, model: Any, tokenizer: Any, rows: list[Any] | None = None) -> tuple[list[Any], Any]:
    pairs = objective.examples(rows or ROWS, tokenizer, max_length=32)
    return pairs, objective.collate(objective.prepare(model, pairs, tokenizer), tokenizer)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_value_and_gradients_are_those_of_the_naive_loop(tokenizer: Any, make_model: Any, smoothing: float) -> None:
    model, other, reference = make_model(0), make_model(0), make_model(1)
    objective = DPO(
        beta=0.3, label_smoothing=smoothing, reference="model", reference_model="base", companions={"base": reference}
    )
    pairs, batch = batch_of(objective, model, tokenizer)
    result = objective.loss(model, batch)
    expected = naive(other, reference, pairs, 0.3, smoothing)
    result.value.backward()
    expected.backward()
    assert result.value.item() == pytest.approx(expected.item(), abs=1e-5)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5)
    assert result.parts["margin"] == pytest.approx(result.parts["reward_chosen"] - result.parts["reward_rejected"])
    assert result.parts["length_chosen"] == pytest.approx((6 + 4 + 2) / 3)  # bytes and the end of the text


def test_the_first_loss_is_ln_2_exactly(tokenizer: Any, make_model: Any) -> None:
    model = get_peft_model(make_model(attention_dropout=0.3), LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    model.train()
    objective = DPO(beta=0.5)
    _, batch = batch_of(objective, model, tokenizer)
    result = objective.loss(model, batch)
    assert float(result.value) == pytest.approx(math.log(2), abs=1e-7)
    assert result.parts["margin"] == 0.0, "policy and reference both ran without dropout"
    assert model.training
    assert all(m.training for m in model.modules())
    result.value.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


def test_precompute_ref_and_live_references_agree(tokenizer: Any, make_model: Any) -> None:
    model, reference = make_model(0), make_model(1)
    options = {"reference": "model", "reference_model": "r", "companions": {"r": reference}}
    live, once = (DPO(precompute_ref=flag, **options) for flag in (False, True))
    _, one = batch_of(live, model, tokenizer)
    _, two = batch_of(once, model, tokenizer)
    assert "reference_logprobs" in two
    assert "reference_logprobs" not in one
    assert float(live.loss(model, one).value) == pytest.approx(float(once.loss(model, two).value), abs=1e-5)


def test_padding_and_order_do_not_matter(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    objective = DPO(reference="none", beta=0.2)
    _, batch = batch_of(objective, model, tokenizer)
    _, turned = batch_of(objective, model, tokenizer, ROWS[::-1])
    singles = [batch_of(objective, model, tokenizer, [row])[1] for row in ROWS]
    value = float(objective.loss(model, batch).value)
    assert float(objective.loss(model, turned).value) == pytest.approx(value, abs=1e-5)
    parts = [float(objective.loss(model, {**one, "normaliser": 3.0}).value) for one in singles]
    assert sum(parts) == pytest.approx(value, abs=1e-5)
    narrowed = objective.narrow(batch, 0.67)
    assert narrowed["input_ids"].shape[0] == 4
    assert torch.equal(narrowed["input_ids"][2], batch["input_ids"][3])


def test_weights_norms_and_the_sft_term(tokenizer: Any, make_model: Any) -> None:
    model = make_model()
    weighted = [{**ROWS[0], "weight": 3.0}, ROWS[1]]
    plain, normed, tied = (
        DPO(reference="none"),
        DPO(reference="none", length_norm=True),
        DPO(reference="none", sft_weight=1.0),
    )
    each = [float(plain.loss(model, batch_of(plain, model, tokenizer, [row])[1]).value) for row in ROWS[:2]]
    both = plain.loss(model, batch_of(plain, model, tokenizer, weighted)[1])
    assert float(both.value) == pytest.approx((3 * each[0] + each[1]) / 4, abs=1e-5)
    pairs, batch = batch_of(plain, model, tokenizer, ROWS[:1])
    chosen, rejected = (logprob(model, o.input_ids, o.labels) for o in (pairs[0].chosen, pairs[0].rejected))
    gap = 0.1 * (chosen / 6 - rejected / 3)
    assert float(normed.loss(model, batch).value) == pytest.approx(float(-torch.sigmoid(gap).log()), abs=1e-5)
    assert float(tied.loss(model, batch).value) == pytest.approx(each[0] - float(chosen) / 6, abs=1e-5)


def test_ipo_is_least_at_its_target() -> None:
    config = DPOConfig(loss="ipo", beta=0.25)
    assert float(pair_loss(torch.tensor(2.0), config)) == 0.0
    assert float(pair_loss(torch.tensor(0.0), config)) == pytest.approx(4.0)


def test_many_pairs_lead_to_the_closed_form_optimum() -> None:
    """pi* = pi_ref exp(r / beta) / Z for a tabular policy and the expected loss over Bradley-Terry labels."""
    generator = torch.Generator().manual_seed(0)
    rewards, base = torch.randn(2, 20, generator=generator)
    config = DPOConfig(beta=0.5)
    theta = base.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS([theta], max_iter=200, line_search_fn="strong_wolfe")
    wins = torch.sigmoid(rewards[:, None] - rewards[None])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = theta.log_softmax(0) - base.log_softmax(0)
        loss = (wins * pair_loss(ratio[:, None] - ratio[None], config)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimum = (base.log_softmax(0) + rewards / config.beta).softmax(0)
    assert float((theta.softmax(0) - optimum).abs().sum() / 2) < 0.02


def test_it_agrees_with_trl(tokenizer: Any, make_model: Any, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    model, reference = make_model(0).eval(), make_model(1).eval()
    arguments = TRLConfig(
        str(tmp_path), use_cpu=True, bf16=False, beta=0.3, per_device_train_batch_size=3, report_to="none",
        loss_type="sigmoid", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, reference, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer
    )
    theirs = next(iter(trainer.get_train_dataloader()))
    expected = float(trainer.compute_loss(trainer.model, dict(theirs)))
    labels = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)
    batch = {
        "input_ids": theirs["input_ids"],
        "attention_mask": theirs["attention_mask"],
        "labels": labels,
        "loss_weights": (labels != -100).float(),
    }
    objective = DPO(beta=0.3, reference="model", reference_model="r", companions={"r": reference})
    assert float(objective.loss(model, batch).value) == pytest.approx(expected, abs=1e-5)
    _, mine = batch_of(objective, model, tokenizer)
    rows = {tuple(row[row != 0].tolist()) for row in mine["input_ids"]}
    assert rows == {tuple(row[row != 0].tolist()) for row in theirs["input_ids"]}, "the same tokens, the end included"


def test_training_prefers_the_chosen_answers(tokenizer: Any, make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    result = train(
        model, tokenizer, ROWS, objective=DPO(reference="precomputed"), optimizer=AdamW(lr=0.003), folder=tmp_path,
        settings=TrainSettings(steps=15, batch_size=3, precision="fp32", save_every=0, warmup=0.0),
    )  # fmt: skip
    assert result.curve[0][1] == pytest.approx(math.log(2), abs=1e-4)
    assert result.metrics["accuracy"] == 1.0
    assert result.metrics["margin"] > 0.1


def test_refusals(tokenizer: Any, make_model: Any, caplog: Any) -> None:
    model = make_model()
    with pytest.raises(InputError, match=r"PEFT adapter to switch off.*precomputed"):
        DPO().loss(model, batch_of(DPO(), model, tokenizer)[1])
    unprepared = DPO(reference="precomputed")
    batch = unprepared.collate(unprepared.examples(ROWS, tokenizer, max_length=32), tokenizer)
    with pytest.raises(InputError, match="call prepare"):
        unprepared.loss(model, batch)
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    with pytest.raises(InputError, match="whose answers differ"):
        DPO().examples([same], tokenizer, max_length=32)
    assert len(DPO().examples([*ROWS, same], tokenizer, max_length=32)) == 3
    assert "dropped 1 of 4" in caplog.text
    with pytest.raises(InputError, match="set reference_model"):
        DPO(reference="model").loss(model, batch)
    wide = DPO(reference="model", reference_model="r", companions={"r": make_model(vocab_size=300)})
    with pytest.raises(InputError, match="vocabulary of 258 tokens, got 300"):
        wide.loss(model, batch)
    with pytest.raises(InputError, match="got completion"):
        DPO().examples([{"prompt": "a", "completion": "b"}], tokenizer, max_length=32)
