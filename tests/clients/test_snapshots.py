"""Both clients begin with the rows that exist, and read them again after a reset."""

import pytest

from tests.acceptance.chat import Chat
from tests.clients.drivers import LANGUAGES, Driver, driven, until
from tests.faults.proxy import Proxy
from tests.support.daemon import Daemon, token

pytestmark = pytest.mark.parametrize("language", LANGUAGES)


async def until_rows(driver: Driver, chat: Chat, *expected: str) -> None:
    while True:
        await until(driver, "ready")
        await driver.say("rows", chat.topic)
        found = await driver.receive()
        while found[0] != "rows":
            found = await driver.receive()
        if found[1] == list(expected):
            return


async def test_a_collection_begins_with_its_rows_and_begins_again_after_a_reset(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    for content in ("one", "two", "three"):
        await chat.say(content)
    async with (
        Proxy(daemon.address).serving() as proxy,
        driven(language, f"ws://127.0.0.1:{proxy.port}/v1", [token(chat.ada)]) as driver,
    ):
        await driver.say("follow", chat.topic, {"limit": 2})
        await until_rows(driver, chat, "two", "three")
        await chat.say("four")
        await until(driver, "change", "insert", "four")
        proxy.reset()
        await until(driver, "status", "waiting")
        await chat.say("five")
        await until(driver, "change", "insert", "five")
        await chat.sql.execute("truncate chatgenius.reactions")
        await until(driver, "change", "reset", "truncate")
        await until_rows(driver, chat, "four", "five")


async def test_a_collection_with_a_filter_keeps_it_when_the_client_resumes(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    asked = {"where": {"messages": {"content": {"ne": "two"}}}, "columns": {"messages": ["content"]}}
    for content in ("one", "two", "three"):
        await chat.say(content)
    async with (
        Proxy(daemon.address).serving() as proxy,
        driven(language, f"ws://127.0.0.1:{proxy.port}/v1", [token(chat.ada)]) as driver,
    ):
        await driver.say("follow", chat.topic, {"limit": 10}, asked)
        await until_rows(driver, chat, "one", "three")
        proxy.reset()
        await until(driver, "status", "waiting")
        await chat.sql.execute("update chatgenius.messages set content = 'two' where content = 'one'")
        await chat.say("two")
        await chat.say("four")
        await until(driver, "change", "insert", "four")
        await driver.say("rows", chat.topic)
        await until(driver, "rows", ["three", "four"])
