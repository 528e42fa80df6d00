from __future__ import annotations

import gzip
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.core.errors import InputError, OptionError
from gossamer.hub.corpora import (
    SPLITS,
    _reading,
    corpora,
    debian_packages,
    english_prose,
    foldoc,
    load_corpus,
    python_functions,
    python_source,
)

FUNCTION = '''
def {name}(values, limit):
    """{line}

    Parameters
    ----------
    values : list
        The numbers which are looked at, one after the other, from the left.
    """
    total = 0
    for {variable} in values:
        if {variable} > limit:
            total {operator} {variable} * {number}
    return total
'''
LINES = {
    "train": ("Add up the weighted values above a bound.", "weight", "+="),
    "validation": ("Subtract every large entry from an empty balance.", "entry", "-="),
    "test": ("Multiply big factors into one product, beginning with nothing.", "factor", "*="),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))


def package_in(split: str, stem: str = "pkg") -> str:
    return next(f"{stem}{n}" for n in range(1000) if _reading.split_of(f"{stem}{n}") == split)


def write_distribution(site: Path, files: dict[str, str], version: str = "1.0") -> None:
    info = site / "wares-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: wares\nVersion: {version}\n\n"
        "# Wares\n\nThis is a library of the wares that are needed for a test of the reader.\n"
    )
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


@pytest.fixture
def wares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write a distribution ``wares`` with one package a split, the only thing that the corpora read."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(str(site))
    for module in (english_prose, python_functions, python_source):
        monkeypatch.setattr(module, "_DISTRIBUTIONS", ("wares",))
    monkeypatch.setattr(english_prose, "LIGHT", ("wares",))
    monkeypatch.setattr(english_prose, "HEAVY", ())

    def make(extra: dict[str, str] | None = None, version: str = "1.0") -> None:
        files = dict(extra or {})
        for split, (line, variable, operator) in LINES.items():
            text = FUNCTION.format(name="reckon", line=line, variable=variable, operator=operator, number=3)
            files[f"{package_in(split)}/core.py"] = text
            files[f"{package_in(split)}/tests/test_core.py"] = text.replace("reckon", "in_a_test")
        write_distribution(site, files, version)

    make()
    return make


def test_names_are_found_in_the_folder_and_have_what_a_corpus_needs() -> None:
    assert {"english_prose", "foldoc", "python_functions"} <= set(corpora())
    for name in corpora():
        module = importlib.import_module(f"gossamer.hub.corpora.{name}")
        assert module.LICENCE
        assert callable(module.sources)
        assert callable(module.build)


