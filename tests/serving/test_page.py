"""The page in a browser: two answers stream side by side, with figures, stop, stages and token.

The server of these tests is a stand-in whose answers the tests hold back and let go, word by word.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import gossamer

FOLDER = Path(gossamer.__file__).parent / "serving"
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, (os.environ.get("GOSSAMER_BROWSER"), *map(shutil.which, NAMES))), None)
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
FILES = {"/": ("page.html", "text/html"), "/app.js": ("app.js", "text/javascript")}
WORDS = ("Once ", "upon ", "a ", "tïme")

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this system: set GOSSAMER_BROWSER to one")


class StandIn(http.server.ThreadingHTTPServer):
    """Speaks as much of the OpenAI API as the page asks for. ``go``: answers wait after their second word for it."""

    daemon_threads = True

    def __init__(self, models: dict[str, list[str]], token: str = "", failing: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.token, self.failing = models, token, failing
        self.go, self.asked, self.gone = threading.Event(), list[dict[str, Any]](), threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: StandIn

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path in FILES:
            name, kind = FILES[self.path]
            self.say(200, (FOLDER / name).read_bytes(), f"{kind}; charset=utf-8")
        elif self.server.token and self.headers["Authorization"] != f"Bearer {self.server.token}":
            self.say(401, {"error": {"message": "give the server's token"}})
        else:
            cards = [
                {"id": name, "gossamer": {"stages": stages, "kind": "embedding" if name == "encoder" else "generation"}}
                for name, stages in self.server.models.items()
            ]
            self.say(200, {"object": "list", "data": cards})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        if body["model"] == self.server.failing:
            self.say(429, {"error": {"message": "no slot and no place in the queue"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for number, word in enumerate(WORDS):
                if number == 2:
                    assert self.server.go.wait(20)
                self.event({"choices": [{"index": 0, "delta": {"content": f"{word}<b>" if number == 3 else word}}]})
            ms = {"clover": {"ms": 3.25}} if self.server.models[body["model"]] and "gossamer" not in body else {}
            self.event({"choices": [], "usage": {"completion_tokens": 4, "gossamer": {"stages": ms}}})
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone.set()

    def event(self, value: dict[str, Any]) -> None:
        # letters and events are cut where a network may cut them
        data = f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
        for part in (data[:-9], data[-9:]):
            self.wfile.write(part)
            self.wfile.flush()

    def say(self, status: int, value: Any, kind: str = "application/json") -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (("Content-Type", kind), ("Content-Length", str(len(data)))):
            self.send_header(name, text)
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def serve() -> Iterator[Callable[..., StandIn]]:
    started: list[StandIn] = []

    def start(*arguments: Any, **options: Any) -> StandIn:
        server = StandIn(*arguments, **options)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.go.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page whose scripts and resources must not fail."""
    page, errors = browser.new_page(), list[str]()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    yield page
    page.close()
    assert [text for text in errors if "status of 4" not in text] == []


def test_it_is_plain_html_and_one_script_of_this_server() -> None:
    html, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.html", "app.js"))
    assert re.findall(r"<script[^>]*>", html) == ['<script src="/app.js">']
    assert not re.search(r"\son[a-z]+\s*=|javascript:|\sstyle\s*=", html)
    assert re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", html) == ["data:,", "/app.js"]
    assert "://" not in html + script
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", script)
    ids = set(re.findall(r'\sid="([^"]+)"', html))
    assert set(re.findall(r'find\("([^"]+)"\)', script)) <= ids


