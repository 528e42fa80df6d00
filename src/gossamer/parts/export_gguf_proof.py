"""A GGUF file read back by those who did not write it: transformers' reader, and llama.cpp where it is installed.

Measured by llama.cpp against float32 at 640 positions, top-1 agreement and mean KL in nats:

    type   bound             nursery llama-7m    Gemma-3-270M, trimmed and adapted
    f16    99 %, KL 0.001    100 %, 1.5e-7       99.7 %, 2.5e-6
    q8_0   KL 0.02           98.9 %, 1.3e-4      97.5 %, 3.2e-3
    q4_0   KL 1              93.8 %, 4.1e-3      65.6 %, 0.41

The last bound is wide since rounding to 4 bits alone costs a small model that much; a wrong layout costs several nats.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.core.errors import GossamerError
from gossamer.parts.export_proof import (
    CHUNK,
    TEXTS,
    Bound,
    Reference,
    compare,
    model_logits,
    prove,
    prove_equal,
    prove_tokens,
)

BOUNDS = {"f16": Bound(top1=0.99, kl=1e-3), "q8_0": Bound(kl=0.02), "q4_0": Bound(kl=1.0)}
_READ = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "vocab_size", "tie_word_embeddings",
)  # fmt: skip


def prove_gguf(path: Path, plain: Any, tokenizer: Any, before: Reference, kind: str) -> dict[str, Any]:
    """Figures of each reader. ``plain`` gives class and config; its weights are not looked at.

    Raises GossamerError where logits, tokens, chat template or end tokens are not those of ``before``.
    """
    what, bound = f"export gguf {kind}", BOUNDS[kind]
    _fields(path, tokenizer, before, what)
    model = _read(path, type(plain), plain.config, what)
    figures = {"transformers": prove(compare(before.logits, model_logits(model, before.ids)), bound, what)}
    del model
    if importlib.util.find_spec("llama_cpp") is None:
        prove_tokens(before, _transformers_tokens(path), f"{what}, read by transformers")
    else:
        figures["llama.cpp"] = _prove_llama_cpp(path, before, bound, f"{what}, read by llama.cpp")
    return figures


def _read(path: Path, cls: Any, config: Any, what: str) -> Any:
    """The model by transformers' reader; what it does not read (patterns, rotary scaling) is the config's."""
    import transformers

    read = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key in _READ:
        prove_equal(getattr(config, key), getattr(read, key), f"{what}: {key}")
    return cls.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()  # fmt: skip


def _fields(path: Path, tokenizer: Any, before: Reference, what: str) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(path)

    def read(key: str) -> Any:
        field = reader.get_field(f"tokenizer.{key}")
        return None if field is None else field.contents()

    if not isinstance(tokenizer.chat_template, dict):
        prove_equal(tokenizer.chat_template or None, read("chat_template"), f"{what}: chat template")
    ends = [read(f"ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    prove_equal(
        sorted(set(before.ends) | {ends[0]}), sorted({end for end in ends if end is not None}), f"{what}: end tokens"
    )
    prove_equal(tokenizer.bos_token_id, read("ggml.bos_token_id"), f"{what}: start token")


def _transformers_tokens(path: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


def _prove_llama_cpp(path: Path, before: Reference, bound: Bound, what: str) -> dict[str, Any]:
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), None)
    context, threads = max(map(len, before.ids)), torch.get_num_threads()
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=CHUNK, n_threads=threads, n_threads_batch=threads, logits_all=True,
            verbose=False,
        )  # fmt: skip
    except ValueError as error:
        raise GossamerError(what, must="load", got=str(error), do="nothing was written") from error
    try:
        prove_tokens(before, [model.tokenize(text.encode(), add_bos=True, special=True) for text in TEXTS], what)
        found = compare(before.logits, _llama_cpp_logits(model, before.ids))
    finally:
        model.close()
    return prove(found, bound, what)


def _llama_cpp_logits(model: Any, ids: list[list[int]]) -> Iterator[Tensor]:
    for row in ids:
        model.reset()
        for start in range(0, len(row), CHUNK):
            chunk = row[start : start + CHUNK]
            model.eval(chunk)
            yield torch.from_numpy(model.scores[start : start + len(chunk)])


@functools.cache
def _silence() -> Any:
    """What llama.cpp calls with each line of its log; cached, since it keeps no reference."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
