"""Both clients against the real daemon: whatever breaks, they receive everything, once and in order."""

from collections.abc import AsyncIterator

import pytest

from tests.acceptance.chat import Chat
from tests.clients.drivers import LANGUAGES, Driver, contents, driven, until
from tests.faults.proxy import Proxy
from tests.support.daemon import Daemon, daemon_process, token

TTL = 4  # seconds

pytestmark = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture
async def proxy(daemon: Daemon) -> AsyncIterator[Proxy]:
    async with Proxy(daemon.address).serving() as proxy:
        yield proxy


def through(proxy: Proxy) -> str:
    return f"ws://127.0.0.1:{proxy.port}/v1"


async def following(driver: Driver, chat: Chat) -> None:
    """Follow the channel, and receive a first message."""
    await driver.say("follow", chat.topic)
    await until(driver, "ready")
    await chat.say("first")
    assert ["first"] == contents(await until(driver, "change", "insert", "first"))


async def rows(driver: Driver, chat: Chat) -> list[str]:
    await driver.say("rows", chat.topic)
    received = await driver.receive()
    while received[0] != "rows":
        received = await driver.receive()
    found: list[str] = received[1]
    return found


async def test_a_client_that_is_cut_off_receives_what_was_written_meanwhile(
    language: str, chat: Chat, proxy: Proxy
) -> None:
    async with driven(language, through(proxy), [token(chat.ada)]) as driver:
        await following(driver, chat)
        for number in range(5):
            proxy.reset()
            await until(driver, "status", "waiting")
            await chat.say(f"while away {number}")
            received = await until(driver, "change", "insert", f"while away {number}")
            assert [f"while away {number}"] == contents(received)
        assert ["first", *(f"while away {number}" for number in range(5))] == await rows(driver, chat)


async def test_a_client_whose_connection_dies_silently_notices_and_resumes(
    language: str, chat: Chat, proxy: Proxy
) -> None:
    async with driven(language, through(proxy), [token(chat.ada)]) as driver:
        await following(driver, chat)
        proxy.forget()
        await chat.say("unseen")
        received = await until(driver, "change", "insert", "unseen")
        assert ["status", "waiting"] in received
        assert ["unseen"] == contents(received)


async def test_a_client_moves_to_another_daemon_when_its_own_stops(
    language: str, dsn: str, daemon: Daemon, chat: Chat
) -> None:
    async with (
        daemon_process(dsn, environment={"ROWCAST_DRAIN_SECONDS": "1"}) as stopping,
        Proxy(stopping.address).serving() as proxy,
        driven(language, through(proxy), [token(chat.ada)]) as driver,
    ):
        await following(driver, chat)
        proxy.target = daemon.address
        assert 0 == await stopping.stop()
        await chat.say("meanwhile")
        received = await until(driver, "change", "insert", "meanwhile")
        assert ["meanwhile"] == contents(received)
        assert ["first", "meanwhile"] == await rows(driver, chat)


async def test_a_token_is_renewed_before_it_expires_and_the_connection_stays(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    tokens = [token(chat.ada)]

    def issue() -> list[str]:
        """A program may take seconds to start."""
        tokens.insert(0, token(chat.ada, ttl=TTL))
        return tokens[:]

    async with driven(language, daemon.url, issue) as driver, daemon.raw() as witness:
        await witness.say(op="hello", token=tokens[0])
        await following(driver, chat)
        received = await until(driver, "token", True)
        assert 4401 == (await witness.closed())[0]
        await chat.say("with the fresh token")
        received += await until(driver, "change", "insert", "with the fresh token")
        assert ["with the fresh token"] == contents(received)
        assert ["status", "waiting"] not in received


async def test_a_token_that_the_server_refuses_is_replaced_by_a_fresh_one(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    refused = token(chat.bob)  # another user cannot renew it

    def issue() -> list[str]:
        return [token(chat.ada, ttl=TTL), refused, token(chat.ada)]

    async with driven(language, daemon.url, issue) as driver:
        await following(driver, chat)
        await until(driver, "token", True)
        assert ["status", "waiting"] in await until(driver, "token", True)
        await chat.say("with the fresh token")
        assert ["with the fresh token"] == contents(await until(driver, "change", "insert", "with the fresh token"))


async def test_a_reset_empties_the_collection_and_is_part_of_the_loop(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    async with driven(language, daemon.url, [token(chat.ada)]) as driver:
        await following(driver, chat)
        await chat.sql.execute("truncate chatgenius.messages cascade")
        await until(driver, "change", "reset", "truncate")
        await chat.say("after")
        assert ["after"] == contents(await until(driver, "change", "insert", "after"))
        assert ["after"] == await rows(driver, chat)


async def test_a_right_that_ends_ends_the_collection_and_the_loop(language: str, chat: Chat, daemon: Daemon) -> None:
    async with driven(language, daemon.url, [token(chat.ada)]) as driver:
        await following(driver, chat)
        await chat.sql.execute("delete from chatgenius.channel_members where channel_id = $1", chat.channel)
        await until(driver, "ended", "revoked")


async def test_a_topic_that_may_not_be_read_ends_the_loop_with_its_code(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    async with driven(language, daemon.url, [token(chat.bob)]) as driver:
        await driver.say("follow", chat.topic)
        await until(driver, "ended", "no_such_topic")


async def test_a_loop_that_falls_behind_pauses_the_connection_and_loses_nothing(
    language: str, chat: Chat, daemon: Daemon
) -> None:
    async with driven(language, daemon.url, [token(chat.ada)], buffer=10) as driver:
        await following(driver, chat)
        await driver.say("hold")
        expected = [str(number) for number in range(100)]
        for content in expected:
            await chat.say(content)
        received = await until(driver, "status", "paused")
        await driver.say("go")
        received += await until(driver, "change", "insert", "99")
        assert expected == contents(received)
        assert ["first", *expected] == await rows(driver, chat)


async def test_a_token_that_is_refused_twice_stops_the_client(language: str, chat: Chat, daemon: Daemon) -> None:
    async with driven(language, daemon.url, ["not a token"]) as driver:
        await driver.say("follow", chat.topic)
        received = await until(driver, "ended", 4401)
        assert [["token", False], ["token", True]] == [values for values in received if values[0] == "token"]
