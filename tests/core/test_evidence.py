"""Evidence goes stale with the code, and not with its comments."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gossamer.core import evidence, registry


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "PACKAGE", tmp_path)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tool.py").write_text("from gossamer.parts import deep\nX = 1\n")
    (tmp_path / "parts" / "deep.py").write_text("Y = 1\n")
    (tmp_path / "adapters").mkdir()
    system = tmp_path / "adapters" / "thing.py"
    system.write_text('"""Thing."""\nfrom gossamer.parts.tool import X\n\ndef f(x):\n    return x + X\n')
    return dataclasses.replace(registry.find("mos"), name="thing", path=str(system))


def record(entry, shown=True):
    path = evidence.evidence_path(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    hashes = {"code_hash": evidence.code_hash(entry), "parts_hash": evidence.parts_hash(entry)}
    path.write_text(json.dumps({**hashes, "shown": shown, "date": "2026-01-01", "device": "cpu"}))


def touch(path, text):
    import os

    stat = path.stat()
    path.write_text(text)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_statuses(entry, tmp_path):
    system = tmp_path / "adapters" / "thing.py"
    original = system.read_text()
    assert evidence.status(entry)["status"] == "none"
    record(entry)
    assert evidence.status(entry) == {"status": "shown", "date": "2026-01-01", "device": "cpu"}
    record(entry, shown=False)
    assert evidence.status(entry)["status"] == "not_shown"
    touch(system, original.replace("return x + X", "return x + X  # a comment"))
    assert evidence.status(entry)["status"] == "not_shown"
    touch(tmp_path / "parts" / "deep.py", "Y = 2\n")
    assert evidence.status(entry)["status"] == "recheck"
    touch(system, original.replace("x + X", "x - X"))
    assert evidence.status(entry)["status"] == "stale"


def test_blocks_count(entry, tmp_path):
    system = tmp_path / "adapters" / "thing.py"
    system.write_text("if a:\n    b()\n    c()\n")
    before = evidence.code_hash(entry)
    touch(system, "if a:\n    b()\nc()\n")
    assert evidence.code_hash(entry) != before
