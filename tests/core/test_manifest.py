"""The manifest of a package: every way in which a folder can differ from it is refused, and nothing is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer.core import manifest as m
from gossamer.core.errors import InputError

BASE = {"name": None, "fingerprint": "0123456789abcdef"}
CALL = {"name": "lora", "options": {}, "seed": 0}


def values(**changes: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "name": "small", "base": BASE, "adapters": [], "parts": {}, "acceleration": None, "companions": {},
        "lineage": [], "versions": {}, "licences": {}, "claims": {}, "probe": None, "files": {},
    }  # fmt: skip
    return {**empty, **changes}


def write(folder: Path, manifest: Any) -> Path:
    (folder / m.MANIFEST).write_text(manifest if isinstance(manifest, str) else json.dumps(manifest, indent=1))
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    return write(folder, m.seal(values(files=m.files_of(folder))))


def sealed_again(folder: Path, **changes: Any) -> Path:
    manifest = json.loads((folder / m.MANIFEST).read_text())
    return write(folder, m.seal({**{k: v for k, v in manifest.items() if k != "sha256"}, **changes}))


def test_a_whole_package_passes_and_is_summed_up(package: Path) -> None:
    assert m.is_package(package)
    found = m.summary(m.check_package(package))
    assert (found["files"], found["bytes"], found["base"], found["parts"]) == (2, 9, "inside", [])


def test_the_hash_does_not_depend_on_how_the_json_is_written(package: Path) -> None:
    manifest = m.read_manifest(package)
    write(package, json.dumps(dict(reversed(manifest.items())), indent=4))
    assert m.check_package(package)["sha256"] == manifest["sha256"]


def changed(folder: Path) -> None:
    (folder / "model" / "model.safetensors").write_bytes(b"weighed")  # of the same length


def shortened(folder: Path) -> None:
    (folder / "model" / "model.safetensors").write_bytes(b"")


def missing(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()


def extra(folder: Path) -> None:
    (folder / "model" / "modeling.py").write_text("import os")


def hidden(folder: Path) -> None:
    (folder / ".cache").write_text("")


def linked(folder: Path) -> None:
    (folder / "model" / "config.json").unlink()
    (folder.parent / "outside.json").write_text("{}")
    (folder / "model" / "config.json").symlink_to(folder.parent / "outside.json")


def linked_folder(folder: Path) -> None:
    (folder / "model").rename(folder.parent / "elsewhere")
    (folder / "model").symlink_to(folder.parent / "elsewhere")


def pipe(folder: Path) -> None:
    os.mkfifo(folder / "model" / "notes.txt")


def linked_manifest(folder: Path) -> None:
    (folder / m.MANIFEST).rename(folder.parent / m.MANIFEST)
    (folder / m.MANIFEST).symlink_to(folder.parent / m.MANIFEST)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (changed, "SHA-256 differs"),
        (shortened, "SHA-256 differs"),
        (missing, r"1 missing, model/config\.json first; copy"),
        (extra, r"1 more, model/modeling\.py first; remove it"),
        (hidden, r"1 more, \.cache first"),
        (linked, "must be a plain file or folder, got a symbolic link"),
        (linked_folder, "must be a plain file or folder, got a symbolic link"),
        (linked_manifest, r"must hold manifest\.json"),
        (pipe, "got a special file"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_is_not_as_it_was_written(harm: Callable[[Path], None], words: str, package: Path) -> None:
    harm(package)
    with pytest.raises(InputError, match=words):
        m.check_package(package)


@pytest.mark.parametrize(
    ("key", "value"), [("name", "other"), ("probe", {}), ("files", {}), ("added", 1), ("sha256", "0" * 64)]
)
def test_an_edited_manifest_is_noticed(key: str, value: Any, package: Path) -> None:
    manifest = m.read_manifest(package)
    write(package, {**manifest, key: value})
    with pytest.raises(InputError, match="must be as it was written, got one that was edited"):
        m.check_package(package)


@pytest.mark.parametrize("key", ["sha256", "files", "licences"])
def test_a_manifest_that_lost_a_key_is_noticed(key: str, package: Path) -> None:
    manifest = m.read_manifest(package)
    del manifest[key]
    with pytest.raises(InputError, match="got one that was edited"):
        m.read_manifest(write(package, manifest))


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_another_version_is_refused(version: Any, package: Path) -> None:
    with pytest.raises(InputError, match="must be of version 1"):
        m.read_manifest(sealed_again(package, version=version))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"format": NaN}', "NaN is no number"),
        ("[1]", "must be of the format 'gossamer-package', got list"),
        ('{"format": "zip"}', "must be of the format 'gossamer-package', got 'zip'"),
    ],
    ids=["cut", "deep", "nan", "list", "zip"],
)
def test_a_manifest_that_is_none(text: str, words: str, package: Path) -> None:
    with pytest.raises(InputError, match=words):
        m.check_package(write(package, text))


def test_bytes_that_are_no_text_are_no_manifest(package: Path) -> None:
    (package / m.MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert m.is_package(package)
    with pytest.raises(InputError, match="must be JSON"):
        m.check_package(package)


def test_an_endless_manifest_is_not_read(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m, "_LARGEST", 100)
    with pytest.raises(InputError, match="must be at most 100 bytes"):
        m.check_package(package)


@pytest.mark.parametrize(
    "path",
    [
        "../outside.json", "model/../../outside.json", "/etc/passwd.txt", "model//a.json", "model/./a.json",
        "model\\..\\a.json", "C:/model/a.json", "model/C:a.json", "config.json", "other/a.json", "model", "",
    ],
)  # fmt: skip
def test_paths_that_lead_elsewhere_are_refused(path: str, package: Path) -> None:
    (package.parent / "outside.json").write_text("{}")
    with pytest.raises(InputError, match="must lie below model, adapter, parts, companions"):
        m.check_package(sealed_again(package, files={path: {"bytes": 2, "sha256": "0" * 64}}))


@pytest.mark.parametrize("name", ["code.py", "weights.bin", "state.pt", "data.pkl", "kernel.so", "plain", "a.JSON"])
def test_code_and_pickles_have_no_place(name: str, package: Path) -> None:
    (package / "model" / name).write_bytes(b"x")
    with pytest.raises(InputError, match="a package holds no code and no pickles"):
        m.files_of(package)
    with pytest.raises(InputError, match="a package holds no code and no pickles"):
        m.check_package(sealed_again(package, files={f"model/{name}": {"bytes": 1, "sha256": "0" * 64}}))


@pytest.mark.parametrize(
    "changes",
    [
        {"base": {"name": "../elsewhere", "fingerprint": "0"}},
        {"base": {"name": "/elsewhere", "fingerprint": "0"}},
        {"base": {"name": "a/b/c", "fingerprint": "0"}},
        {"base": {"name": 3, "fingerprint": "0"}},
        {"base": {"name": None}},
        {"companions": {"../expert": BASE}},
        {"companions": {"expert": "llama-7m"}},
        {"parts": {"../guard": CALL}},
        {"parts": {"clover": {"name": "clover"}}},
        {"adapters": ["lora"]},
        {"adapters": None},
        {"lineage": {}},
        {"files": {"model/config.json": {"bytes": 2}}},
        {"files": {"model/config.json": "0"}},
    ],
    ids=json.dumps,
)
def test_a_forged_manifest_has_no_crash_in_it(changes: dict[str, Any], package: Path) -> None:
    with pytest.raises(InputError):
        m.check_package(sealed_again(package, **changes))


def test_other_folders_are_no_packages(tmp_path: Path) -> None:
    assert not m.is_package(tmp_path / "nothing")
    write(tmp_path, {"name": "a converted model"})
    assert not m.is_package(tmp_path)
    write(tmp_path, "{")
    (tmp_path / "config.json").write_text("{}")
    assert not m.is_package(tmp_path)
    with pytest.raises(InputError, match=r"must hold manifest\.json"):
        m.read_manifest(tmp_path / "nothing")
