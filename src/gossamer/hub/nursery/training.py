"""Trains a small Llama from random weights on technical English and Python, on a CPU, in about an hour.

A plain loop: AdamW, linear warm-up and cosine decay, packed windows, bfloat16 autocast. The batch of a step is a
pure function of the step's number and there is no dropout, so a run that was killed goes on from its last checkpoint
with the very steps it would have taken.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gossamer.core.errors import OptionError, did_you_mean
from gossamer.core.paths import atomic_dir, atomic_file, cache_dir, write_json
from gossamer.hub.corpora import load_corpus

END = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass(frozen=True)
class NurserySpec:
    """Shape of a model, what it reads and how it is trained. ``code_share`` is Python's share of the tokens."""

    vocabulary: int = 8192
    hidden: int = 256
    intermediate: int = 512
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    positions: int = 1024
    prose: str = "english_prose"
    code: str = "python_source"
    code_share: float = 0.2
    tokens: int = 10_000_000
    window: int = 256
    batch: int = 32
    rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.03
    seed: int = 0
    bfloat16: bool = True


SPECS = {"llama-7m": NurserySpec()}


def train_nursery(
    name: str = "llama-7m",
    *,
    tokens: int | None = None,
    out: Path | None = None,
    spec: NurserySpec | None = None,
    stop_after: int | None = None,
    checkpoint_every: int = 100,
) -> dict[str, Any]:
    """Train (or go on training) and write model, tokenizer and training.json to ``out`` (default: the package).

    ``stop_after`` ends after that step of the same schedule with a checkpoint and no model. After a quarter of the
    steps a usable copy is written to the cache as ``nursery/<name>-early``. Returns the content of training.json.
    """
    if spec is None:
        if name not in SPECS:
            raise OptionError("nursery model", must="be a known name", got=repr(name), do=did_you_mean(name, SPECS))
        spec = SPECS[name]
    spec = NurserySpec(**{**asdict(spec), "tokens": tokens or spec.tokens})
    work = cache_dir("nursery", name)
    with FileLock(work / ".lock"):
        tokenizer, data, facts = _prepare(spec, work)
        model = _new_model(spec)
        trainer = _Trainer(spec, model, data["train"], work / "checkpoint.pt", facts["fingerprint"])
        early = trainer.steps // 4
        while trainer.step < trainer.steps:
            trainer.advance()
            done = trainer.step == trainer.steps
            if trainer.step % checkpoint_every == 0 or done or trainer.step == stop_after:
                trainer.save()
            if trainer.step == early and stop_after is None:
                report = trainer.report() | facts | held_out(model, data["validation"], tokenizer, spec, windows=100)
                _write(work.parent / f"{name}-early", model, tokenizer, report)
            if trainer.step == stop_after:
                return trainer.report()
        report = trainer.report() | facts | held_out(model, data["validation"], tokenizer, spec)
        _write(out or Path(__file__).parent / name, model, tokenizer, report)
    return report


