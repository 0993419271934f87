"""The JavaScript client in a real browser, on a page of the real daemon."""

import asyncio
from typing import Any

from tests.acceptance.chat import Chat
from tests.faults.proxy import Proxy
from tests.support.browser import browser_page
from tests.support.daemon import Daemon, token

FOLLOW = """async ([url, token, topic]) => {
  const { Rowcast } = await import("/rowcast.js");
  const rowcast = new Rowcast(url, { token });
  rowcast.on("status", (status) => report(["status", status]));
  const messages = rowcast.collection(topic, { table: "messages" });
  messages.subscribe(() => report(["rows", messages.rows.map((row) => row.content)]));
}"""


async def test_a_page_imports_the_client_and_misses_nothing_when_it_is_cut_off(chat: Chat, daemon: Daemon) -> None:
    reports: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def until(*report: Any) -> None:
        while await reports.get() != list(report):
            pass

    async with Proxy(daemon.address).serving() as proxy, browser_page() as (page, complaints):
        await page.expose_function("report", reports.put_nowait)
        await page.goto(f"{daemon.http}/healthz")
        await page.evaluate(FOLLOW, [f"ws://127.0.0.1:{proxy.port}/v1", token(chat.ada), chat.topic])
        await until("status", "live")
        await chat.say("first")
        await until("rows", ["first"])
        proxy.reset()
        await until("status", "waiting")
        await chat.say("while away")
        await until("rows", ["first", "while away"])
        assert [] == complaints.but_for("Failed to load resource: the server responded with a status of 404")
