"""Cards are read from source text: literals only, one public class."""

from __future__ import annotations

import sys

import pytest

from gossamer.core.card import read_entry
from gossamer.core.errors import InputError

SOURCE = '''"""Title line.

More.
"""
from gossamer.core.card import Card
from gossamer.core.options import Config, option
from gossamer.kinds.compression import Compression
raise RuntimeError("importing this file is an error")
CARD = Card(title="T", claim="c", traits=("budgeted",), {extra})
class TConfig(Config):
    bits: int | None = option({default}, "bits", ge=2, choices=(2, 4))
class T(Compression):
    pass
'''


def read(tmp_path, extra="year=2024", default="4", source=SOURCE):
    path = tmp_path / "t.py"
    path.write_text(source.replace("{extra}", extra).replace("{default}", default))
    return read_entry(path, name="t", kind="compression", module="t")


def test_reads_without_importing(tmp_path):
    entry = read(tmp_path)
    assert (entry.class_name, entry.summary, entry.card.year) == ("T", "Title line.", 2024)
    (bits,) = entry.options
    assert (bits.name, bits.type, bits.default, bits.ge, bits.choices) == ("bits", "int | None", 4, 2, (2, 4))
    assert "t" not in sys.modules


@pytest.mark.parametrize(
    ("extra", "default", "words"),
    [
        ("yaer=2024", "4", "yaer"),
        ("year=THIS", "4", "literal"),
        ("year=1", "DEFAULT", "literal"),
        ("year=1, traits_=()", "4", "traits_"),
    ],
)
def test_refuses_what_it_cannot_read(tmp_path, extra, default, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, extra, default)


def test_unknown_trait(tmp_path):
    with pytest.raises(InputError, match="mergable"):
        read(tmp_path, source=SOURCE.replace('"budgeted"', '"mergable"'))


def test_two_public_classes(tmp_path):
    with pytest.raises(InputError, match="one public class"):
        read(tmp_path, source=SOURCE + "\nclass U(Compression):\n    pass\n")


def test_a_file_without_card_is_no_system(tmp_path):
    assert read(tmp_path, source="x = 1\n") is None
