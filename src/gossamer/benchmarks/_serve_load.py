"""Many requests at a server: the mix with hang-ups, cases drawn from its description, and a crowd of clients."""

from __future__ import annotations

import functools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gossamer.benchmarks._serve_client import Reply, Request, Server, at_once, post, send
from gossamer.benchmarks._serve_mix import CHAT, KINDS, TEXT, chat, mix
from gossamer.core.errors import MissingExtra

LATE = 2.0  # seconds after the limit of a request by which it must have had its answer
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def load(server: Server, requests: int, examples: int, clients: int = 16) -> dict[str, Any]:
    """``requests`` of the mix, ``examples`` drawn by schemathesis for each operation, and what stays behind.

    A fifth of the mix and half of the examples warm up: what is kept of earlier requests has a bound, and fills.
    """
    jobs = mix(requests, server.model)
    warm = len(jobs) // 5
    counts: dict[str, dict[str, int]] = {name: {} for name in KINDS}
    wrong = _send_all(server, jobs[:warm], clients, counts)
    drawn, failed = schemathesis(server, (examples + 1) // 2, seed=1) if examples else (0, [])
    stuck = _stuck(server)
    before = _memory(server)
    wrong += _send_all(server, jobs[warm:], clients, counts)
    if examples > 1:
        more, others = schemathesis(server, examples // 2, seed=2)
        drawn, failed = drawn + more, failed + others
    stuck += _stuck(server)
    after = _memory(server)
    rows = [{"requests": len(jobs), "cases drawn": drawn, "wrong": len(wrong), "failed checks": len(failed),
             "MB warm": round(before / 1e6, 1), "MB at the end": round(after / 1e6, 1)}]  # fmt: skip
    return {
        "count": len(jobs) + drawn,
        "wrong": len(wrong),
        "examples_of_wrong": wrong[:20],
        "failed_checks": len(failed),
        "examples_of_failed": failed[:20],
        "stuck": stuck,
        "growth": after / before - 1,
        "statuses": counts,
        "rows": rows,
    }


def schemathesis(server: Server, examples: int, seed: int) -> tuple[int, list[str]]:
    """How many cases were drawn from the server's own description, and what was told of checks that failed."""
    start = "from schemathesis.cli import schemathesis; schemathesis()"
    phases = "coverage,fuzzing" if examples > 10 else "fuzzing"
    options = f"--max-examples {examples} --phases {phases} --checks {CHECKS} --seed {seed} --request-timeout 120"
    options += " --no-shrink --continue-on-failure --suppress-health-check all --warnings off"
    before = server.metrics()["gossamer_requests_total"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-c", start, "run", f"{server.address}/openapi.json", *options.split()]
        command += ["--report", "junit", "--report-junit-path", str(report)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if "No module named 'schemathesis'" in done.stderr:
            raise MissingExtra("bench serve", "bench")
        cases = ElementTree.parse(report).iter("testcase") if report.exists() else ()
        failed = [
            f"{case.get('name')}: {' '.join(''.join(found.itertext()).split())[:2000]}"
            for case in cases
            for found in case
            if found.tag in ("failure", "error")
        ]
    if done.returncode and not failed:
        failed = [f"exit code {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"]
    drawn = server.metrics()["gossamer_requests_total"] - before - 1  # the question itself
    return int(drawn), failed


def crowd(server: Server, clients: int, seconds: float, limit: float) -> dict[str, Any]:
    """``clients`` that ask again as soon as they are answered, for ``seconds``; the server ends a request after
    ``limit``. Then eight that leave in the middle of an answer."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    counts, slowest = {"answered": 0, "refused": 0, "timed out": 0, "lost": 0}, 0.0
    told: list[str] = []

    def client(number: int) -> None:
        nonlocal slowest
        draw = random.Random(number)
        while time.monotonic() < end:
            body = chat(draw, server.model, {"max_tokens": draw.choice((8, 32, 64)), "stream": draw.random() < 0.5})
            reply = send(server, post(CHAT, body, wait=limit + 5))
            outcome = _outcome(reply, limit)
            with lock:
                counts[outcome] += 1
                slowest = max(slowest, reply.seconds)
                if outcome == "lost":
                    told.append(f"{reply.status} {reply.error} after {reply.seconds:.1f} s")
            if outcome == "refused":
                time.sleep(min(reply.retry_after, 2.0))

    at_once([functools.partial(client, number) for number in range(clients)])
    stuck, freed = _stuck(server), _freed(server)
    rows = [
        {
            "clients": clients,
            "seconds": seconds,
            **counts,
            "slowest s": round(slowest, 2),
            "freed in s": round(freed, 3),
        }
    ]
    return {
        **counts,
        "stuck": stuck,
        "freed_s": freed,
        "slowest_s": slowest,
        "examples_of_lost": told[:20],
        "rows": rows,
    }


def _send_all(
    server: Server, jobs: Sequence[tuple[str, Request]], clients: int, counts: dict[str, dict[str, int]]
) -> list[str]:
    """Send all, count statuses by kind, and tell of those that are not right."""
    replies = at_once([functools.partial(send, server, request) for _, request in jobs], clients)
    wrong = []
    for (name, _), reply in zip(jobs, replies, strict=True):
        right = KINDS[name].right
        counts[name][str(reply.status)] = counts[name].get(str(reply.status), 0) + 1
        if right and reply.status not in right:
            wrong.append(f"{name}: {reply.status} {reply.error}")
    return wrong


def _memory(server: Server) -> float:
    samples = []
    for _ in range(5):
        samples.append(server.resident())
        time.sleep(0.2)
    return statistics.median(samples)


def _freed(server: Server) -> float:
    """Seconds until nothing runs after eight clients have left the streams of long answers."""
    with urllib.request.urlopen(f"{server.address}/v1/models", timeout=30) as reply:
        length = json.load(reply)["data"][0]["gossamer"]["max_length"]
    body = {"model": server.model, "prompt": "The rain", "max_tokens": min(1000, length - 16), "stream": True}
    at_once([functools.partial(send, server, post(TEXT, body, hang_up=3)) for _ in range(8)])
    found = server.idle_after(10)
    return 10.0 if found is None else found


def _stuck(server: Server) -> int:
    """Answers that still run or wait though nobody asks any more."""
    if server.idle_after(10) is not None:
        return 0
    counts = server.metrics()
    return int(counts["gossamer_running"] + counts["gossamer_waiting"])


def _outcome(reply: Reply, limit: float) -> str:
    if reply.seconds > limit + LATE:
        return "lost"
    if reply.status == 429:
        return "refused"
    if reply.status == 504 or reply.code == "timeout":
        return "timed out"
    return "answered" if reply.status == 200 and reply.finish and not reply.error else "lost"
