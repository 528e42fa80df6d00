"""Registration happens whatever is imported first, and loads nothing on its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

PEFT = """
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as table
found = "MOS" in {str(getattr(key, "value", key)) for key in table}
"""
QUANTISERS = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
from gossamer.core.registry import systems
cards = [entry.card for entry in systems().values()]
names = [r.split(":")[1] for card in cards for r in card.registers if r.startswith("quantizer:")]
found = bool(names) and all(name in table for name in names)
"""
CHECKS = {"peft": PEFT, "transformers.modeling_utils": QUANTISERS}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("library", CHECKS)
@pytest.mark.parametrize("first", ["gossamer", "library"])
def test_both_import_orders(library, first):
    orders = {"gossamer": f"import gossamer, {library}", "library": f"import {library}, gossamer"}
    assert python(f"{orders[first]}\n{CHECKS[library]}\nprint(found)") == "True"


def test_importing_gossamer_loads_no_library():
    heavy = python("import sys, gossamer; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert heavy == "[]"


@pytest.mark.parametrize("module", ["gossamer.parts.tuners", "gossamer.parts.quant_format", "gossamer.adapters.mos"])
def test_a_module_of_gossamer_may_be_what_imports_the_library(module):
    assert python(f"import {module}\nimport peft\n{PEFT}\nprint(found)") == "True"


@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel"])
def test_a_model_class_may_be_the_first_thing_that_is_imported(name):
    """Its module imports the Auto classes while it is half done; architectures register when it is whole."""
    code = f"import gossamer\nfrom transformers import {name}, CONFIG_MAPPING\nprint('vlog' in CONFIG_MAPPING)"
    assert python(code) == "True"
