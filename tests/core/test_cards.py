"""What is read from the source of a system or step is what its class has once imported."""

from __future__ import annotations

import importlib

import pytest

from gossamer.core import registry
from gossamer.core.card import Entry

ENTRIES = [*registry.systems().values(), *registry.steps().values()]


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_card_and_options_are_those_of_the_class(entry: Entry) -> None:
    module = importlib.import_module(entry.module)
    cls = entry.load()
    assert entry.card == module.CARD
    assert entry.options == cls.config_class.specs
    assert entry.doc == (module.__doc__ or "").strip()
    assert cls.__module__ == entry.module


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_defaults_pass_their_own_checks(entry: Entry) -> None:
    for spec in entry.options:
        assert spec.system is not None or spec.check(spec.default, entry.name) == spec.default