@needs_browser
def test_two_answers_stream_side_by_side(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": ["clover"], "untouched": [], "encoder": []})
    page.goto(server.address)
    logs, figures = page.locator("ol.turns"), page.locator(".figures")
    page.fill("#ask", "Tell me a story")
    page.press("#ask", "Enter")
    for number in range(2):
        page.locator("li.assistant", has_text="upon").nth(number).wait_for()
    assert page.locator("#stop").is_enabled()
    assert logs.nth(0).bounding_box()["x"] + logs.nth(0).bounding_box()["width"] <= logs.nth(1).bounding_box()["x"]
    assert logs.nth(0).bounding_box()["y"] == logs.nth(1).bounding_box()["y"]
    server.go.set()
    page.wait_for_selector("#stop:disabled")
    for number, name in enumerate(("small", "untouched")):
        assert logs.nth(number).locator("li.assistant").inner_text() == f"{name}\nOnce upon a tïme<b>"
        assert re.search(r"[\d.]+ tokens/s · first after \d+ ms · 4 tokens", figures.nth(number).inner_text())
    assert "clover 3.3 ms" in figures.nth(0).inner_text() or "clover 3.2 ms" in figures.nth(0).inner_text()
    assert "clover" not in figures.nth(1).inner_text()
    page.fill("#ask", "Go on")
    page.click("#send")
    page.locator("li.assistant").nth(3).wait_for()
    page.wait_for_selector("#stop:disabled")
    last = next(body for body in reversed(server.asked) if body["model"] == "small")
    assert [turn["content"] for turn in last["messages"]] == ["Tell me a story", "Once upon a tïme<b>", "Go on"]
    assert last["stream_options"] == {"include_usage": True}
    page.click("#reset")
    assert page.locator("li").count() == 0


@needs_browser
def test_one_model_is_shown_beside_itself_without_its_stages(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": ["clover", "toxicdetector"]})
    server.go.set()
    page.goto(server.address)
    page.fill("#ask", "Hello")
    page.click("#send")
    page.locator("li.assistant").nth(1).wait_for()
    page.wait_for_selector("#stop:disabled")
    stages = {json.dumps(body.get("gossamer")) for body in server.asked}
    assert stages == {"null", '{"stages": {"clover": false, "toxicdetector": false}}'}
    page.locator("select.model").nth(1).select_option("")
    page.locator("section").nth(0).get_by_label("toxicdetector").uncheck()
    page.fill("#ask", "Again")
    page.click("#send")
    page.locator("li.assistant").nth(1).wait_for()
    page.wait_for_selector("#stop:disabled")
    assert len(server.asked) == 3
    assert server.asked[-1]["gossamer"] == {"stages": {"toxicdetector": False}}


@needs_browser
def test_stop_ends_the_answers_and_keeps_what_was_said(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": []})
    page.goto(server.address)
    assert page.locator("select.model").nth(1).input_value() == ""
    page.fill("#ask", "Tell me a story")
    page.click("#send")
    page.locator("li.assistant", has_text="upon").wait_for()
    page.click("#stop")
    page.wait_for_selector("#stop:disabled")
    server.go.set()
    assert server.gone.wait(5)
    page.fill("#ask", "Go on")
    page.click("#send")
    page.locator("li.assistant").nth(1).wait_for()
    page.wait_for_selector("#stop:disabled")
    assert [turn["content"] for turn in server.asked[-1]["messages"]][1] == "Once upon "


@needs_browser
def test_a_refusal_is_shown_and_leaves_the_other_alone(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": [], "full": []}, failing="full")
    server.go.set()
    page.goto(server.address)
    page.fill("#ask", "Hello")
    page.click("#send")
    page.wait_for_selector("li.wrong")
    page.wait_for_selector("#stop:disabled")
    assert "no slot and no place" in page.locator("li.wrong").inner_text()
    assert page.locator("li.assistant").count() == 1
    page.fill("#ask", "Again")
    page.click("#send")
    page.locator("li.wrong").nth(1).wait_for()
    assert [len(body["messages"]) for body in server.asked if body["model"] == "full"] == [1, 1]


@needs_browser
def test_the_token_is_asked_for_only_where_it_is_needed(serve: Callable[..., StandIn], page: Any) -> None:
    page.goto(serve({"small": []}).address)
    page.wait_for_selector("select.model")
    assert page.locator("#token").is_hidden()
    page.goto(serve({"small": []}, token="letmein99").address)
    page.wait_for_selector("#token:visible")
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.locator("#notice", has_text="give the server's token").wait_for()
    assert page.locator("select.model").count() == 0
    page.fill("#token", "letmein99")
    page.press("#token", "Enter")
    page.wait_for_selector("select.model")
    assert page.locator("#unlock").is_hidden()
    assert page.locator("#notice").is_hidden()


@needs_browser
def test_a_long_conversation_scrolls_within_its_column(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": []})
    server.go.set()
    page.goto(server.address)
    for number in range(12):
        page.fill("#ask", f"Question {number}")
        page.click("#send")
        page.locator("li.assistant").nth(number).wait_for()
        page.wait_for_selector("#stop:disabled")
    last = page.locator("li.assistant").last.bounding_box()
    assert last["y"] + last["height"] <= page.locator("footer").bounding_box()["y"]
    assert page.evaluate("document.documentElement.scrollHeight <= window.innerHeight")


@needs_browser
def test_everything_can_be_reached_and_has_a_name(serve: Callable[..., StandIn], page: Any) -> None:
    server = serve({"small": ["clover"], "untouched": []})
    page.goto(server.address)
    page.wait_for_selector("select.model")
    for field in page.locator("input:visible, select:visible, textarea:visible").all():
        assert field.evaluate("(field) => field.labels.length && field.labels[0].textContent.trim().length > 0")
    page.set_viewport_size({"width": 360, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first, second = (page.locator("section").nth(number).bounding_box() for number in range(2))
    assert second["y"] >= first["y"] + first["height"]
