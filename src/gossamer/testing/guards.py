"""Laws of guards: monotone in the threshold, state refused on another model, a protected batch is judged row by row."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gossamer.core.bundle import Bundle
from gossamer.core.card import Entry
from gossamer.core.errors import UsageError
from gossamer.testing.bench import BENIGN, PROMPTS, TOXIC, Bench
from gossamer.testing.comparison import differs
from gossamer.testing.running import law
from gossamer.testing.universal import base_options, build

KEPT = ("model", "tokenizer", "rows")
QUICK = {"epochs": 8}
ITEMS = (*PROMPTS, TOXIC[0], BENIGN[1])


def subject(system: Any, bench: Bench) -> dict[str, Any]:
    return {"model": bench.model(), "tokenizer": bench.tokenizer(), "rows": bench.guard_rows()}


def outcome(system: Any, subject: dict[str, Any]) -> Any:
    system.fit(Bundle(subject["model"], subject["tokenizer"]), subject["rows"])
    return _verdicts(system)


def bad_inputs(system: Any, bench: Bench) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "judging before it is fitted", lambda: system.judge("a prompt")
    toxic = [row for row in bench.guard_rows() if row["label"] == "toxic"]
    yield "fitting on one class", lambda: system.fit(bench.bundle(), toxic)
    wrong = [{"text": "a prompt", "label": "odd"}, *bench.guard_rows()]
    yield "fitting on an unknown label", lambda: system.fit(bench.bundle(), wrong)
    system.fit(bench.bundle(), bench.guard_rows())
    yield "judging an empty prompt", lambda: system.judge("  ")
    yield "judging what is no text", lambda: system.judge(7)
    yield "protecting another model", lambda: system.protect(bench.model(seed=1))


def reloaded(system: Any, bench: Bench, folder: Path) -> tuple[Any, Any]:
    bundle = bench.bundle()
    system.fit(bundle, bench.guard_rows())
    system.save(folder)
    return _verdicts(system), _verdicts(type(system).load(folder, bundle))


@law(once=True)
def check_monotone_in_the_threshold(entry: Entry, bench: Bench) -> None:
    """The scores do not depend on the threshold, and a higher one flags no more."""
    assert any(spec.name == "threshold" for spec in entry.options), "a guard has an option `threshold`"
    base = base_options(entry, bench)
    fitted, bundle = build(entry, bench, base), bench.bundle()
    fitted.fit(bundle, bench.guard_rows())
    scores, flagged = [], []
    for threshold in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        system = build(entry, bench, base | {"threshold": threshold})
        system.state, system.fingerprint = fitted.state, fitted.fingerprint
        system.ready(bundle)
        verdicts = [system.judge(item) for item in ITEMS]
        scores.append([verdict.score for verdict in verdicts])
        flagged.append({item for item, verdict in zip(ITEMS, verdicts, strict=True) if verdict.flagged})
    assert all(row == scores[0] for row in scores), "the scores change with the threshold"
    assert all(high <= low for low, high in itertools.pairwise(flagged)), (
        f"a higher threshold flags more: {[len(items) for items in flagged]}"
    )
    assert len(flagged[0]) == len(ITEMS), "the threshold 0 does not flag everything"


@law()
def check_state_is_refused_on_another_model(entry: Entry, bench: Bench) -> None:
    """A saved state loads with the model that it was fitted on and with no other."""
    system = build(entry, bench, base_options(entry, bench))
    system.fit(bench.bundle(), bench.guard_rows())
    with tempfile.TemporaryDirectory() as folder:
        system.save(Path(folder) / "state")
        type(system).load(Path(folder) / "state", bench.bundle())
        try:
            type(system).load(Path(folder) / "state", bench.bundle(seed=1))
        except UsageError:
            return
    raise AssertionError("a state that was fitted on one model loads with another")


@law()
def check_a_protected_batch_is_judged_row_by_row(entry: Entry, bench: Bench) -> None:
    """In a padded batch every row has the score that judging its prompt gives; clear rows keep their tokens."""
    system = build(entry, bench, base_options(entry, bench))
    bundle, prompts = bench.bundle(), bench.prompts()
    system.fit(bundle, bench.guard_rows())
    judged = [system.judge(prompt).score for prompt in PROMPTS]
    plain = bundle.model.generate(**prompts, max_new_tokens=6, do_sample=False)
    protected = system.protect(bundle.model)
    out = protected.generate(**prompts, max_new_tokens=6, do_sample=False)
    verdicts = protected.gossamer_verdicts
    system.release(bundle.model)
    difference = differs(judged, [verdict.score for verdict in verdicts], atol=1e-4)
    assert not difference, f"a batch is scored otherwise than its prompts: {difference}"
    width = prompts["input_ids"].shape[1]
    for row, verdict in enumerate(verdicts):
        same = torch.equal(out[row, : plain.shape[1]], plain[row, : out.shape[1]])
        assert verdict.flagged or same, f"row {row} is clear, and its tokens change"
        assert not verdict.flagged or out[row, width:].tolist() != plain[row, width:].tolist(), f"row {row} is flagged"
    assert torch.equal(bundle.model.generate(**prompts, max_new_tokens=6, do_sample=False), plain), "release changes it"


def _verdicts(system: Any) -> list[Any]:
    found = [system.judge(item) for item in ITEMS]
    return [[verdict.label, verdict.score, dict(verdict.scores)] for verdict in found]
