"""A real browser for the tests, and a server of frames that a test plays itself."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import ConsoleMessage, Page, Route, ViewportSize, WebSocketRoute, async_playwright

from daemon.gateway.http import Page as HttpPage
from daemon.gateway.http import Site, html_page, json_page, static_pages

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PLACES = ("/usr/bin", "/usr/lib/chromium", "/usr/lib/chromium-browser")
NONE = "There is no Chromium here: install chromium-headless-shell or chromium (Debian: apt install chromium)."

# A browser that calls nobody. As root it cannot build its sandbox.
OPTIONS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]

Frame = dict[str, Any]


def find_chromium() -> Path | None:
    """The browser that the system has."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return next((Path(found) for name in NAMES if (found := shutil.which(name, path=path))), None)


class Complaints(list[str]):
    """What a page complained of: errors, refused resources, and whatever its policy did not allow."""

    def watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.append(message.text)

    def but_for(self, *beginnings: str) -> list[str]:
        """Those that begin otherwise."""
        return [complaint for complaint in self if not complaint.startswith(beginnings)]


@asynccontextmanager
async def browser_page(viewport: ViewportSize | None = None) -> AsyncIterator[tuple[Page, Complaints]]:
    """An empty page in a browser of its own. Skips the test where no browser is installed."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(NONE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        try:
            page = await browser.new_page(viewport=viewport or {"width": 1280, "height": 800})
            page.set_default_timeout(60_000)
            complaints = Complaints()
            complaints.watch(page)
            yield page, complaints
        finally:
            await browser.close()


class Line:
    """One websocket that the page has opened: the test is the server."""

    def __init__(self, socket: WebSocketRoute) -> None:
        self._socket = socket
        self._heard: asyncio.Queue[Frame] = asyncio.Queue()
        socket.on_message(lambda text: self._heard.put_nowait(json.loads(text)))

    async def hear(self, op: str) -> Frame:
        """The next frame, which has to be of this kind."""
        frame = await self._heard.get()
        assert op == frame["op"], frame
        return frame

    def say(self, op: str, **members: object) -> None:
        self._socket.send(json.dumps({"op": op, **members}))

    def change(self, topic: str, *changes: Frame, prev: str) -> None:
        """A frame of changes; what a change does not say of itself is made up."""
        epoch = prev.partition(":")[0]
        made_up = {"tx": "1", "at": "2026-01-10T12:00:00.123456Z", "kind": "insert"}
        whole = [made_up | change for change in changes]
        self.say("changes", topic=topic, prev=prev, pos=f"{epoch}:{changes[-1]['seq']}", changes=whole)

    async def welcome(self, pos: str, heartbeat: float = 20) -> Frame:
        """Greet; the page's hello."""
        hello = await self.hear("hello")
        self.say("welcome", session="01J00000000000000000000000", user="ada", pos=pos, heartbeat=heartbeat)
        return hello

    async def grant(self, *topics: str) -> list[Frame]:
        """Answer subscribes to these topics, which come in this order, as the start of a replay; the subscribes."""
        asked = [await self.hear("subscribe") for _ in topics]
        assert list(topics) == [frame["topic"] for frame in asked]
        return asked

    def subscribed(self, asked: Iterable[Frame], pos: str) -> None:
        for frame in asked:
            self.say("subscribed", id=frame["id"], topic=frame["topic"], pos=pos)

    async def close(self, code: int, reason: str = "") -> None:
        await self._socket.close(code=code, reason=reason)


class Stage:
    """A web page from a folder, and every websocket that it opens, in order. No network is involved."""

    def __init__(self, page: Page, folder: Path, demo: Frame) -> None:
        self._page = page
        self._site = Site({**static_pages(folder), "/demo.json": self._demo_page, "/empty": html_page("")})
        self._demo = demo
        self._lines: asyncio.Queue[Line] = asyncio.Queue()
        self.tokens_fetched = 0

    async def open(self) -> Line:
        """Open the page; its first line."""
        await self.visit("/")
        return await self.line()

    async def visit(self, path: str) -> None:
        """Open a path: `/empty` is a page without content, for a test that brings its own script."""
        await self._page.route("http://rowcast.test/**", self._answer)
        await self._page.route_web_socket("ws://rowcast.test/v1", lambda socket: self._lines.put_nowait(Line(socket)))
        await self._page.goto(f"http://rowcast.test{path}")

    async def line(self) -> Line:
        """The next line that the page opens."""
        return await self._lines.get()

    def _demo_page(self) -> HttpPage:
        self.tokens_fetched += 1
        return json_page(self._demo)

    async def _answer(self, route: Route) -> None:
        answer = self._site.answer(route.request.method, urlsplit(route.request.url).path)
        await route.fulfill(
            status=answer.status, body=answer.body, content_type=answer.content_type, headers=dict(answer.headers)
        )
