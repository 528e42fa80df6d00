"""Encoders and decoders as model.onnx, by torch's exporter, with the names that optimum gives inputs and outputs.

encoder   input_ids, attention_mask (token_type_ids) [b, t]  ->  last_hidden_state [b, t, d]
decoder   input_ids, position_ids [b, t], attention_mask [b, s + t], past_key_values.N.key and .value [b, h, s, d]
          ->  logits [b, t, v], present.N.key and .value [b, h, s + t, d]

Everything is float32, and batch, length and past length are free; s is 0 at first. The graph masks by the place in
the cache, as transformers does: place j is seen from place i where j <= i, where the attention mask has a 1, and in
sliding layers where i - j < window. The cache keeps all places in every layer. Padding may stand on the left.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.core.errors import GossamerError, InputError, MissingExtra
from gossamer.parts.export_plain import save_processor
from gossamer.parts.export_proof import CHUNK
from gossamer.parts.generation import left_pad
from gossamer.parts.surgery_format import read_widths

FILE = "model.onnx"
_OPSET = 20
_ONE_FILE = 1 << 30  # protobuf ends at 2 GB; larger weights go beside the graph
_BATCH, _TOKENS, _PAST = {0: "batch_size", 1: "sequence_length"}, 3, 5


def check_onnx_model(model: Any, processor: Any) -> None:
    """MissingExtra without the packages; InputError for a model that is neither a text encoder nor a plain decoder."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise MissingExtra("export onnx", "onnx")
    config = model.config.get_text_config()
    if not hasattr(processor, "decode") or config is not model.config or config.is_encoder_decoder:
        do = "export its text model, or use safetensors"
        raise InputError("export onnx", must="get an encoder or decoder of text", got=type(model).__name__, do=do)
    if model.can_generate() and read_widths(config):
        do = "export to a package, or export a model that was not pruned"
        raise InputError("export onnx", must="get a cache of one shape", got="layers of ragged widths", do=do)


def write_onnx(model: Any, processor: Any, folder: Path) -> None:
    """Write graph, config and tokenizer of a float32 model. Raises GossamerError where the exporter cannot trace it."""
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad(), _quiet():
            program = _decoder(model) if model.can_generate() else _encoder(model, processor)
    # what cannot be traced comes as errors of many kinds
    except Exception as error:
        got = str(error).strip().splitlines()[0]
        raise GossamerError(
            "export onnx", must="be traced by torch.onnx", got=got, do="export to safetensors"
        ) from error
    finally:
        model.set_attn_implementation(attention)
    size = sum(parameter.nbytes for parameter in model.parameters())
    program.save(str(folder / FILE), external_data=size > _ONE_FILE)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    save_processor(processor, folder)


class OnnxDecoder:
    """A decoder in ONNX Runtime, by the names above."""

    def __init__(self, folder: Path) -> None:
        self.session = _session(folder)
        self.outputs = [output.name for output in self.session.get_outputs()]
        inputs = {entry.name: entry.shape for entry in self.session.get_inputs()}
        self.past = {name: shape for name, shape in inputs.items() if name.startswith("past_key_values.")}

    def step(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """ids, positions [b, t], mask [b, s + t] -> logits [b, t, v] and the next ``past``."""
        if past is None:
            rows = len(ids)
            past = {name: torch.zeros(rows, shape[1], 0, shape[3]).numpy() for name, shape in self.past.items()}
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy(), **past}
        logits, *present = self.session.run(self.outputs, feed)
        return torch.from_numpy(logits), dict(zip(self.past, present, strict=True))

    def logits(self, ids: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """Logits [at most CHUNK, v] of each row, on through its cache."""
        for row in ids:
            past = None
            for start in range(0, len(row), CHUNK):
                chunk = torch.tensor([row[start : start + CHUNK]])
                end = start + chunk.shape[1]
                found, past = self.step(
                    chunk, torch.ones(1, end, dtype=torch.long), torch.arange(start, end)[None], past
                )
                yield found[0]

    def generate(self, prompts: Sequence[Sequence[int]], pad: int, new_tokens: int) -> Tensor:
        """Greedy continuation of prompts as one batch, padded on the left, int64 [b, new_tokens]."""
        batch = left_pad(prompts, pad)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        made: list[Tensor] = []
        past = None
        while len(made) < new_tokens:
            logits, past = self.step(ids, mask, positions, past)
            ids = logits[:, -1].argmax(-1, keepdim=True)
            made.append(ids)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        return torch.cat(made, 1)


class OnnxEncoder:
    """An encoder in ONNX Runtime, called as one of transformers: ``encoder(**batch).last_hidden_state`` [b, t, d]."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, config: Any) -> None:
        self.session, self.config = _session(folder), config
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, **batch: Tensor) -> SimpleNamespace:
        hidden = self.session.run(None, {name: batch[name].numpy() for name in self.inputs})[0]
        return SimpleNamespace(last_hidden_state=torch.from_numpy(hidden))


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(past)  # without the config: sliding layers too keep all places
        total, new = attention_mask.shape[1], input_ids.shape[1]
        here, there = (torch.arange(new) + total - new)[:, None], torch.arange(total)[None]
        seen = (there <= here)[None] & (attention_mask[:, None] > 0)  # [b, t, s + t]
        config = self.model.config
        masks: Any = _additive(seen)
        if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            near = (here - there < config.sliding_window)[None]
            masks = {"full_attention": masks, "sliding_attention": _additive(seen & near)}
        out = self.model(
            input_ids=input_ids, attention_mask=masks, position_ids=position_ids, past_key_values=cache, use_cache=True
        )
        return (out.logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


class _Encoder(nn.Module):
    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True))).last_hidden_state


def _decoder(model: Any) -> Any:
    rows = 2
    ids = torch.ones(rows, _TOKENS, dtype=torch.long)
    first = model(input_ids=ids, use_cache=True).past_key_values
    shapes = [tuple(layer.keys.shape) for layer in first.layers]
    past = [tuple(torch.zeros(rows, heads, _PAST, width) for _ in range(2)) for _, heads, _, width in shapes]
    mask = torch.ones(rows, _PAST + _TOKENS, dtype=torch.long)
    positions = torch.arange(_PAST, _PAST + _TOKENS).repeat(rows, 1)
    free = {0: "batch_size", 2: "past_sequence_length"}
    return torch.onnx.export(
        _Decoder(model),
        (ids, mask, positions, past),
        dynamo=True,
        opset_version=_OPSET,
        input_names=["input_ids", "attention_mask", "position_ids", *_pairs("past_key_values", len(past))],
        output_names=["logits", *_pairs("present", len(past))],
        dynamic_shapes=(_BATCH, {0: "batch_size", 1: "total_sequence_length"}, _BATCH, [(free, free)] * len(past)),
        verbose=False,
    )


def _encoder(model: Any, processor: Any) -> Any:
    batch = processor(["one text", "another, longer text"], padding=True, return_tensors="pt")
    taken = inspect.signature(model.forward).parameters
    names = [name for name in batch if name in taken]
    return torch.onnx.export(
        _Encoder(model, names),
        tuple(batch[name] for name in names),
        dynamo=True,
        opset_version=_OPSET,
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_shapes=((_BATCH,) * len(names),),
        verbose=False,
    )


def _pairs(stem: str, layers: int) -> list[str]:
    return [f"{stem}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _additive(seen: Tensor) -> Tensor:
    """[b, t, s] -> [b, 1, t, s]. Not -inf: a padded row that sees nothing would become nan, and spread."""
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]


def _session(folder: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns of torchvision and of axis names that it shares."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
