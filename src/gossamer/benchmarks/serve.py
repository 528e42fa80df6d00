"""The OpenAI-compatible server: batching, its own latency, load with hang-ups, JSON schemas, a crowd of clients.

Every part starts ``gossamer serve`` as a process of its own and asks it over loopback, on two threads; clients run on
the same two cores and take their share. The model is Gemma-3-270M at 8 bits, as ``bench decode`` packs it; the load of
many small requests is put on the 7M nursery model, where a leak would be a larger share of the memory.

- batch: tokens/s of eight answers at once over those of one, prompts read included, rounds in turn.
- first token: eight clients at once over HTTP, and the same eight prompts given at once to an engine in this process.
  The server's own addition is the difference of the two times, each round's sorted: of the first to be served, of the
  second, and so on.
- load: the mix of :mod:`gossamer.benchmarks._serve_mix`, then schemathesis on /openapi.json. Memory is compared after
  a fifth of the mix and at the end, each time when the server is idle.
- schemas: fifty bounded schemas, ten answers each, checked by a validator of its own. The time that a grammar adds to
  a token is measured by writing those answers once more here, against scores of the model's size.
- crowd: more clients than there are slots and places in the queue; then eight that leave in the middle of long answers.

Parts are kept in the cache under a hash of the sources that they measure, so that an interrupted run goes on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.benchmarks._serve_client import Reply, Server, at_once, post, send, served
from gossamer.benchmarks._serve_load import crowd, load
from gossamer.benchmarks._serve_mix import CHAT, TEXT, WORDS, schema_format
from gossamer.benchmarks._serve_schemas import PROMPTS, SCHEMAS
from gossamer.core.errors import MissingExtra
from gossamer.core.paths import atomic_dir, cache_dir, write_json
from gossamer.core.registry import PACKAGE

BATCH, THREADS, SMALL = 8, 2, "llama-7m"
LIMIT = 30.0  # seconds of a request of the crowd
FULL = {"rounds": 7, "tokens": 96, "bursts": 60, "requests": 10_000, "examples": 150, "answers": 10, "schemas": 50,
        "clients": 64, "seconds": 600.0}  # fmt: skip
QUICK = {"rounds": 1, "tokens": 16, "bursts": 3, "requests": 120, "examples": 1, "answers": 1, "schemas": 8,
         "clients": 16, "seconds": 4.0}  # fmt: skip
OPENINGS = (
    "The old lighthouse at the end of the bay had not been lit for many years, and",
    "When the train came out of the tunnel, the whole valley lay below them:",
    "To bake a good loaf of bread, you first have to",
    "The history of the town begins with a small harbour, where",
    "def merge_sorted(left, right):\n",
    "She opened the letter slowly, because",
    "In the north of the country the winters are long. People there",
    "The committee met on Monday to discuss",
)


def run(quick: bool, log: Callable[[str], None]) -> dict[str, Any]:
    """Tables, targets, and what each part found; ``quick``: all of it small, and on the nursery model."""
    plan: dict[str, Any] = QUICK if quick else FULL
    model = SMALL if quick else str(_packed(log))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "batch": lambda: _with(model, (), lambda s: batch(s, plan["rounds"], plan["tokens"])),
        "first token": lambda: _with(model, (), lambda s: first_token(s, model, plan["bursts"])),
        "load": lambda: _with(SMALL, (), lambda s: load(s, plan["requests"], plan["examples"])),
        "schemas": lambda: _with(model, (), lambda s: schemas(s, model, plan["schemas"], plan["answers"])),
        "crowd": lambda: _with(
            model,
            ("--queue", "40", "--seconds", str(LIMIT)),
            lambda s: crowd(s, plan["clients"], plan["seconds"], LIMIT),
        ),
    }
    found = {}
    for name, make in parts.items():
        found[name] = make() if quick else _kept(name, make, log)
        log(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found[name]["rows"][-1].items()))
    return {
        "tables": [{"title": name, "rows": part["rows"]} for name, part in found.items()],
        "targets": targets(found),
        "parts": found,
        "notes": [f"load: {SMALL}; the rest: {'the same' if quick else 'gemma-3-270m, 8 bits in groups of 32'}"],
    }


def targets(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of a server beside what the parts found."""
    first, loaded, answers, people = (found[name] for name in ("first token", "load", "schemas", "crowd"))
    lines = [
        ("tokens/s of eight answers at once over one", found["batch"]["ratio"], ">=", 3.0),
        ("ms that the server adds to the first token, median", first["added_ms"]["median"], "<", 15.0),
        ("the same, 99th percentile", first["added_ms"]["p99"], "<", 50.0),
        ("load: requests and drawn cases", loaded["count"], ">=", 10_000),
        ("load: answers that were not right, or none", loaded["wrong"], "<=", 0),
        ("load: checks of schemathesis that failed", loaded["failed_checks"], "<=", 0),
        ("load: slots and places in the queue that stayed taken", loaded["stuck"], "<=", 0),
        ("load: growth of resident memory after warming up", loaded["growth"], "<=", 0.05),
        ("schemas: share of valid answers", answers["valid_share"], ">=", 1.0),
        ("schemas: ms that a grammar adds to a token", answers["added_ms"]["mean"], "<", 1.0),
        ("crowd: requests neither answered nor refused in time", people["lost"], "<=", 0),
        ("crowd: slots and places in the queue that stayed taken", people["stuck"], "<=", 0),
        ("seconds until the slots of eight clients that left were free", people["freed_s"], "<", 1.0),
    ]
    holds = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "<": lambda a, b: a < b}
    return [
        {"text": text, "value": round(value, 4), "target": f"{sign} {bound}", "met": bool(holds[sign](value, bound))}
        for text, value, sign, bound in lines
    ]


