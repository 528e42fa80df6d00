"""The result: log, dict, subtitles, and the page as a browser shows it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from gossamer.applications.narrate.result import UNKNOWN, Narration, Row, clock, key_rows

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, (os.environ.get("GOSSAMER_BROWSER"), *map(shutil.which, NAMES))), None)


def narration(clips: int = 12) -> Narration:
    said = [("cut the potato", "on the board"), ("wash the <b>cup</b>", ""), ("mix the soup", "slowly")]
    rows = [
        Row(float(k), k + 1.0, "kitchen", *said[k // 2 % 3], score=0.8 if k < 8 else 0.1, known=k < 8)
        for k in range(clips)
    ]
    frames = {}
    for number in key_rows(rows):
        stream = io.BytesIO()
        Image.new("RGB", (160, 90), (20 * number % 255, 90, 120)).save(stream, "JPEG")
        frames[number] = stream.getvalue()
    names = {"scene": "kitchen", "model": "narrator", "vocabulary": "narrator.vocab", "threshold": 0.4}
    return Narration("kitchen.mp4", float(clips), rows, frames=frames, **names)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61.5, "1:01.5"), (59.96, "1:00"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_neighbouring_rows_that_say_the_same_are_one_segment():
    parts = narration().segments()
    assert [(part.start, part.end, part.text) for part in parts] == [
        (0.0, 2.0, "cut the potato on the board"),
        (2.0, 4.0, "wash the <b>cup</b>"),
        (4.0, 6.0, "mix the soup slowly"),
        (6.0, 8.0, "cut the potato on the board"),
        (8.0, 12.0, UNKNOWN),
    ]
    assert sum(part.clips for part in parts) == 12


def test_what_is_unknown_is_never_said():
    found = narration()
    assert all(row["narration"] is None for row in found.as_dict()["rows"][8:])
    assert json.loads(json.dumps(found.as_dict()))["unknown_share"] == pytest.approx(4 / 12)
    last = found.srt().strip().split("\n\n")[-1].splitlines()
    assert last == ["5", "00:00:08,000 --> 00:00:12,000", UNKNOWN]
    assert UNKNOWN in found.lines()[-1]
    assert "nearest: " in found.lines()[-1]


def test_a_foreign_video_comes_with_what_to_do():
    assert narration(12).advice == ""
    rows = narration(40)
    assert "gossamer vocab add" in rows.advice
    assert "80% of 40 clips" in rows.advice


def test_key_frames_are_thinned_evenly():
    rows = [Row(float(k), k + 1.0, "", f"event {k}", "", 0.9, True) for k in range(1000)]
    chosen = key_rows(rows, 150)
    assert len(chosen) == len(set(chosen)) == 150
    assert chosen[0] == 0
    assert chosen[-1] == 999


def test_the_page_stands_alone_and_escapes(tmp_path: Path):
    page = narration().html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "wash the &lt;b&gt;cup" in page
    assert "<b>cup" not in page
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "http" not in re.sub(r'http-equiv="Content', "", page)
    assert page.count("data:image/jpeg;base64,") == 5


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this system: set GOSSAMER_BROWSER to one")
def test_in_a_browser_key_frames_are_visible_and_the_search_filters(tmp_path: Path):
    from playwright.sync_api import sync_playwright

    path = narration().html(tmp_path / "page.html")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
        page = browser.new_page()
        asked, errors = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        pictures = page.locator("#rows img")
        assert pictures.count() == 5
        for place in range(5):
            pictures.nth(place).scroll_into_view_if_needed()
            assert pictures.nth(place).is_visible()
            page.wait_for_function(f"document.querySelectorAll('#rows img')[{place}].naturalWidth > 0")
        shown = page.locator("#rows > li:visible")
        assert shown.count() == 5
        page.fill("#find", "POTATO")
        assert shown.count() == 2
        assert page.locator("#count").inner_text() == "2 of 5"
        assert page.locator(".line a.off").count() == 3
        page.fill("#find", "no such thing")
        assert shown.count() == 0
        assert page.locator("#nothing").is_visible()
        page.fill("#find", "")
        page.check("#known")
        assert shown.count() == 4
        browser.close()
    assert not errors
    assert all(url.startswith(("file:", "data:")) for url in asked)
