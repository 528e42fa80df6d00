"""The laws bite: each of these systems is sound but for one line, and exactly the law about that line reports it."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.core.errors import InputError
from gossamer.testing import check_system

ADAPTER = '''"""Shifts: a learnt vector, zero at first, joins the output of each block, y = block(x) + gain * v."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import ModuleAdapter
from gossamer.parts.hidden_states import decoder_blocks

CARD = Card(title="Shifts", claim="trains little", traits=("identity_at_init",), builtin=True)


class ShiftConfig(Config):
    gain: float = option(1.0, "what the vectors are multiplied by", gt=0)


class Shift(ModuleAdapter):
    config_class = ShiftConfig

    def modules(self, model):
        width = model.config.get_text_config().hidden_size
        return nn.ParameterList(torch.zeros(width) for _ in decoder_blocks(model))

    def hook(self, model, modules):
        def add(vector):
            def after(module, inputs, out):
                moved = self.config.gain * vector
                return (out[0] + moved, *out[1:]) if isinstance(out, tuple) else out + moved

            return after

        return [b.register_forward_hook(add(v)) for b, v in zip(decoder_blocks(model), modules, strict=True)]
'''

OBJECTIVE = '''"""Token loss: the weighted mean of -log p over the answer tokens."""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from gossamer.core.card import Card
from gossamer.core.options import Config
from gossamer.kinds.objectives import Loss, Objective

CARD = Card(title="Token loss", claim="a loss", builtin=True)


class TokenLossConfig(Config):
    """None."""


class TokenLoss(Objective):
    config_class = TokenLossConfig

    def loss(self, model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**inputs).logits[:, :-1].float()
        nll = cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none")
        return Loss((batch["loss_weights"][:, 1:] * nll).sum() / self.normaliser(batch))

    def amount(self, batch):
        return float(batch["loss_weights"].sum())
'''

COMPRESSION = '''"""Halves: every float weight as bfloat16."""

from __future__ import annotations

import torch

from gossamer.core.card import Card
from gossamer.core.errors import InputError
from gossamer.core.options import Config
from gossamer.kinds.compression import Compressed, Compression, CompressionReport, held_bytes

CARD = Card(title="Halves", claim="half the bytes", builtin=True)


class HalvesConfig(Config):
    """None."""


class Halves(Compression):
    config_class = HalvesConfig

    def check(self, model, data=None):
        super().check(model, data)
        if hasattr(model, "halved"):
            raise InputError("halves", must="get float32 weights", got="halves")

    def compress(self, model, data=None):
        before = held_bytes(model)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
        model.halved = True
        return Compressed(model, CompressionReport(before, held_bytes(model)))
'''

OPTIMIZER = '''"""Momentum: heavy-ball steps."""

from __future__ import annotations

import torch

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.optimizers import Optimizer

CARD = Card(title="Momentum", claim="goes down", builtin=True)


class MomentumConfig(Config):
    lr: float = option(1e-2, "learning rate", gt=0)
    momentum: float = option(0.9, "share of the last move that stays", ge=0, lt=1)


class Momentum(Optimizer):
    config_class = MomentumConfig

    def build(self, params):
        return torch.optim.SGD(params, lr=self.config.lr, momentum=self.config.momentum)
'''

DECODING = '''"""Repeat: guesses the last token again; the model verifies."""

from __future__ import annotations

from gossamer.core.card import Card
from gossamer.core.options import Config
from gossamer.kinds.decoding import Draft, DrafterDecoding, RequestState

CARD = Card(title="Repeat", claim="the same text", traits=("lossless",), builtin=True)


class RepeatConfig(Config):
    """None."""


class Repeat(DrafterDecoding):
    config_class = RepeatConfig
    draft_tokens = 2
    switch_off = False

    def begin(self, model, prompt, tokenizer):
        return RequestState(prompt)

    def draft(self, states, k):
        return [Draft([state.ids[-1]] * k) for state in states]
