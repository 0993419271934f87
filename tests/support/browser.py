"""A real browser for the tests, and a websocket server that a test scripts frame by frame."""

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
from playwright.async_api import Browser, ConsoleMessage, Page, Route, WebSocketRoute, async_playwright

from daemon import files
from daemon.gateway.http import Page as HttpPage
from daemon.gateway.http import Site, json_page, script_page, static_pages

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PLACES = ("/usr/bin", "/usr/lib/chromium", "/usr/lib/chromium-browser")
NONE = "There is no Chromium here: install chromium-headless-shell or chromium (Debian: apt install chromium)."

# A browser without background traffic. It cannot create its sandbox as root.
OPTIONS = [
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
]

CUT = "WebSocket connection to"  # how Chromium reports a connection that it cannot open
NOT_FOUND = "Failed to load resource: the server responded with a status of 404"

Frame = dict[str, Any]


def find_chromium() -> Path | None:
    """The browser that is installed, if there is one."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *PLACES])
    return next((Path(found) for name in NAMES if (found := shutil.which(name, path=path))), None)


class Complaints(list[str]):
    """What a page reported: errors, refused resources, and violations of its content security policy."""

    def watch(self, page: Page) -> None:
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.append(str(error)))

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self.append(message.text)

    def but_for(self, *beginnings: str) -> list[str]:
        """Those that do not begin so."""
        return [complaint for complaint in self if not complaint.startswith(beginnings)]


@asynccontextmanager
async def running_browser() -> AsyncIterator[Browser]:
    """A browser. Skips the test where none is installed."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip(NONE)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def new_page(browser: Browser) -> AsyncIterator[tuple[Page, Complaints]]:
    """An empty page that shares nothing with other pages of the browser, and what it complains of."""
    context = await browser.new_context(viewport={"width": 1280, "height": 800})
    try:
        page = await context.new_page()
        page.set_default_timeout(60_000)
        complaints = Complaints()
        complaints.watch(page)
        yield page, complaints
    finally:
        await context.close()


@asynccontextmanager
async def browser_page() -> AsyncIterator[tuple[Page, Complaints]]:
    """An empty page in a browser of its own."""
    async with running_browser() as browser, new_page(browser) as found:
        yield found


class PageConnection:
    """One websocket that the page has opened; the test acts as the server."""

    def __init__(self, socket: WebSocketRoute) -> None:
        self._socket = socket
        self._received: asyncio.Queue[Frame] = asyncio.Queue()
        socket.on_message(lambda text: self._received.put_nowait(json.loads(text)))

    async def receive(self, op: str) -> Frame:
        """The next frame of the page, which must be of this kind."""
        frame = await self._received.get()
        assert op == frame["op"], frame
        return frame

    def send(self, op: str, **members: object) -> None:
        self._socket.send(json.dumps({"op": op, **members}))

    def change(self, topic: str, *changes: Frame, prev: str) -> None:
        """Send a frame of changes; members that a change leaves out get defaults."""
        epoch = prev.partition(":")[0]
        defaults = {"tx": "1", "at": "2026-01-10T12:00:00.123456Z", "kind": "insert"}
        whole = [defaults | change for change in changes]
        self.send("changes", topic=topic, prev=prev, pos=f"{epoch}:{changes[-1]['seq']}", changes=whole)

    async def welcome(self, pos: str, heartbeat: float = 20) -> Frame:
        """Read the page's hello and answer it; returns the hello."""
        hello = await self.receive("hello")
        chosen = {"numbers": hello["numbers"]} if "numbers" in hello else {}
        self.send("welcome", session="01J00000000000000000000000", user="ada", pos=pos, heartbeat=heartbeat, **chosen)
        return hello

    async def subscribes(self, *topics: str) -> list[Frame]:
        """Read subscribes to these topics, in this order; returns the frames, to be answered by `subscribed`."""
        requests = [await self.receive("subscribe") for _ in topics]
        assert list(topics) == [frame["topic"] for frame in requests]
        return requests

    def subscribed(self, requests: Iterable[Frame], pos: str) -> None:
        for frame in requests:
            self.send("subscribed", id=frame["id"], topic=frame["topic"], pos=pos)

    async def close(self, code: int, reason: str = "") -> None:
        await self._socket.close(code=code, reason=reason)


class ScriptedSite:
    """A web page from a folder, and every websocket that it opens, in order. Nothing goes over the network."""

    def __init__(self, page: Page, folder: Path, demo: Frame) -> None:
        self._page = page
        pages = {
            **static_pages(folder),
            "/rowcast.js": script_page(files.folder("clients/javascript") / "rowcast.js"),
        }
        self._site = Site({**pages, "/demo.json": self._demo_page})
        self._demo = demo
        self._connections: asyncio.Queue[PageConnection] = asyncio.Queue()
        self.tokens_fetched = 0

    async def open(self) -> PageConnection:
        """Open the page; its first connection."""
        await self._page.route("http://rowcast.test/**", self._answer)
        await self._page.route_web_socket(
            "ws://rowcast.test/v1", lambda socket: self._connections.put_nowait(PageConnection(socket))
        )
        await self._page.goto("http://rowcast.test/")
        return await self.connection()

    async def connection(self) -> PageConnection:
        """The next connection that the page opens."""
        return await self._connections.get()

    def _demo_page(self) -> HttpPage:
        self.tokens_fetched += 1
        return json_page(self._demo)

    async def _answer(self, route: Route) -> None:
        answer = self._site.answer(route.request.method, urlsplit(route.request.url).path)
        await route.fulfill(
            status=answer.status, body=answer.body, content_type=answer.content_type, headers=dict(answer.headers)
        )