@pytest.mark.parametrize(
    ("name", "settings", "hint"),
    [
        ("python_function", {}, "python_functions"),
        ("english_prose", {"split": "valid"}, "did you mean 'validation'"),
        ("english_prose", {"limit": 0}, "at least 1"),
    ],
)
def test_wrong_use_is_told_with_what_to_do(name: str, settings: dict[str, object], hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        load_corpus(name, **settings)  # type: ignore[arg-type]


def test_rows_hide_the_docstring_and_end_in_a_newline(wares: object) -> None:
    for split, (line, variable, _) in LINES.items():
        corpus = load_corpus("python_functions", split=split)
        (row,) = corpus.rows
        assert row["completion"] == f" {line}\n"
        assert row["prompt"].startswith("def reckon(values, limit):\n    total = 0\n")
        assert row["prompt"].endswith("return total\n\n# In one line, what this function does:\n#")
        assert '"""' not in row["prompt"]
        assert variable in row["prompt"]
        assert row["source"] == f"{package_in(split)}.core:reckon"
        assert corpus.sources == ("wares==1.0",)


def test_a_near_duplicate_across_splits_leaves_train(wares: Callable[..., None]) -> None:
    line, variable, operator = LINES["test"]
    same_body = FUNCTION.format(
        name="other", line="Gather what lies beyond the edge.", variable=variable, operator=operator, number=3
    )
    same_line = FUNCTION.format(
        name="another", line=line.replace("big", "large"), variable="stone", operator="//=", number=9
    )
    train = package_in("train", "more")
    wares({f"{train}/a.py": same_body, f"{train}/b.py": same_line})
    assert [row["completion"] for row in load_corpus("python_functions", split="test").rows] == [f" {line}\n"]
    assert {row["package"] for row in load_corpus("python_functions").rows} == {package_in("train")}


def test_the_cache_is_used_until_a_version_changes(wares: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus("python_source")
    build = python_source.build
    monkeypatch.setattr(python_source, "build", lambda: pytest.fail("built again"))
    again = load_corpus("python_source")
    assert again == first
    assert load_corpus("python_source", split="test").sha256 == first.sha256
    monkeypatch.setattr(python_source, "build", build)
    wares({f"{package_in('train', 'late')}/x.py": FUNCTION.format(
        name="extra", line="Count apples.", variable="apple", operator="|=", number=77)}, "2.0")  # fmt: skip
    assert load_corpus("python_source").sha256 != first.sha256
    assert load_corpus("python_source").sources == ("wares==2.0",)


def test_limit_is_a_seeded_sample(wares: Callable[..., None]) -> None:
    text = "\n".join(
        f"def f{n}(a):\n    '''Do {word} things.'''\n    {word} = [{word} for {word} in a if {word}]\n"
        f"    return {word}, '{word} {word} {word} {word} {word} {word} {word} {word} {word} {word}'\n"
        for n, word in enumerate(["amber", "birch", "cedar", "dune", "ember", "fern", "grove", "heath"])
    )
    wares({f"{package_in('train')}/many.py": text})
    everything = load_corpus("python_source").rows
    assert len(everything) == 9
    one = load_corpus("python_source", limit=4, seed=1).rows
    assert one == load_corpus("python_source", limit=4, seed=1).rows
    assert one != load_corpus("python_source", limit=4, seed=2).rows
    assert all(row in everything for row in one)
    assert load_corpus("python_source", limit=100).rows == everything


def test_prose_has_docstrings_and_descriptions_but_no_file_of_tests(wares: object) -> None:
    rows = [row for split in SPLITS for row in load_corpus("english_prose", split=split).rows]
    assert "This is a library of the wares that are needed for a test of the reader." in {r["text"] for r in rows}
    assert not any("test_core" in row["source"] for row in rows)
    # the same description of ``values`` stands in all three packages and is kept once
    assert sum("looked at, one after the other" in row["text"] for row in rows) == 1


def test_paragraphs_take_out_what_is_not_prose() -> None:
    text = """Return the *sorted* list of all the :class:`~pkg.Node` objects in a graph.

    Title of a section
    ------------------
    The order of the nodes is given by ``key``, which is called once for each of them.

        >>> graph.sorted()
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]

    For example::

        this is the code of an example and it is not prose at all

    ======  =====  =======
    a       b      a and b
    ======  =====  =======

    TODO: this is what has to be done in the next version of it.
    """
    assert list(english_prose.paragraphs(text)) == [
        "Return the sorted list of all the Node objects in a graph.".replace("Node", "pkg.Node"),
        "The order of the nodes is given by key, which is called once for each of them.",
        "this is what has to be done in the next version of it.",
    ]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the first matching item, e.g. a\nnumber. More is said here.", "Return the first matching item, e.g. a number."),  # noqa: E501
        ("Find the item", None),
        ("Deprecated since version two of this.", None),
        ("Return the value of total * 2 + 1 - x / y ** (3 % z).", None),
        ("Parse the input.\n\n:param x: unused", "Parse the input."),
        (">>> find_item(3)", None),
        ("See the other function for this.", None),
        ("Rückgabe der ersten Zahl in der Liste.", None),
    ],
)  # fmt: skip
def test_summary_is_a_real_sentence_or_none(docstring: str, expected: str | None) -> None:
    bare = "def find_item(items, wanted):\n    for item in items:\n        if item == wanted:\n            return item"
    function = _reading.Function("p", "p.m:find_item", "", bare, docstring, size=30)
    assert python_functions.summary(function) == expected