def batch(server: Server, rounds: int, tokens: int) -> dict[str, Any]:
    """Tokens/s of greedy answers, one and eight at once; the first round of each warms up."""
    speeds: dict[int, list[float]] = {1: [], BATCH: []}
    for number in range(rounds + 1):
        for size in list(speeds)[:: 1 if number % 2 else -1]:
            # no two prompts alike, or the server would remember them
            texts = [f"{number}.{size}. {OPENINGS[(number + place) % BATCH]}" for place in range(size)]
            body = {"model": server.model, "max_tokens": tokens, "temperature": 0}
            began = time.perf_counter()
            replies = at_once([functools.partial(send, server, post(TEXT, {**body, "prompt": text})) for text in texts])
            seconds = time.perf_counter() - began
            if number:
                speeds[size].append(sum(_good(reply).usage["completion_tokens"] for reply in replies) / seconds)
    ratio = statistics.median(many / one for one, many in zip(speeds[1], speeds[BATCH], strict=True))
    rows = [{"answers at once": size, "tokens_per_s": round(statistics.median(s), 1)} for size, s in speeds.items()]
    return {"ratio": ratio, "tokens_per_s": speeds, "rows": rows}


def first_token(server: Server, model: str, bursts: int) -> dict[str, Any]:
    """Seconds to the first piece of answers of eight tokens, over HTTP and from an engine in this process."""
    from gossamer.core.bundle import Bundle
    from gossamer.serving.engine import Engine

    loaded, tokenizer = _loaded(model)
    arms: dict[str, list[list[float]]] = {"server": [], "engine": []}
    threads, draw = torch.get_num_threads(), random.Random(0)
    torch.set_num_threads(THREADS)
    engine = Engine(Bundle(loaded, tokenizer), "engine")
    try:
        for number in range(bursts + 2):
            texts = [" ".join(draw.choices(WORDS, k=32)) for _ in range(BATCH)]
            ids = [tokenizer(text)["input_ids"] for text in texts]
            turns: list[tuple[str, Callable[[], list[float]]]] = [
                ("server", functools.partial(_server_first, server, texts)),
                ("engine", functools.partial(_engine_first, engine, ids)),
            ]
            for name, times in turns[:: 1 if number % 2 else -1]:
                found = sorted(times())
                if number > 1:
                    arms[name].append(found)
    finally:
        engine.stop(at_once=True)
        torch.set_num_threads(threads)
    added = [
        1000 * (a - b) for pair in zip(arms["server"], arms["engine"], strict=True) for a, b in zip(*pair, strict=True)
    ]
    rows = [
        {"arm": name, **_quantiles([1000 * t for burst in times for t in burst], "ms to first token")}
        for name, times in arms.items()
    ]
    return {
        "added_ms": _quantiles(added),
        "seconds": arms,
        "rows": [*rows, {"arm": "added by the server", **_quantiles(added, "ms to first token")}],
    }


def schemas(server: Server, model: str, count: int, answers: int) -> dict[str, Any]:
    """Answers under ``count`` schemas, ``answers`` each, greedy and sampled; how many are valid."""
    jobs = [(number, turn) for turn in range(answers) for number in range(count)]
    bodies = [
        {
            "model": server.model,
            "messages": [{"role": "user", "content": PROMPTS[(number + turn) % len(PROMPTS)]}],
            "temperature": 0 if turn % 2 else 0.8,
            "seed": turn,
            "response_format": schema_format(SCHEMAS[number]),
        }
        for number, turn in jobs
    ]
    began = time.perf_counter()
    replies = at_once([functools.partial(send, server, post(CHAT, body)) for body in bodies], BATCH)
    seconds = time.perf_counter() - began
    valid = [_valid(SCHEMAS[number], reply) for (number, _), reply in zip(jobs, replies, strict=True)]
    bad = [{"schema": SCHEMAS[job[0]], "text": r.text, "finish": r.finish, "error": r.error}
           for job, r, good in zip(jobs, replies, valid, strict=True) if not good]  # fmt: skip
    texts: dict[int, list[str]] = {}
    for (number, _), reply in zip(jobs, replies, strict=True):
        texts.setdefault(number, []).append(reply.text)
    added = _quantiles(grammar_times(model, texts))
    share, tokens = sum(valid) / len(valid), sum(reply.usage.get("completion_tokens", 0) for reply in replies)
    rows = [{"answers": len(jobs), "schemas": count, "valid": share, "tokens": tokens,
             "tokens_per_s": round(tokens / seconds, 1), "added ms, mean": added["mean"],
             "added ms, median": added["median"]}]  # fmt: skip
    return {"valid_share": share, "added_ms": added, "invalid": bad[:20], "rows": rows}


