"""The page against the real server: two models answer side by side, with the server's own policy and usage."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest

from gossamer.core.bundle import Bundle
from gossamer.decoding.prompt_lookup import PromptLookup
from gossamer.serving.app import build_app
from gossamer.serving.engine import Engine
from gossamer.serving.limits import Settings
from gossamer.serving.server import background
from gossamer.serving.stages import Stages
from gossamer.testing.bench import Bench

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, (os.environ.get("GOSSAMER_BROWSER"), *map(shutil.which, NAMES))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this system: set GOSSAMER_BROWSER to one")
def test_two_served_models_answer_side_by_side(bundle: Bundle) -> None:
    from playwright.sync_api import sync_playwright

    other = Bundle(Bench("llama").model(seed=1), bundle.processor)
    stages = Stages(PromptLookup(switch_off=False))
    engines = [Engine(bundle, "light", stages=stages, native="never"), Engine(other, "untouched", native="never")]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    errors: list[Any] = []
    try:
        with background(build_app(engines, Settings(token="letmein99"))) as address, sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
            page = browser.new_page()
            page.on("pageerror", lambda error: errors.append(error))
            page.goto(address)
            page.fill("#token", "letmein99")
            page.press("#token", "Enter")
            page.locator("select.model").first.wait_for()
            page.fill("#temperature", "0")
            page.fill("#most", "40")
            page.fill("#ask", "One two one two")
            page.press("#ask", "Enter")
            page.wait_for_selector("#stop:disabled")
            said = page.locator("li.assistant").all_inner_texts()
            figures = page.locator(".figures").all_inner_texts()
            page.locator("section").nth(0).get_by_label("prompt_lookup").uncheck()
            page.click("#reset")
            page.fill("#ask", "One two one two")
            page.press("#ask", "Enter")
            page.wait_for_selector("#stop:disabled")
            again = page.locator("li.assistant").all_inner_texts()
            without = page.locator(".figures").all_inner_texts()
            browser.close()
    finally:
        for engine in engines:
            engine.stop(at_once=True)
    assert errors == []
    assert [text.split("\n")[0] for text in said] == ["light", "untouched"]
    assert said[0].split("\n")[1:] != said[1].split("\n")[1:]
    assert all("tokens/s" in line for line in figures)
    assert "prompt_lookup" in figures[0]
    assert "prompt_lookup" not in figures[1] + without[0]
    assert again == said