def test_near_duplicates_agree_with_all_pairs() -> None:
    rng = random.Random(0)
    items = [frozenset(rng.sample("abcdefghij", rng.randint(2, 8))) for _ in range(200)]
    kept: list[frozenset[str]] = []
    expected = set()
    for number, item in enumerate(items):
        if any(len(item & other) >= 0.6 * len(item | other) for other in kept):
            expected.add(number)
        else:
            kept.append(item)
    assert 0 < len(expected) < 200
    assert _reading.near_duplicates(items, 0.6) == expected


def test_every_split_has_standard_and_other_packages() -> None:
    standard = {_reading.split_of(name) for name in sys.stdlib_module_names}
    others = {_reading.split_of(name.lower().replace("pillow", "PIL")) for name in _reading.LIGHT}
    assert standard == others == set(SPLITS)
    assert {_reading.split_of(name) for name in _reading.HEAVY} == {"train"}


def test_an_absent_distribution_is_recorded() -> None:
    assert _reading.versions(["no-such-thing"]) == ("no-such-thing==absent",)
    assert list(_reading.modules(["no-such-thing"])) == []


def encoded(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    text = digits[number % 64]
    while number := number // 64:
        text = digits[number % 64] + text
    return text


def test_foldoc_entries_tags_links_and_redirects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldoc, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="apt-get install dict-foldoc"):
        load_corpus("foldoc")
    entries = {"00-database-info": "00-database-info\n   About this file.\n"}
    entries["token ring"] = (
        "token ring\n\n   <networking, hardware> A {local area\n   network} in which a token\n   goes.\n\n   More.\n"
    )
    entries |= {f"term {n}": f"term {n}\n\n   {{token ring}}\n" for n in range(3)}
    entries |= {f"word {n}": f"word {n}\n\n   1. <jargon> Meaning number {n}.\n" for n in range(40)}
    data, index = b"", ""
    for word, text in entries.items():
        index += f"{word}\t{encoded(len(data))}\t{encoded(len(text))}\n"
        data += text.encode()
    (tmp_path / "foldoc.index").write_text(index + index.splitlines()[1] + "\n")
    (tmp_path / "foldoc.dict.dz").write_bytes(gzip.compress(data))
    found = {row["term"]: (split, row) for split in SPLITS for row in load_corpus("foldoc", split=split).rows}
    assert len(found) == 44
    row = found["token ring"][1]
    assert row["tags"] == ["networking", "hardware"]
    assert row["links"] == ["local area network"]
    assert row["text"] == "A local area network in which a token goes.\nMore."
    assert found["word 3"][1]["tags"] == ["jargon"]
    assert {found[f"term {n}"][0] for n in range(3)} == {found["token ring"][0]}


def test_debian_index_sections_masks_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_packages, "FOLDER", tmp_path)
    with pytest.raises(InputError, match="apt-get update"):
        load_corpus("debian_packages")
    stanzas = [
        "Package: libfrob-dev\nSource: frob (1.2)\nSection: contrib/libdevel\nTag: a::b,\n c::d\n"
        "Description: Frob library: headers\nDescription-md5: 0",
        "Package: frob-tools\nSource: frob\nSection: utils\nDescription: tools for the frob format",
        "Package: broken\nSection: utils",
        *(f"Package: p{n}\nSection: net\nDescription: number {n}" for n in range(40)),
    ]
    text = "\n\n".join(stanzas) + "\n"
    (tmp_path / "host_dists_x_main_binary-amd64_Packages").write_text(text)
    (tmp_path / "host_dists_x-security_main_binary-amd64_Packages").write_text("Package: never\n")
    (tmp_path / "host_dists_y_main_binary-amd64_Packages.gz").write_bytes(gzip.compress(text.encode()))
    found = {r["name"]: (split, r) for split in SPLITS for r in load_corpus("debian_packages", split=split).rows}
    assert len(found) == 42
    assert found["libfrob-dev"][1]["section"] == "libdevel"
    assert found["frob-tools"][1]["text"] == "_ for the _ format"
    assert found["frob-tools"][1]["description"] == "tools for the frob format"
    assert found["libfrob-dev"][0] == found["frob-tools"][0]
