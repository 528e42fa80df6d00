"""Texts of the run's own data: a few to compare models on before and after a step, more to calibrate on."""

from __future__ import annotations

from typing import Any

from gossamer.pipeline.job import Job

_PLAIN = (
    "The function returns the number of items in the list.",
    "def area(width, height):\n    return width * height\n",
)


def probe_texts(job: Job, count: int = 4) -> list[str]:
    """Held-out rows as plain text, or two fixed texts where the recipe has no data."""
    if job.recipe.data is None:
        return list(_PLAIN)
    return [row_text(row) for row in job.data["validation"][:count]]


def calibration_batches(job: Job, tokenizer: Any, *, count: int = 128, length: int = 256) -> list[dict[str, Any]]:
    """The first training rows as batches of one text of at most ``length`` tokens, without padding."""
    found = []
    for row in job.data["train"][:count]:
        batch = tokenizer(row_text(row), truncation=True, max_length=length, return_tensors="pt")
        found.append({"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    return found


def row_text(row: dict[str, object]) -> str:
    """A row's prompt and answer, or its text, as one string."""
    if "text" in row:
        return str(row["text"])
    if "messages" in row:
        messages = row["messages"]
        assert isinstance(messages, list)
        return "\n".join(str(message["content"]) for message in messages)
    answer = row.get("completion", row.get("chosen", ""))
    return f"{row['prompt']}{answer}"
