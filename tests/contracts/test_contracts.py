"""Every registered system under every law that applies to it, on the families of its card."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gossamer.core import registry
from gossamer.core.card import Entry
from gossamer.testing import FAMILIES, Bench, Law, check_law, laws
from gossamer.testing.bench import output

_spec = importlib.util.spec_from_file_location("waivers", Path(__file__).with_name("waivers.py"))
assert _spec is not None
assert _spec.loader is not None
_waivers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_waivers)
WAIVERS: dict[tuple[str, str], str] = _waivers.WAIVERS

CASES = [(entry, law) for entry in registry.systems().values() for law in laws() if law.applies(entry)]


@pytest.mark.parametrize(("entry", "law"), CASES, ids=[f"{entry.name}-{law.name}" for entry, law in CASES])
def test_law_holds(entry: Entry, law: Law) -> None:
    found = check_law(law, entry)
    reason = WAIVERS.get((entry.name, law.name))
    if reason is None:
        assert not found, "\n".join(map(str, found))
    else:
        assert found, f"{entry.name} keeps {law.name}: take its waiver out ({reason})"


def test_waivers_name_systems_and_laws_and_give_reasons() -> None:
    known = {(entry.name, law.name) for entry, law in CASES}
    assert set(WAIVERS) <= known
    assert all(reason.strip() for reason in WAIVERS.values())


def test_every_kind_with_a_base_class_has_laws() -> None:
    kinds = {entry.kind for entry in registry.systems().values()}
    assert kinds <= {law.kind for law in laws()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bench_models_run_and_are_fresh_copies(family: str) -> None:
    bench = Bench(family)
    model, again = bench.model(), bench.model()
    found = output(model, bench.inputs())
    assert found.isfinite().all()
    assert found.equal(output(again, bench.inputs()))
    next(model.parameters()).data.add_(1.0)
    assert found.equal(output(bench.model(), bench.inputs()))
    assert not found.equal(output(bench.model(seed=1), bench.inputs()))
