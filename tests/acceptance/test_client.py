"""web/rowcast-client.js alone, in a real browser, against a server that the test scripts."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import Page

from daemon.files import folder
from tests.support.browser import PageConnection, ScriptedSite, browser_page

CREATE = """async () => {
  const { RowcastClient } = await import("/rowcast-client.js");
  globalThis.client = new RowcastClient("ws://rowcast.test/v1", {
    token: async () => "a token",
    on: {
      changes: (topic, changes, _, repeated) => record(["changes", topic, changes.map(({ seq }) => seq), repeated]),
      snapshot: (topic, table, rows) => record(["snapshot", topic, table, rows.map(({ key }) => key.id)]),
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
async def site(page: Page) -> ScriptedSite:
    site = ScriptedSite(page, folder("web"), {})
    await site.visit("/empty")
    return site


@pytest.fixture
async def client(page: Page, site: ScriptedSite) -> Client:
    client = Client(page)
    await client.create()
    return client


async def live(client: Client, site: ScriptedSite, topic: str = "a") -> PageConnection:
    """The client's first connection, on which it follows one topic from e:10 on."""
    await client.run(f"client.subscribe('{topic}'); client.connect();")
    connection = await site.connection()
    await connection.welcome("e:10")
    requests = await connection.subscribes(topic)
    assert "since" not in requests[0]
    connection.subscribed(requests, "e:10")
    assert ["live", "e:10"] == await client.event()
    return connection


def row(seq: int) -> dict[str, Any]:
    return {"seq": seq, "table": "rows", "key": {"id": seq}, "record": {"id": seq}}


async def test_a_topic_that_is_added_later_starts_at_the_clients_position(client: Client, site: ScriptedSite) -> None:
    connection = await live(client, site)
    connection.change("a", row(15), prev="e:10")
    assert ["changes", "a", [15], 0] == await client.event()
    await client.run("client.subscribe('b')")
    requests = await connection.subscribes("b")
    assert "e:15" == requests[0]["since"]
    connection.subscribed(requests, "e:15")
    connection.send("resumed", pos="e:20", replayed=0)
    connection.change("b", row(21), prev="e:20")
    assert ["changes", "b", [21], 0] == await client.event()


async def test_the_hello_says_how_far_a_topic_was_ahead_of_the_position(client: Client, site: ScriptedSite) -> None:
    connection = await live(client, site)
    await client.run("client.subscribe('b')")
    connection.subscribed(await connection.subscribes("b"), "e:10")
    connection.change("a", row(15), prev="e:10")  # while b is being replayed
    assert ["changes", "a", [15], 0] == await client.event()
    await connection.close(1012)
    connection = await site.connection()
    hello = await connection.welcome("e:16")
    assert ("e:10", "e:15") == (hello["since"], hello["seen"])
    requests = await connection.subscribes("a", "b")
    assert [False, False] == ["since" in frame for frame in requests]
    connection.subscribed(requests, "e:10")
    connection.change("a", row(15), row(16), prev="e:10")
    assert ["changes", "a", [16], 1] == await client.event()
    connection.send("resumed", pos="e:16", replayed=2)
    assert ["live", "e:16"] == await client.event()


async def test_a_topic_that_is_revoked_or_refused_is_not_requested_again(client: Client, site: ScriptedSite) -> None:
    connection = await live(client, site)
    await client.run("client.subscribe('b'); client.subscribe('c')")
    refused, granted = await connection.subscribes("b", "c")
    connection.send("error", id=refused["id"], code="no_such_topic", message="", retry=False)
    assert ["removed", "b", "no_such_topic"] == await client.event()
    connection.subscribed([granted], "e:10")
    connection.send("resumed", pos="e:10", replayed=0)
    connection.send("revoked", topic="a", pos="e:12")
    assert ["removed", "a", "revoked"] == await client.event()
    await connection.close(1012)
    connection = await site.connection()
    await connection.welcome("e:20")
    connection.subscribed(await connection.subscribes("c"), "e:10")
    connection.send("resumed", pos="e:20", replayed=0)
    assert ["live", "e:20"] == await client.event()


async def test_a_topic_that_is_unavailable_is_requested_again(client: Client, site: ScriptedSite) -> None:
    connection = await live(client, site)
    await client.run("client.subscribe('b')")
    requests = await connection.subscribes("b")
    connection.send("error", id=requests[0]["id"], code="unavailable", message="", retry=True)
    again = await connection.subscribes("b")
    assert "e:10" == again[0]["since"]
    connection.subscribed(again, "e:10")
    connection.send("resumed", pos="e:11", replayed=0)
    connection.change("b", row(12), prev="e:11")
    assert ["changes", "b", [12], 0] == await client.event()


async def test_a_reset_is_reported_and_the_topic_continues_after_it(client: Client, site: ScriptedSite) -> None:
    connection = await live(client, site)
    connection.send("reset", topic="a", reason="truncate", pos="e:30")
    assert ["reset", "a", "truncate"] == await client.event()
    connection.change("a", row(31), prev="e:30")
    assert ["changes", "a", [31], 0] == await client.event()


async def test_a_topic_begins_with_a_snapshot_until_it_has_got_one_and_again_after_a_reset(
    client: Client, site: ScriptedSite
) -> None:
    async def send_snapshot(pos: str) -> None:
        [asked] = await connection.subscribes("a")
        assert (True, False) == (asked["snapshot"], "since" in asked)
        connection.send("subscribed", id=asked["id"], topic="a", pos=pos, snapshot=True)
        connection.send(
            "snapshot", topic="a", table="rows", rows=[{"key": {"id": 1}, "record": {"id": 1}}], more=False
        )
        assert ["reset", "a", "snapshot"] == await client.event()
        assert ["snapshot", "a", "rows", [1]] == await client.event()

    await client.run("client.subscribe('a', { snapshot: true }); client.connect();")
    connection = await site.connection()
    await connection.welcome("e:10")
    await send_snapshot("e:11")
    connection.change("a", row(12), prev="e:11")
    assert ["changes", "a", [12], 0] == await client.event()
    await connection.close(1012)  # before it was live
    connection = await site.connection()
    await connection.welcome("e:12")
    await send_snapshot("e:12")
    connection.send("resumed", pos="e:13", replayed=0)
    assert ["live", "e:13"] == await client.event()
    connection.send("reset", topic="a", reason="truncate", pos="e:14")
    assert ["reset", "a", "truncate"] == await client.event()
    assert "a" == (await connection.receive("unsubscribe"))["topic"]
    await send_snapshot("e:15")
    connection.send("resumed", pos="e:15", replayed=0)
    connection.change("a", row(16), prev="e:15")
    assert ["changes", "a", [16], 0] == await client.event()
    await connection.close(1012)
    connection = await site.connection()
    assert "e:16" == (await connection.welcome("e:17"))["since"]
    [asked] = await connection.subscribes("a")
    assert "snapshot" not in asked
