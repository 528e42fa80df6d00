"""Registration happens whatever is imported first, and loads nothing on its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHECKS = {
    "peft": "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as table; found = 'MOS' in {str(getattr(k, 'value', k)) for k in table}",
    "transformers.modeling_utils": (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table; "
        "from gossamer.core.registry import systems; "
        "names = [r.split(':')[1] for e in systems().values() for r in e.card.registers if r.startswith('quantizer:')]; "
        "found = bool(names) and all(name in table for name in names)"
    ),
}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("library", CHECKS)
@pytest.mark.parametrize("first", ["gossamer", "library"])
def test_both_import_orders(library, first):
    orders = {"gossamer": f"import gossamer, {library}", "library": f"import {library}, gossamer"}
    assert python(f"{orders[first]}; {CHECKS[library]}; print(found)") == "True"


def test_importing_gossamer_loads_no_library():
    heavy = python("import sys, gossamer; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])")
    assert heavy == "[]"
