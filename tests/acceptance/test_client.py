"""web/rowcast-client.js by itself, in a real browser, in front of a server that the test plays."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page

from daemon.files import folder
from tests.support.browser import Line, Stage, browser_page

CREATE = """async () => {
  const { RowcastClient } = await import("/rowcast-client.js");
  globalThis.client = new RowcastClient("ws://rowcast.test/v1", {
    token: async () => "a token",
    on: {
      changes: (topic, changes, _, repeated) => record(["changes", topic, changes.map(({ seq }) => seq), repeated]),
      reset: (topic, reason) => record(["reset", topic, reason]),
      removed: (topic, reason) => record(["removed", topic, reason]),
      state: ({ name }) => name === "live" && record(["live", String(client.position)]),
    },
  });
}"""


class Client:
    """A client in a page, and its callbacks in order."""

    def __init__(self, page: Page) -> None:
        self._page = page
        self._events: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def create(self) -> None:
        await self._page.expose_function("record", self._events.put_nowait)
        await self._page.evaluate(CREATE)

    async def run(self, statement: str) -> None:
        await self._page.evaluate(f"() => {{ {statement} }}")

    async def event(self) -> list[Any]:
        return await self._events.get()


@pytest.fixture
async def page() -> AsyncIterator[Page]:
    async with browser_page() as (page, complaints):
        yield page
        assert [] == complaints


@pytest.fixture
async def stage(page: Page) -> Stage:
    stage = Stage(page, folder("web"), {})
    await stage.visit("/empty")
    return stage


@pytest.fixture
async def client(page: Page, stage: Stage) -> Client:
    client = Client(page)
    await client.create()
    return client


async def live(client: Client, stage: Stage, topic: str = "a") -> Line:
    """The client's first connection, on which it follows one topic from e:10 on."""
    await client.run(f"client.subscribe('{topic}'); client.connect();")
    line = await stage.line()
    await line.welcome("e:10")
    asked = await line.grant(topic)
    assert "since" not in asked[0]
    line.subscribed(asked, "e:10")
    assert ["live", "e:10"] == await client.event()
    return line


def row(seq: int) -> dict[str, Any]:
    return {"seq": seq, "table": "rows", "key": {"id": seq}, "record": {"id": seq}}


async def test_a_topic_that_is_added_later_starts_at_the_clients_position(client: Client, stage: Stage) -> None:
    line = await live(client, stage)
    line.change("a", row(15), prev="e:10")
    assert ["changes", "a", [15], 0] == await client.event()
    await client.run("client.subscribe('b')")
    asked = await line.grant("b")
    assert "e:15" == asked[0]["since"]
    line.subscribed(asked, "e:15")
    line.say("resumed", pos="e:20", replayed=0)
    line.change("b", row(21), prev="e:20")
    assert ["changes", "b", [21], 0] == await client.event()


async def test_the_hello_says_how_far_a_topic_was_ahead_of_the_position(client: Client, stage: Stage) -> None:
    line = await live(client, stage)
    await client.run("client.subscribe('b')")
    line.subscribed(await line.grant("b"), "e:10")
    line.change("a", row(15), prev="e:10")  # while b is being replayed
    assert ["changes", "a", [15], 0] == await client.event()
    await line.close(1012)
    line = await stage.line()
    hello = await line.welcome("e:16")
    assert ("e:10", "e:15") == (hello["since"], hello["seen"])
    asked = await line.grant("a", "b")
    assert [False, False] == ["since" in frame for frame in asked]
    line.subscribed(asked, "e:10")
    line.change("a", row(15), row(16), prev="e:10")
    assert ["changes", "a", [16], 1] == await client.event()
    line.say("resumed", pos="e:16", replayed=2)
    assert ["live", "e:16"] == await client.event()


async def test_a_topic_that_is_revoked_or_refused_is_not_requested_again(client: Client, stage: Stage) -> None:
    line = await live(client, stage)
    await client.run("client.subscribe('b'); client.subscribe('c')")
    refused, granted = await line.grant("b", "c")
    line.say("error", id=refused["id"], code="no_such_topic", message="", retry=False)
    assert ["removed", "b", "no_such_topic"] == await client.event()
    line.subscribed([granted], "e:10")
    line.say("resumed", pos="e:10", replayed=0)
    line.say("revoked", topic="a", pos="e:12")
    assert ["removed", "a", "revoked"] == await client.event()
    await line.close(1012)
    line = await stage.line()
    await line.welcome("e:20")
    line.subscribed(await line.grant("c"), "e:10")
    line.say("resumed", pos="e:20", replayed=0)
    assert ["live", "e:20"] == await client.event()


async def test_a_topic_that_is_unavailable_is_requested_again(client: Client, stage: Stage) -> None:
    line = await live(client, stage)
    await client.run("client.subscribe('b')")
    asked = await line.grant("b")
    line.say("error", id=asked[0]["id"], code="unavailable", message="", retry=True)
    again = await line.grant("b")
    assert "e:10" == again[0]["since"]
    line.subscribed(again, "e:10")
    line.say("resumed", pos="e:11", replayed=0)
    line.change("b", row(12), prev="e:11")
    assert ["changes", "b", [12], 0] == await client.event()


async def test_a_reset_is_reported_and_the_topic_continues_after_it(client: Client, stage: Stage) -> None:
    line = await live(client, stage)
    line.say("reset", topic="a", reason="truncate", pos="e:30")
    assert ["reset", "a", "truncate"] == await client.event()
    line.change("a", row(31), prev="e:30")
    assert ["changes", "a", [31], 0] == await client.event()
