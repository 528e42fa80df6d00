"""What tests of several areas share: rows, tiny models and a byte tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory):
    """Forty prompt and completion rows as JSON lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    verbs = ("open", "close", "read", "write", "copy", "move", "sort", "count", "join", "split")
    things = ("file", "list", "table", "string")
    rows = [
        {
            "prompt": f"def {verb}_{thing}(x):\n    ...\n# In one line:",
            "completion": f" {verb.title()} the {thing} x.\n",
        }
        for verb in verbs
        for thing in things
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level, 258 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """``make_model(seed, **config)``: a Llama of two layers for :func:`tokenizer`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **options: Any) -> Any:
        shape = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, "initializer_range": 0.2, **options}))

    return make
