"""Decoding Gemma-3-270M at batch 1: the runner's arms beside transformers and, where installed, llama.cpp.

All arms hold the same base weights: the packaged checkpoint, which was unpacked from a Q4_K_M file. So that this
favours no one, llama.cpp's files are made from those weights written out in float32, not taken as they were packed.

The runner's integer arms are saved checkpoints, as ``gossamer compress`` writes them: embedding and head packed too.

Arms take turns in one process on two threads, in reversed order every other round: greedy tokens after three prompts
(code, prose, a question), end of text ignored; and a prefill of 512 tokens. Tokens/s are those after the first. Then
each arm's perplexity on the same held-out text and its bytes: the file's, or of the parameters of a float model.
Drafters have a table of their own (:mod:`gossamer.benchmarks._decode_drafters`).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.benchmarks import _decode_drafters
from gossamer.core.paths import atomic_dir, atomic_file, cache_dir

MODEL, THREADS, WINDOW, PREFILL = "gemma-3-270m", 2, 512, 512
PROMPTS = {
    "code": 'def merge_sorted(left, right):\n    """Merge two sorted lists into one sorted list."""\n',
    "prose": "The old lighthouse at the end of the bay had not been lit for many years, and",
    "question": "Question: Why does ice float on water?\nAnswer:",
}
PACKED_ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "quality_arm": ("rounding", {"bits": 8, "group": 32, "skip": ()}),
    "small_arm": ("gptq", {"bits": 4, "group": 32, "skip": ()}),
}
CALIBRATION = {"english_prose": 96, "python_source": 32}  # windows of text
LLAMA_ARMS = {"llama_cpp_q4_k_m": (15, False), "llama_cpp_q4_0": (2, False), "llama_cpp_q4_0_pure": (2, True)}


@dataclasses.dataclass
class Arm:
    """``decode(ids, n)`` gives the moment of each of n tokens, ``prefill(ids)`` takes a prompt, ``nll(windows)`` is the
    mean negative log-likelihood of windows of ids after their first place."""

    decode: Callable[[list[int], int], list[float]]
    prefill: Callable[[list[int]], object]
    nll: Callable[[list[list[int]]], float]
    bytes: int
    start: float | None = None  # seconds to load and bind
    decoded: list[float] = dataclasses.field(default_factory=list)  # tokens/s
    prefilled: list[float] = dataclasses.field(default_factory=list)
    perplexity: float = math.nan


def run(quick: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """Tables, targets, every run and ``ratios``; ``quick``: one round of 8 tokens, perplexity on one window."""
    from gossamer.hub.models import load_model

    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model, tokenizer = load_model(MODEL, dtype="bfloat16", task="causal-lm")
        arms = _arms(model, tokenizer, log)
        ids = {name: tokenizer(text)["input_ids"] for name, text in PROMPTS.items()}
        windows = _windows(tokenizer, 1 if quick else 24)
        _take_turns(arms, list(ids.values()), windows[0], *((1, 8) if quick else (5, 64)))
        for name, arm in arms.items():
            arm.perplexity = math.exp(arm.nll(windows))
            log(f"{name}: {statistics.median(arm.decoded):.1f} tokens/s, perplexity {arm.perplexity:.3f}")
        small = _read(packed_model(tokenizer, *PACKED_ARMS["small_arm"], log))
        drafted = _decode_drafters.compare(model, small, tokenizer, quick, log)
    finally:
        torch.set_num_threads(threads)
    ratios = _ratios(arms) | {f"{r['drafter']}/{r['base']} {r['text']}": r["ratio"] for r in drafted}
    rows = [
        {
            "arm": name,
            "tokens_per_s": round(statistics.median(arm.decoded), 1),
            "prefill_per_s": round(statistics.median(arm.prefilled)),
            "perplexity": round(arm.perplexity, 3),
            "megabytes": round(arm.bytes / 1e6, 1),
            "bits_per_weight": round(8 * arm.bytes / model.num_parameters(), 2),
            "start_s": None if arm.start is None else round(arm.start, 1),
        }
        for name, arm in arms.items()
    ]
    return {
        "tables": [
            {"title": f"{MODEL}, {THREADS} threads", "rows": rows},
            {"title": "drafters over plain decoding on the same runner", "rows": drafted},
        ],
        "targets": _targets(arms, ratios, model.num_parameters(), _decode_drafters.targets(drafted)),
        "arms": {
            name: {"tokens_per_s": arm.decoded, "prefill_per_s": arm.prefilled, "perplexity": arm.perplexity,
                   "bytes": arm.bytes} for name, arm in arms.items()
        },
        "ratios": ratios,
        "notes": [f"base weights of all arms: {MODEL} as packaged"],
    }  # fmt: skip


def _arms(model: Any, tokenizer: Any, log: Callable[[str], None]) -> dict[str, Arm]:
    from gossamer.parts.decode_native import load_native
    from gossamer.parts.decode_runner import Runner

    load_native("auto")  # compiled once a machine: starts are timed without it
    arms = {"transformers_bf16": _transformers_arm(model)}
    arms["runner_bf16"] = _runner_arm(Runner(model, max_length=1024, weights="bfloat16"), _parameter_bytes(model))
    for name, (system, options) in PACKED_ARMS.items():
        folder = packed_model(tokenizer, system, options, log)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        start = time.perf_counter()
        arms[name] = _runner_arm(Runner(_read(folder), max_length=1024), size)
        arms[name].start = time.perf_counter() - start
    if importlib.util.find_spec("llama_cpp") is None:
        log("llama-cpp-python is not installed: pip install 'gossamer[bench]' for its arms")
        return arms
    for name, (kind, pure) in LLAMA_ARMS.items():
        arms[name] = _llama_arm(_llama_file(name, kind, pure))
    return arms


def _take_turns(arms: dict[str, Arm], prompts: list[list[int]], window: list[int], rounds: int, tokens: int) -> None:
    """One round to warm up, then ``rounds``: a run is all prompts of an arm."""
    for number in range(rounds + 1):
        for arm in list(arms.values())[:: 1 if number % 2 else -1]:
            spent = 0.0
            for ids in prompts:
                moments = arm.decode(ids, tokens)
                spent += moments[-1] - moments[0]
            start = time.perf_counter()
            arm.prefill(window[:PREFILL])
            filled = time.perf_counter() - start
            if number:
                arm.decoded.append(len(prompts) * (tokens - 1) / spent)
                arm.prefilled.append(PREFILL / filled)


def _ratios(arms: dict[str, Arm]) -> dict[str, float]:
    """``a/b`` of median speeds, and of median prefill speeds, of the two arms that carry a promise over each other."""
    found = {}
    for mine in ("quality_arm", "small_arm"):
        for other in arms.keys() - {mine}:
            found[f"{mine}/{other}"] = _ratio(arms[mine].decoded, arms[other].decoded)
            found[f"{mine}/{other} prefill"] = _ratio(arms[mine].prefilled, arms[other].prefilled)
    return dict(sorted(found.items()))


def _ratio(fast: list[float], slow: list[float]) -> float:
    return round(statistics.median(fast) / statistics.median(slow), 3)


def _targets(
    arms: dict[str, Arm], ratios: dict[str, float], weights: int, others: list[tuple[str, float, str, float]]
) -> list[dict[str, Any]]:
    quality, small = arms["quality_arm"], arms["small_arm"]
    lines = [
        ("quality arm over transformers in bf16", ratios["quality_arm/transformers_bf16"], ">=", 4.0),
        ("small arm, bits per weight", 8 * small.bytes / weights, "<=", 4.75),
        ("seconds to load and bind an arm, at most", max(quality.start or 0.0, small.start or 0.0), "<", 5.0),
    ]
    if "llama_cpp_q4_k_m" in arms:
        rival = arms["llama_cpp_q4_k_m"]
        lines += [
            ("quality arm over llama.cpp Q4_K_M", ratios["quality_arm/llama_cpp_q4_k_m"], ">=", 1.3),
            ("its perplexity over Q4_K_M's", quality.perplexity / rival.perplexity, "<=", 1.0),
            ("its bytes over Q4_K_M's", quality.bytes / rival.bytes, "<=", 1.2),
            ("its prefill over Q4_K_M's", ratios["quality_arm/llama_cpp_q4_k_m prefill"], ">=", 1.5),
        ]
        for name in ("llama_cpp_q4_0", "llama_cpp_q4_0_pure"):
            lines.append((f"small arm over {name}", ratios[f"small_arm/{name}"], ">=", 1.3))
            lines.append((f"its perplexity over {name}'s", small.perplexity / arms[name].perplexity, "<", 1.0))
    lines += others
    holds = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b}
    return [
        {"text": text, "value": round(value, 3), "target": f"{sign} {bound}", "met": holds[sign](value, bound)}
        for text, value, sign, bound in lines
    ]


def packed_model(tokenizer: Any, system: str, options: dict[str, Any], log: Callable[[str], None]) -> Path:
    """The base model after a compressor, calibrated on training text where it asks for that, saved in the cache."""
    import gossamer
    from gossamer.hub.models import load_model

    key = hashlib.sha256(json.dumps([CALIBRATION, options], sort_keys=True).encode()).hexdigest()[:12]
    final = cache_dir("bench", MODEL) / f"{system}-{key}"
    if not final.exists():
        log(f"{system} {options} of {MODEL}, once")
        model, _ = load_model(MODEL, dtype="bfloat16", task="causal-lm")
        compressor = gossamer.system(system, **options)
        data = calibration_windows(tokenizer) if compressor.calibrates else None
        with atomic_dir(final) as folder:
            compressor.compress(model, data).model.save_pretrained(folder)
    return final


def calibration_windows(tokenizer: Any) -> list[dict[str, Tensor]]:
    """Windows of 512 tokens of each of CALIBRATION's training splits, as batches of one."""
    batches = []
    for name, count in CALIBRATION.items():
        for ids in _windows(tokenizer, count, name, "train"):
            batches.append({"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()})
    return batches


def _read(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    from gossamer.core import hook

    hook.install()
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _parameter_bytes(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _runner_arm(runner: Any, size: int) -> Arm:
    def decode(ids: list[int], count: int) -> list[float]:
        return [time.perf_counter() for _ in runner.stream(ids, max_new_tokens=count)]

    def nll(windows: list[list[int]]) -> float:
        return _mean_nll(lambda ids: runner.verify(runner.open(), ids).logits, windows)

    return Arm(decode, lambda ids: runner.prefill(runner.open(), ids), nll, size)


def _transformers_arm(model: Any) -> Arm:
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        def __init__(self) -> None:
            self.moments: list[float] = []

        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.moments.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def decode(ids: list[int], count: int) -> list[float]:
        clock = Clock()
        inputs = torch.tensor([ids])
        model.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, stopping_criteria=[clock], pad_token_id=0,
        )  # fmt: skip
        return clock.moments

    @torch.no_grad()
    def logits(keep: int, ids: list[int]) -> Tensor:
        found: Tensor = model(input_ids=torch.tensor([ids]), logits_to_keep=keep).logits[0]
        return found

    nll = functools.partial(_mean_nll, functools.partial(logits, 0))
    return Arm(decode, functools.partial(logits, 1), nll, _parameter_bytes(model))


def _llama_arm(path: Path) -> Arm:
    from llama_cpp import Llama

    options: dict[str, Any] = {
        "n_threads": THREADS, "n_threads_batch": THREADS, "n_batch": WINDOW, "use_mmap": False, "verbose": False,
    }  # fmt: skip
    model = Llama(str(path), n_ctx=1024, **options)

    def decode(ids: list[int], count: int) -> list[float]:
        model.reset()
        moments = []
        for _ in model.generate(ids, temp=0.0, repeat_penalty=1.0):
            moments.append(time.perf_counter())
            if len(moments) == count:
                break
        return moments

    def prefill(ids: list[int]) -> None:
        model.reset()
        model.eval(ids)

    def nll(windows: list[list[int]]) -> float:
        scorer = Llama(str(path), n_ctx=WINDOW, logits_all=True, **options)

        def logits(ids: list[int]) -> Tensor:
            scorer.reset()
            scorer.eval(ids)
            return torch.from_numpy(scorer.scores[: len(ids)])

        return _mean_nll(logits, windows)

    return Arm(decode, prefill, nll, path.stat().st_size)


def _llama_file(name: str, kind: int, pure: bool) -> Path:
    """A GGUF of the packaged model in another format, made once by way of float32."""
    import ctypes

    import llama_cpp

    from gossamer.core.errors import GossamerError
    from gossamer.hub.models import packaged

    folder = cache_dir("bench")
    llama_cpp.llama_log_set(_silence(), None)

    def quantised(source: Path, stem: str, ftype: int) -> Path:
        final = folder / f"{MODEL}-{stem}.gguf"
        if not final.exists():
            options = llama_cpp.llama_model_quantize_default_params()
            options.ftype, options.allow_requantize, options.nthread, options.pure = ftype, True, THREADS, pure
            with atomic_file(final) as path:
                code = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options))
            if code:
                raise GossamerError(f"llama.cpp, writing {final}", must="quantise the model", got=f"code {code}")
        return final

    joined = folder / f"{MODEL}-packaged.gguf"
    if not joined.exists():
        with atomic_file(joined) as path, path.open("wb") as stream:
            for part in packaged(MODEL)[0].read():
                stream.write(part.read_bytes())
    return quantised(quantised(joined, "f32", 0), name.removeprefix("llama_cpp_"), kind)


@functools.cache
def _silence() -> Any:
    """What llama.cpp calls with each line of its log; cached, since it keeps no reference."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def _mean_nll(logits: Callable[[list[int]], Tensor], windows: Sequence[list[int]]) -> float:
    total, count = 0.0, 0
    for ids in windows:
        scores = logits(ids)[:-1]
        for at in range(0, len(scores), 64):
            part = scores[at : at + 64].float()
            targets = torch.tensor(ids[at + 1 : at + 1 + len(part)])
            total += float(torch.nn.functional.cross_entropy(part, targets, reduction="sum"))
        count += len(ids) - 1
    return total / count


def _windows(tokenizer: Any, count: int, corpus: str = "english_prose", split: str = "test") -> list[list[int]]:
    """Text in windows of 512 tokens, each after the bos token; that to be scored is the standard library's manual."""
    from gossamer.hub.corpora import load_corpus

    rows = load_corpus(corpus, split=split, limit=60 * count if split == "train" else None).rows
    text = "\n\n".join(row["text"] for row in rows[: 60 * count])
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = WINDOW - 1
    return [[tokenizer.bos_token_id, *ids[at : at + size]] for at in range(0, len(ids) - size, size)][:count]