def grammar_times(model: str, texts: dict[int, list[str]]) -> list[float]:
    """Milliseconds of each token that a grammar takes, over answers by the number of their schema."""
    from gossamer.parts.generation import end_ids
    from gossamer.parts.token_constraints import GrammarProcessor, Grammars

    loaded, tokenizer = _loaded(model)
    size, times = int(loaded.config.get_text_config().vocab_size), list[float]()
    grammars, scores = Grammars(tokenizer, size, end_ids(loaded, tokenizer)), torch.zeros(1, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number, answers in texts.items():
        grammar = grammars.json_schema(SCHEMAS[number])
        for text in answers:
            ids, processor = tokenizer(text, add_special_tokens=False)["input_ids"], GrammarProcessor(grammar, 0)
            for length in range(len(ids) + 1):
                row = torch.tensor([ids[:length]], dtype=torch.long)
                began = time.perf_counter()
                processor(row, scores)
                times.append(1000 * (time.perf_counter() - began))
    torch.set_num_threads(threads)
    return times


def _with(model: str, options: Sequence[str], part: Callable[[Server], dict[str, Any]]) -> dict[str, Any]:
    with served(model, options, threads=THREADS) as server:
        return part(server)


def _good(reply: Reply) -> Reply:
    assert reply.status == 200, reply
    assert not reply.error, reply
    return reply


def _server_first(server: Server, texts: Sequence[str]) -> list[float]:
    body = {"model": server.model, "max_tokens": 8, "temperature": 0, "stream": True}
    replies = at_once([functools.partial(send, server, post(TEXT, {**body, "prompt": text})) for text in texts])
    return [_good(reply).first or 0.0 for reply in replies]


def _engine_first(engine: Any, prompts: Sequence[list[int]]) -> list[float]:
    from gossamer.serving.sampling import Sampling
    from gossamer.serving.sequences import Ask

    first: dict[int, float] = {}
    over = threading.Semaphore(0)

    def sink(number: int, piece: Any) -> None:
        if piece.text or piece.finish:
            first.setdefault(number, time.perf_counter())
        if piece.finish:
            over.release()

    began = time.perf_counter()
    for number, ids in enumerate(prompts):
        engine.submit([Ask(ids, 8, sampling=Sampling(temperature=0.0))], functools.partial(sink, number))
    for _ in prompts:
        assert over.acquire(timeout=120)
    return [moment - began for moment in first.values()]


def _valid(schema: dict[str, Any], reply: Reply) -> bool:
    try:
        import jsonschema_rs
    except ImportError as error:
        raise MissingExtra("bench serve", "bench") from error
    if reply.status != 200 or reply.finish != "stop":
        return False
    try:
        value = json.loads(reply.text)
    except ValueError:
        return False
    return bool(jsonschema_rs.validator_for(schema, validate_formats=True).is_valid(value))


def _quantiles(values: Sequence[float], name: str = "") -> dict[str, float]:
    ordered = sorted(values)
    found = {
        "mean": statistics.fmean(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }
    return {f"{name}, {key}" if name else key: round(value, 3) for key, value in found.items()}


@functools.cache
def _loaded(model: str) -> tuple[Any, Any]:
    import gossamer

    return gossamer.load(model)


def _packed(log: Callable[[str], None]) -> Path:
    """The 8-bit model of ``bench decode`` with its tokenizer, as a folder that can be served."""
    from gossamer.benchmarks import decode
    from gossamer.hub.models import load_model

    _, tokenizer = load_model(decode.MODEL, dtype="bfloat16", task="causal-lm")
    source = decode.packed_model(tokenizer, *decode.PACKED_ARMS["quality_arm"], log)
    final = cache_dir("bench", "serve") / f"{decode.MODEL}-{source.name}"
    if not final.exists():
        with atomic_dir(final) as folder:
            shutil.copytree(source, folder, dirs_exist_ok=True)
            tokenizer.save_pretrained(folder)
    return final


def _kept(name: str, make: Callable[[], dict[str, Any]], log: Callable[[str], None]) -> dict[str, Any]:
    """What a part found, from the cache where these sources were measured before."""
    path = cache_dir("bench", "serve") / f"{name.replace(' ', '-')}-{_sources()}.json"
    if path.exists():
        log(f"{name}: measured before")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    log(f"{name} ...")
    found = make()
    write_json(path, found)
    return found


def _sources() -> str:
    folders = ("serving", "parts", "kinds", "benchmarks")
    files = itertools.chain.from_iterable(sorted((PACKAGE / folder).glob("*.[pc]*")) for folder in folders)
    digest = hashlib.sha256(json.dumps(FULL, sort_keys=True).encode())
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
