"""The registry is the folder tree."""

from __future__ import annotations

import json

import pytest

from gossamer.core import facts, registry
from gossamer.core.errors import OptionError
from gossamer.core.kinds import KINDS


def test_every_folder_of_a_kind_is_read():
    for kind in KINDS:
        folder = registry.PACKAGE / kind
        files = {p.stem for p in folder.glob("*.py") if p.stem != "__init__"} if folder.exists() else set()
        folders = {p.parent.name for p in folder.glob("*/__init__.py")} if folder.exists() else set()
        assert {entry.name for entry in registry.systems().values() if entry.kind == kind} == files | folders


def test_the_remembered_entries_equal_the_read_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    registry.refresh()
    first = dict(registry.systems())
    registry.refresh()
    assert dict(registry.systems()) == first
    (tmp_path / "registry.json").write_text("{") if (tmp_path / "registry.json").exists() else None
    registry.refresh()
    assert dict(registry.systems()) == first
    monkeypatch.undo()
    registry.refresh()


def test_cards_name_known_facts_only():
    for entry in (*registry.systems().values(), *registry.steps().values()):
        card = entry.card
        named = [fact for group in (card.requires, card.provides, card.removes, card.forbids) for fact in group]
        for fact in named:
            assert set(fact.split("|")) <= set(facts.FACTS), entry.name


def test_unknown_names_are_met_with_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'mos'"):
        registry.find("moss")
    with pytest.raises(OptionError, match="name one of the guards"):
        registry.find("mos", kind="guards")


def test_entries_are_plain_data():
    import dataclasses

    for entry in registry.systems().values():
        json.dumps(dataclasses.asdict(entry))
