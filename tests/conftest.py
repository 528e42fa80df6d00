"""What tests of several areas share: a real small model's folder and rows."""

from __future__ import annotations

import json
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory):
    """Forty prompt and completion rows as JSON lines."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    verbs = ("open", "close", "read", "write", "copy", "move", "sort", "count", "join", "split")
    things = ("file", "list", "table", "string")
    rows = [
        {
            "prompt": f"def {verb}_{thing}(x):\n    ...\n# In one line:",
            "completion": f" {verb.title()} the {thing} x.\n",
        }
        for verb in verbs
        for thing in things
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
