"""Measurement of a model: bytes on disk, parameters, peak memory of a fresh process, decoding speed, environment.

Memory is the resident set of a new Python process that loads the folder and generates. It is read from the kernel's
VmHWM: ``ru_maxrss`` would be wrong, for on Linux a child inherits the high-water mark of the parent that started it.
Speed is that of decoding alone: (tokens - 1) / (time of the last token - time of the first), so that the length of the
prompt does not enter; the time to the first token is given apart.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria

from gossamer.core.errors import GossamerError, InputError
from gossamer.parts.generation import greedy_config, left_pad

WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx")
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece")
VERSIONS = ("gossamer", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy")

TokenTimer = Callable[[int], "list[float]"]


@dataclass(frozen=True)
class SizeReport:
    """Bytes of every file; ``bits_per_weight`` = 8 weights_bytes / number of weights, where that number is known."""

    total_bytes: int
    weights_bytes: int
    tokenizer_bytes: int
    other_bytes: int
    bits_per_weight: float | None
    files: dict[str, int]


@dataclass(frozen=True)
class MemoryReport:
    """Resident bytes of a fresh process: with the libraries only, after loading, at its peak, and peak - libraries."""

    baseline_rss: int
    load_rss: int
    peak_rss_bytes: int
    net_rss_bytes: int
    tokens: int


@dataclass(frozen=True)
class SpeedReport:
    """Decoding speed: median over rounds, with the slowest and the fastest round; ``runs`` in the order taken."""

    tokens_per_s: float
    low: float
    high: float
    ms_per_token: float
    first_token_ms: float
    runs: list[float]


@dataclass(frozen=True)
class Ratio:
    """Speed of one arm over another: ratio of the medians, with the lowest and highest ratio within a round."""

    ratio: float
    low: float
    high: float


def size_on_disk(path: str | Path, weight_count: int | None = None) -> SizeReport:
    """Count every file below ``path`` (or the one file), hidden ones too; links count as what they point to."""
    root = Path(path)
    files = {str(file.relative_to(root)) if root.is_dir() else file.name: file.stat().st_size for file in _files(root)}
    if not files:
        raise InputError(str(root), must="be a file or a folder with files", do="save a model there first")
    weights = sum(size for name, size in files.items() if name.endswith(WEIGHTS))
    tokenizer = sum(size for name, size in files.items() if _is_tokenizer(name))
    total = sum(files.values())
    bits = 8 * weights / weight_count if weight_count else None
    return SizeReport(total, weights, tokenizer, total - weights - tokenizer, bits, files)


def parameters(model: torch.nn.Module) -> dict[str, Any]:
    """Counts: total, trainable, embeddings (input, and output where not tied), by_dtype; and the ``bytes`` held.

    Tied tensors count once. A module that exposes ``logical_weight_count`` (packed weights) counts as that many
    weights, under the dtype "packed", in place of its own tensors; only its ``bias`` is counted besides.
    """
    counts: dict[str, Any] = {"total": 0, "trainable": 0, "embeddings": 0, "bytes": 0, "by_dtype": {}}
    seen: set[int] = set()
    embeddings = {id(module) for module in _embeddings(model)}
    for module in model.modules():
        for size, dtype, trainable in _own_weights(module, seen, counts):
            counts["total"] += size
            counts["trainable"] += size if trainable else 0
            counts["embeddings"] += size if id(module) in embeddings else 0
            counts["by_dtype"][dtype] = counts["by_dtype"].get(dtype, 0) + size
    return counts


def peak_memory(model_path: str | Path, *, prompt: str, new_tokens: int = 32, timeout: float = 1800) -> MemoryReport:
    """Load the folder in a fresh process by ``AutoModelForCausalLM.from_pretrained``, generate greedily on the runner.

    The process has this one's environment and import path, and as many threads. Resident bytes hold the pages of a
    mapped weight file that were touched. Raises GossamerError with the process's last words where it fails.
    """
    job = {"path": str(model_path), "prompt": prompt, "new_tokens": new_tokens, "threads": torch.get_num_threads()}
    # -P and the explicit path: the folder the user stands in must not shadow a module
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-P", "-c", "from gossamer.parts.measure import _memory_child; _memory_child()"]
    where = f"measuring the memory of {model_path}"
    try:
        done = subprocess.run(
            command, input=json.dumps(job), capture_output=True, text=True, env=environment, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise GossamerError(where, must=f"end within {timeout:.0f} s", do="raise the timeout") from error
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise GossamerError(where, must="load and generate", got=words[-1] if words else f"exit {done.returncode}")
    return MemoryReport(**json.loads(done.stdout.splitlines()[-1]))


def token_timer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, **options: Any) -> TokenTimer:
    """A function of the number of new tokens that decodes them greedily at batch 1.

    It returns the seconds from the start to each token. ``options`` go to ``model.generate``.
    """
    inputs = left_pad([tokenizer(prompt)["input_ids"]], 0, model.device)
    generate: Any = model.generate

    def run(new_tokens: int) -> list[float]:
        config = greedy_config(model, tokenizer, max_new_tokens=new_tokens, min_new_tokens=new_tokens)
        clock = _Clock()
        training = model.training
        model.eval()
        with torch.no_grad():
            generate(**inputs, generation_config=config, stopping_criteria=[clock], **options)
        model.train(training)
        return [moment - clock.start for moment in clock.moments]

    return run


def runner_timer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> TokenTimer:
    """As :func:`token_timer`, on the decoding runner; end of text is an ordinary token here."""
    from gossamer.parts.decode_runner import Runner

    runner, ids = Runner(model), tokenizer(prompt)["input_ids"]

    def run(new_tokens: int) -> list[float]:
        start = time.perf_counter()
        return [time.perf_counter() - start for _ in runner.stream(ids, max_new_tokens=new_tokens)]

    return run


def decode_speed(
    arms: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase] | TokenTimer],
    prompt: str,
    new_tokens: int = 32,
    rounds: int = 5,
) -> dict[str, SpeedReport]:
    """Greedy decoding at batch 1 of a fixed number of new tokens, end-of-text suppressed.

    One warm-up each, then ``rounds`` in which the arms take turns in this process, in reversed order every other
    round. An arm is (model, tokenizer), run by transformers, or a function like :func:`runner_timer`'s.
    """
    if new_tokens < 2 or rounds < 1:
        got = f"{new_tokens} tokens and {rounds} rounds"
        raise InputError("decode_speed", must="time at least 2 new tokens in 1 round", got=got, do="ask for more")
    timers = {name: arm if callable(arm) else token_timer(*arm, prompt) for name, arm in arms.items()}
    for timer in timers.values():
        timer(min(new_tokens, 8))
    taken: dict[str, list[list[float]]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in list(timers)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(timers[name](new_tokens))
    return {name: _speed(times) for name, times in taken.items()}


def speed_ratio(fast: SpeedReport, slow: SpeedReport) -> Ratio:
    """How many times faster ``fast`` is; both from the same :func:`decode_speed` call, so that rounds pair up."""
    pairs = [a / b for a, b in zip(fast.runs, slow.runs, strict=True)]
    return Ratio(fast.tokens_per_s / slow.tokens_per_s, min(pairs), max(pairs))


def environment() -> dict[str, Any]:
    """This machine and its software: device, cores, memory_bytes, threads, system, python, versions (by package)."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    versions = {name: _version(name) for name in VERSIONS}
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version is not None},
    }


