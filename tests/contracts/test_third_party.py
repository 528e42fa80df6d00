"""A system of another distribution is found by its entry point, listed, and stands under the same laws."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = '''"""Outer gain: the logits are multiplied by 1 + g, with one learnt number g that is zero at first."""

from __future__ import annotations

import torch
from torch import nn

from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.adapters import ModuleAdapter

CARD = Card(title="Outer gain", claim="one number trains", paper="0000.00000", year=2026, traits=("identity_at_init",))


class OuterGainConfig(Config):
    rate: float = option(1.0, "what the learnt number is multiplied by", gt=0)


class OuterGain(ModuleAdapter):
    config_class = OuterGainConfig

    def modules(self, model):
        return nn.ParameterList([torch.zeros(())])

    def hook(self, model, modules):
        return [
            model.get_output_embeddings().register_forward_hook(
                lambda module, inputs, out: out * (1 + self.config.rate * modules[0])
            )
        ]
'''


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A process that has the distribution ``gossamer-gain`` installed."""
    site = tmp_path / "site"
    info = site / "gossamer_gain-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "gossamer_gain").mkdir()
    (site / "gossamer_gain" / "__init__.py").write_text("raise ImportError('listing imports nothing')\n")
    (site / "gossamer_gain_systems").mkdir()
    (site / "gossamer_gain_systems" / "__init__.py").write_text("")
    (site / "gossamer_gain_systems" / "outer_gain.py").write_text(SOURCE, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gossamer-gain\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[gossamer.adapters]\nouter_gain = gossamer_gain_systems.outer_gain:OuterGain\n"
    )
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "GOSSAMER_CACHE": str(tmp_path / "cache")}


def test_it_is_listed_and_shown(environment: dict[str, str]) -> None:
    rows = json.loads(_run("from gossamer.cli import main; main()", environment, "list", "--json"))
    row = next(row for row in rows if row["name"] == "outer_gain")
    assert (row["kind"], row["title"], row["origin"]) == ("adapters", "Outer gain", "gossamer-gain")
    assert "one number trains" in _run("from gossamer.cli import main; main()", environment, "show", "outer_gain")


def test_it_stands_under_the_laws_and_a_recipe_takes_it(environment: dict[str, str]) -> None:
    code = (
        "from gossamer.testing import check_system\n"
        "from gossamer.core.recipe import read_recipe\n"
        "print([str(finding) for finding in check_system('outer_gain', families=['llama'])])\n"
        "print(read_recipe({'model': 'any', 'steps': [{'outer_gain': {'rate': 2}}]}).steps[0].options)\n"
    )
    assert _run(code, environment).splitlines() == ["[]", "{'rate': 2.0}"]


def _run(code: str, environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
