"""Both clients, driven in the same way; the one in JavaScript in Node and in Chromium.

A driver follows topics with a collection of messages and with a loop over the changes, and reports what happens:
`["status", status]`, `["token", fresh]`, `["ready"]`, `["change", kind, content]`, `["ended", code]`, and so on.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from playwright.async_api import Page, Route
from rowcast_client import Channel, Collection, ConnectionStopped, Rowcast, TopicEnded

from tests.support.browser import browser_page
from tests.support.node import running_script

LANGUAGES = ("python", "javascript", "chromium")
BUFFER = 10_000
SCRIPT = Path(__file__).with_name("driver.mjs")
PAGE = {
    "/rowcast.js": Path(__file__).parents[2] / "clients/javascript/rowcast.js",
    "/driver.js": SCRIPT.with_name("driver.js"),
    "/cases.js": SCRIPT.with_name("cases.js"),
}
Tokens = Sequence[str] | Callable[[], Sequence[str]]
"""What a client shows, the last of them again and again; or what issues them once it can connect."""

DRIVE = """async ([url, tokens, buffer]) => {
  const [{ Rowcast }, { drive }] = await Promise.all([import("/rowcast.js"), import("/driver.js")]);
  globalThis.driver = drive(Rowcast, url, tokens, buffer, (...values) => report(values));
}"""


class Driver(Protocol):
    """`follow TOPIC [SNAPSHOT]`, `rows TOPIC`, `hold` and `go`: the loop waits after each change until `go`.

    `channel TOPIC DATA` is present, and reports `["signal", name, data]` and `["present", users]`; `signal TOPIC NAME
    DATA` sends one.
    """

    async def say(self, *values: Any) -> None: ...

    async def receive(self) -> Any: ...


class PythonDriver:
    """The Python client, in this process."""

    def __init__(self, url: str, tokens: Sequence[str], buffer: int) -> None:
        self._tokens = list(tokens)
        self._buffer = buffer
        self._said: asyncio.Queue[list[Any]] = asyncio.Queue()
        self._collections: dict[str, Collection] = {}
        self._channels: dict[str, Channel] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._gate = asyncio.Event()
        self._gate.set()
        self.rowcast = Rowcast(url, token=self._token)
        for name in ("status", "reset", "revoked"):
            self.rowcast.on(name, partial(self._report_event, name))

    def _report(self, *values: Any) -> None:
        self._said.put_nowait(list(values))

    def _report_event(self, name: str, value: Any) -> None:
        self._report(name, value["topic"] if isinstance(value, dict) else value)

    def _report_ready(self, collection: Collection) -> None:
        if collection.ready:
            self._report("ready")

    async def _token(self, *, fresh: bool) -> str:
        self._report("token", fresh)
        return self._tokens.pop(0) if len(self._tokens) > 1 else self._tokens[0]

    async def say(self, *values: Any) -> None:
        match values:
            case "follow", topic, *more:
                snapshot, asked = [*more, None, None][:2]
                collection = self.rowcast.collection(topic, table="messages", snapshot=snapshot, **(asked or {}))
                self._collections[topic] = collection
                collection.subscribe(partial(self._report_ready, collection))
                self._tasks.add(asyncio.create_task(self._loop(topic, asked or {})))
            case "channel", topic, data:
                channel = self._channels[topic] = self.rowcast.channel(topic, presence=data)
                channel.on("signal", lambda signal: self._report("signal", signal["name"], signal["data"]))
                channel.on("presence", lambda people: self._report("present", sorted(people)))
            case "signal", topic, name, data:
                self._channels[topic].signal(name, data)
            case "rows", topic:
                self._report("rows", [row["content"] for row in self._collections[topic].rows])
            case ("hold",):
                self._gate.clear()
            case ("go",):
                self._gate.set()

    async def receive(self) -> Any:
        return await self._said.get()

    async def _loop(self, topic: str, asked: dict[str, Any]) -> None:
        try:
            async for change in self.rowcast.changes(topic, buffer=self._buffer, **asked):
                what = change.get("record", {}).get("content", change.get("reason"))
                self._report("change", change["kind"], what)
                await self._gate.wait()
            self._report("ended", None)
        except (TopicEnded, ConnectionStopped) as error:
            self._report("ended", error.code)


class ChromiumDriver:
    """The JavaScript client in a page of a browser."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._said: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def begin(self, url: str, tokens: Sequence[str], buffer: int) -> None:
        await self._page.expose_function("report", self._said.put_nowait)
        await self._page.evaluate(DRIVE, [url, list(tokens), buffer])

    async def say(self, *values: Any) -> None:
        await self._page.evaluate("(values) => driver.say(values)", list(values))

    async def receive(self) -> Any:
        return await self._said.get()


@asynccontextmanager
async def client_page(url: str) -> AsyncIterator[Page]:
    """A page of this server that can import the client and what drives it."""
    async with browser_page() as (page, _):

        async def serve(route: Route) -> None:
            path = PAGE[urlsplit(route.request.url).path]
            await route.fulfill(path=path, content_type="text/javascript")

        for path in PAGE:
            await page.route(f"**{path}", serve)
        await page.goto(url)
        yield page


def issued(tokens: Tokens) -> Sequence[str]:
    return tokens() if callable(tokens) else tokens


@asynccontextmanager
async def driven(language: str, url: str, tokens: Tokens, buffer: int = BUFFER) -> AsyncIterator[Driver]:
    """A client of this language that has begun to connect, closed at the end."""
    if language == "javascript":
        async with running_script(SCRIPT, url, str(buffer)) as script:
            assert ["started"] == await script.receive()
            await script.say(*issued(tokens))
            yield script
    elif language == "chromium":
        async with client_page(f"http://{urlsplit(url).netloc}/healthz") as page:
            chromium = ChromiumDriver(page)
            await chromium.begin(url, issued(tokens), buffer)
            yield chromium
    else:
        python = PythonDriver(url, issued(tokens), buffer)
        async with python.rowcast:
            yield python


async def until(driver: Driver, *values: Any) -> list[list[Any]]:
    """What the driver reports up to and including this."""
    received = [await driver.receive()]
    while received[-1] != list(values):
        received.append(await driver.receive())
    return received


def contents(received: list[list[Any]]) -> list[Any]:
    """The contents of the changes among the reports."""
    return [values[2] for values in received if values[0] == "change"]