'''

SOUND = {
    "shift": ADAPTER,
    "token_loss": OBJECTIVE,
    "halves": COMPRESSION,
    "momentum": OPTIMIZER,
    "repeat": DECODING,
}


@pytest.mark.parametrize("name", SOUND)
def test_the_sound_system_passes(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.py"
    path.write_text(SOUND[name], encoding="utf-8")
    assert check_system(path, families=["llama"]) == []


BROKEN = [
    ("shift", 'title="Shifts"', 'title=""', "check_card_is_complete"),
    ("shift", "builtin=True", "provides=('adapter_atached',), builtin=True", "check_card_is_complete"),
    ("shift", "builtin=True", "registers=('peft:shift',), builtin=True", "check_card_is_complete"),
    ("shift", "moved = self.config.gain * vector", "moved = vector", "check_no_option_is_inert"),
    ("shift", "config_class = ShiftConfig", "config_class, name = ShiftConfig, 'other'", "check_options_refuse"),
    ("shift", "torch.zeros(width)", "torch.ones(width)", "check_identity_at_start"),
    ("shift", "    def hook(self, model, modules):\n",
     "    def hook(self, model, modules):\n        model.get_input_embeddings().weight.requires_grad_(True)\n",
     "check_only_its_parameters_train"),
    ("shift", "decoder_blocks(model), modules, strict=True)]", "decoder_blocks(model), modules, strict=True)][1:]",
     "check_detach_is_bit_for_bit"),
    ("shift", "    def hook(self, model, modules):\n",
     "    def hook(self, model, modules):\n        torch.manual_seed(5)\n",
     "check_inputs_and_global_state_are_untouched"),
    ("token_loss", 'float(batch["loss_weights"].sum())', 'float(batch["labels"].numel())',
     "check_padding_does_not_matter"),
    ("token_loss", "self.normaliser(batch)", "self.amount(batch)", "check_accumulation_equals_one_batch"),
    ("token_loss", "        logits = ", "        batch['seen'] = 1\n        logits = ",
     "check_inputs_and_global_state_are_untouched"),
    ("token_loss", '(batch["loss_weights"][:, 1:] * nll)', '(batch["loss_weights"][:, 1:] * nll)[1:]',
     "check_batch_order_does_not_matter|check_accumulation_equals_one_batch"),
    ("halves", "CompressionReport(before, held_bytes(model))", "CompressionReport(before, held_bytes(model) // 2)",
     "check_the_report_counts_held_bytes"),
    ("halves", ".bfloat16()", ".bfloat16().float()", "check_it_is_smaller"),
    ("halves", "model.halved = True", "model.to(torch.bfloat16).halved = True", "check_save_and_load_give_the_same"),
    ("halves", 'if hasattr(model, "halved")', "if False", "check_bad_input_is_refused"),
    ("momentum", "lr=self.config.lr,", "lr=self.config.lr * (1 + torch.initial_seed() % 7),",
     "check_same_seed_same_result"),
    ("momentum", "momentum=self.config.momentum)", "momentum=self.config.momentum, maximize=True)",
     "check_it_lowers_a_convex_loss"),
    ("momentum", "        return torch.optim.SGD(",
     "        class Forgetful(torch.optim.SGD):\n            def state_dict(self):\n"
     "                return super().state_dict() | {'state': {}}\n\n        return Forgetful(",
     "check_it_resumes_exactly"),
    ("repeat", "    def draft(self", "    def _settle(self, state, draft, logits):\n"
     "        return super()._settle(state, draft, logits.roll(1, -1))\n\n    def draft(self",
     "check_greedy_tokens_are_the_models_own"),
    ("repeat", "    def draft(self", "    def step(self, model, states):\n        self.company = len(states) - 1\n"
     "        return super().step(model, states)\n\n    def _settle(self, state, draft, logits):\n"
     "        return super()._settle(state, draft, logits.roll(self.company, -1))\n\n    def draft(self",
     "check_batch_equals_single|check_requests_join_and_leave|check_greedy_tokens_are_the_models_own"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "line", "broken", "law"), BROKEN, ids=[f"{b[0]}-{b[3]}" for b in BROKEN])
def test_one_broken_line_is_reported_by_its_law(name: str, line: str, broken: str, law: str, tmp_path: Path) -> None:
    source = SOUND[name]
    assert source.count(line) == 1
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace(line, broken), encoding="utf-8")
    findings = check_system(path, families=["llama"])
    assert {finding.law for finding in findings} == set(filter(None, law.split("|"))), "\n".join(map(str, findings))


def test_a_file_without_a_system_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nothing.py"
    path.write_text('"""Nothing."""\n', encoding="utf-8")
    with pytest.raises(InputError, match="must hold a CARD"):
        check_system(path)