class _Clock(StoppingCriteria):
    """Stops nothing; notes when each token was ready."""

    def __init__(self) -> None:
        self.start, self.moments = time.perf_counter(), list[float]()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.moments.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _speed(times: list[list[float]]) -> SpeedReport:
    runs = [(len(moments) - 1) / (moments[-1] - moments[0]) for moments in times]
    median = statistics.median(runs)
    first = statistics.median(moments[0] for moments in times)
    return SpeedReport(median, min(runs), max(runs), 1000 / median, 1000 * first, runs)


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found: list[Path] = []
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in visited:
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        found.extend(Path(folder, name) for name in names)
    return sorted(found)


def _is_tokenizer(name: str) -> bool:
    return not name.endswith(WEIGHTS) and Path(name).name.startswith(TOKENIZER)


def _embeddings(model: Any) -> list[torch.nn.Module]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        return []
    return [module for module in (base.get_input_embeddings(), base.get_output_embeddings()) if module is not None]


def _own_weights(module: torch.nn.Module, seen: set[int], counts: dict[str, Any]) -> list[tuple[int, str, bool]]:
    """(number, dtype, trainable) of what ``module`` itself holds and was not ``seen``; adds held bytes to counts."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    new = [(name, tensor) for name, tensor in own if id(tensor) not in seen]
    seen.update(id(tensor) for _, tensor in own)
    logical = getattr(module, "logical_weight_count", None)
    # packed weights may lie in a kernel's layout outside of the buffers; what they save is what they are counted as
    held = list(module.state_dict().values()) if logical is not None else [tensor for _, tensor in new]
    counts["bytes"] += sum(tensor.nbytes for tensor in held)
    weights = [
        (tensor.numel(), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)
        for name, tensor in new
        if (name == "bias" if logical is not None else isinstance(tensor, torch.nn.Parameter))
    ]
    if logical is not None and any(name != "bias" for name, _ in new):
        weights.append((int(logical), "packed", False))
    return weights


def _memory_child() -> None:
    """Body of the fresh process: job as JSON on standard input, a MemoryReport as JSON on the last line of output.

    Importing this module has imported gossamer, so its quantisers are registered.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(sys.stdin.read())
    torch.set_num_threads(job["threads"])
    baseline = psutil.Process().memory_info().rss
    tokenizer = AutoTokenizer.from_pretrained(job["path"])
    model = AutoModelForCausalLM.from_pretrained(job["path"])
    loaded = psutil.Process().memory_info().rss
    run = runner_timer(model, tokenizer, job["prompt"])
    del model  # the runner holds what it needs
    made = len(run(job["new_tokens"]))
    peak = _peak_rss()
    print(json.dumps(MemoryReport(baseline, loaded, peak, peak - baseline, made).__dict__))


def _peak_rss() -> int:
    """High-water mark of this process's resident set in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