def held_out(
    model: LlamaForCausalLM,
    stream: np.ndarray[Any, Any],
    tokenizer: PreTrainedTokenizerFast,
    spec: NurserySpec,
    windows: int = 1000,
) -> dict[str, float]:
    """Bits per byte on the first ``windows`` windows of a held-out token stream: total nats / (ln 2 x bytes).

    The first token of a window is context only. An end-of-text token costs nats and counts no bytes.
    """
    width = torch.tensor(_byte_widths(tokenizer))
    rows = torch.from_numpy(stream[: len(stream) // spec.window * spec.window].astype(np.int64)).view(-1, spec.window)
    nats, size, count = 0.0, 0, 0
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=spec.bfloat16):
        for batch in rows[:windows].split(spec.batch):
            logits = model(input_ids=batch[:, :-1]).logits.float()
            targets = batch[:, 1:]
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            size += int(width[targets].sum())
            count += targets.numel()
    model.train()
    return {
        "held_out_bits_per_byte": nats / (math.log(2) * size),
        "held_out_loss_per_token": nats / count,
        "held_out_tokens": count,
    }


class _Trainer:
    """Model, optimizer, step and loss curve, with a checkpoint that is used only by a run with the same settings."""

    def __init__(
        self, spec: NurserySpec, model: LlamaForCausalLM, stream: np.ndarray[Any, Any], path: Path, fingerprint: str
    ) -> None:
        self.spec, self.model, self.path, self.fingerprint = spec, model, path, fingerprint
        self.windows = stream[: len(stream) // spec.window * spec.window].reshape(-1, spec.window)
        self.steps = max(1, round(spec.tokens / (spec.window * spec.batch)))
        self.step, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        self._recent: list[float] = []
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": spec.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=spec.rate, betas=(0.9, 0.95))
        self._load()

    def advance(self) -> None:
        """One optimizer step."""
        started = time.perf_counter()
        batch = torch.from_numpy(self._batch(self.step).astype(np.int64))
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.spec.bfloat16):
            logits = self.model(input_ids=batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.seconds += time.perf_counter() - started
        self._recent.append(loss.item())
        if self.step % 20 == 0 or self.step == self.steps:
            self.curve.append([self.step, round(sum(self._recent) / len(self._recent), 4)])
            self._recent = []
            speed = self.step * self.spec.batch * self.spec.window / self.seconds
            print(f"step {self.step}/{self.steps} loss {self.curve[-1][1]:.3f} {speed:.0f} tokens/s", flush=True)

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        state = {
            "fingerprint": self.fingerprint,
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "recent": self._recent,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with atomic_file(self.path) as temporary:
            torch.save(state, temporary)

    def report(self) -> dict[str, Any]:
        """Steps, seconds, tokens and the loss curve (mean over the 20 steps before each entry)."""
        return {
            "command": " ".join(["python", "-m", "gossamer.hub.nursery.train", *sys.argv[1:]]),
            "spec": asdict(self.spec),
            "steps": self.step,
            "seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "trained_tokens": self.step * self.spec.batch * self.spec.window,
            "epochs": round(self.step * self.spec.batch / len(self.windows), 3),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "curve": self.curve,
        }

    def _batch(self, step: int) -> np.ndarray[Any, Any]:
        """[batch, window]: windows in a new random order each epoch; a batch may run into the next epoch."""
        total = len(self.windows)
        places = np.arange(step * self.spec.batch, (step + 1) * self.spec.batch)
        rows = [self._order(int(place) // total)[int(place) % total] for place in places]
        return self.windows[rows]

    def _order(self, epoch: int) -> np.ndarray[Any, Any]:
        return np.random.default_rng([self.spec.seed, epoch]).permutation(len(self.windows))

    def _rate(self, step: int) -> float:
        warm = max(1, round(self.spec.warmup * self.steps))
        if step < warm:
            return self.spec.rate * (step + 1) / warm
        return self.spec.rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm))))

    def _load(self) -> None:
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        if state["fingerprint"] != self.fingerprint:
            return
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.curve, self._recent = state["curve"], state["recent"]
        print(f"going on from step {self.step}", flush=True)


def _prepare(
    spec: NurserySpec, work: Path
) -> tuple[PreTrainedTokenizerFast, dict[str, np.ndarray[Any, Any]], dict[str, Any]]:
    """Tokenizer, token streams and what is recorded of them; made once per specification and corpus content."""
    prose, code = load_corpus(spec.prose), load_corpus(spec.code)
    facts: dict[str, Any] = {
        "corpora": {corpus.name: {"sha256": corpus.sha256, "licence": corpus.licence} for corpus in (prose, code)},
        "sources": list(prose.sources),
        "versions": {"python": platform.python_version(), "torch": torch.__version__}
        | {"transformers": transformers.__version__},
    }
    key = json.dumps([asdict(spec), facts["corpora"], facts["versions"]], sort_keys=True)
    facts["fingerprint"] = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = work / f"data-{facts['fingerprint']}"
    if not folder.is_dir():
        with atomic_dir(folder) as temporary:
            texts, codes = list(_documents(prose.rows)), [row["text"] for row in code.rows]
            rng = np.random.default_rng(spec.seed)
            codes = [codes[place] for place in rng.permutation(len(codes))]
            raw = _new_tokenizer(spec, texts + codes[: len(codes) // 3])
            raw.save(str(temporary / "tokenizer.json"))
            counts = {}
            streams = _encode(raw, texts), _encode(raw, codes)
            wanted = round(sum(map(len, streams[0])) * spec.code_share / (1 - spec.code_share))
            kept = _first(streams[1], wanted)
            counts["unique_prose_tokens"] = sum(map(len, streams[0]))
            counts["unique_code_tokens"] = sum(map(len, kept))
            counts["code_tokens_available"] = sum(map(len, streams[1]))
            mixed = streams[0] + kept
            stream = np.concatenate([mixed[place] for place in rng.permutation(len(mixed))])
            np.save(temporary / "train.npy", stream)
            held = list(_documents(load_corpus(spec.prose, split="validation").rows))
            np.save(temporary / "validation.npy", np.concatenate(_encode(raw, held)))
            write_json(temporary / "counts.json", counts)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        bos_token=END, eos_token=END, pad_token=PAD, model_max_length=spec.positions,
    )  # fmt: skip
    facts |= json.loads((folder / "counts.json").read_text(encoding="utf-8"))
    return tokenizer, {split: np.load(folder / f"{split}.npy") for split in ("train", "validation")}, facts


def _documents(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Paragraphs of one source joined to a document."""
    for _, group in groupby(rows, key=lambda row: row["source"]):
        yield "\n\n".join(row["text"] for row in group)


def _new_tokenizer(spec: NurserySpec, texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray[Any, Any]]:
    """Token ids of each text with an end-of-text token."""
    end = tokenizer.token_to_id(END)
    return [np.array([*item.ids, end], np.uint16) for item in tokenizer.encode_batch_fast(texts)]


def _first(streams: list[np.ndarray[Any, Any]], tokens: int) -> list[np.ndarray[Any, Any]]:
    """As many whole documents from the start as make up ``tokens``."""
    ends = np.cumsum([len(item) for item in streams])
    return streams[: int(np.searchsorted(ends, tokens)) + 1]


def _byte_widths(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Bytes each token stands for: byte-level BPE writes one character a byte; special tokens count none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [0 if number in special else len(name) for number, name in enumerate(names)]


def _new_model(spec: NurserySpec) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.hidden, intermediate_size=spec.intermediate,
        num_hidden_layers=spec.layers, num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.positions, tie_word_embeddings=True, initializer_range=0.02,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    torch.manual_seed(spec.seed)
    return LlamaForCausalLM(config).train()


def _write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, report: dict[str, Any]) -> None:
    """A folder that from_pretrained reads, with bfloat16 weights and training.json."""
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    with atomic_dir(folder) as temporary:
        half.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "training.json", report)
