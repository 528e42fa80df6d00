"""Which layers count as projections, and how they group."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from gossamer.core.errors import OptionError
from gossamer.parts.injection import grouped, projections, target_names


def bert() -> BertForSequenceClassification:
    config = BertConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2)
    return BertForSequenceClassification(config)


def test_pooler_and_head_stand_outside_the_blocks() -> None:
    paths = [projection.path for projection in projections(bert())]
    assert len(paths) == 3 * 6
    assert not any("pooler" in path or "classifier" in path for path in paths)
    assert target_names(bert()) == {
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    }


def test_groups_by_type_and_widths() -> None:
    groups = grouped(projections(bert()))
    assert groups["bert.encoder.layer.*.intermediate.dense 8x12"][2].path == "bert.encoder.layer.2.intermediate.dense"
    assert {len(members) for members in groups.values()} == {3}

    uneven = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, width)}) for width in (4, 8, 4)])
    assert {group: len(members) for group, members in grouped(projections(uneven)).items()} == {
        "*.up 4x4": 2,
        "*.up 4x8": 1,
    }


def test_transposed_layers_have_their_true_widths() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    shapes = {p.path.split(".", 3)[3]: (p.d_in, p.d_out) for p in projections(model)}
    assert shapes == {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}


def test_names_and_expressions() -> None:
    assert len(projections(bert(), ("query", "intermediate.dense"))) == 6
    assert [p.path for p in projections(bert(), r".*\.1\..*\.value")] == ["bert.encoder.layer.1.attention.self.value"]
    assert len(projections(bert(), ("classifier",))) == 1
    with pytest.raises(OptionError, match="got 'querry'; did you mean 'query'"):
        projections(bert(), ("value", "querry"))
    with pytest.raises(OptionError, match="must match linear layers"):
        projections(nn.ModuleList([nn.Embedding(3, 3), nn.LayerNorm(3)]).to(torch.float32))
