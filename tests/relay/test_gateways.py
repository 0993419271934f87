"""Gateways without a database: what their clients get, whatever fails in between."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.faults.proxy import Proxy
from tests.support.daemon import (
    SECRET,
    Client,
    Notices,
    clean_environment,
    command,
    get,
    start,
)
from tests.support.gateways import contents, follow, gateway, heartbeat, member, read
from tests.support.guide import blocks
from tests.support.issuer import self_signed
from tests.support.nats import NatsServer, running_link, running_nats

in_both_modes = pytest.mark.parametrize("content", ["inline", "topic"])


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


@in_both_modes
async def test_a_client_of_a_gateway_gets_what_a_client_of_a_member_gets(
    database: str, chat: Chat, nats: NatsServer, prefix: str, content: str
) -> None:
    async with (
        member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content) as one,
        gateway(nats.url, prefix) as two,
        AsyncExitStack() as stack,
    ):
        clients = [await follow(stack, node, chat) for node in (one, two)]
        for text in ("a", "b", "c"):
            await chat.say(text)
        frames = [await client.changes(3) for client in clients]
        assert frames[0] == frames[1]
        assert ["a", "b", "c"] == contents(frames[0])


@pytest.mark.parametrize("place", ["a member", "the gateway"])
async def test_a_gateway_names_transactions_only_if_it_and_its_members_do(
    database: str, chat: Chat, nats: NatsServer, prefix: str, place: str
) -> None:
    hidden = {"ROWCAST_TRANSACTION_IDS": "false"}
    of_member, of_gateway = (hidden, {}) if place == "a member" else ({}, hidden)
    async with member(database, nats.url, prefix, **of_member), gateway(nats.url, prefix, **of_gateway) as node:
        async with node.client(chat.ada) as client:
            since = client.welcome["pos"]
            await client.subscribe(chat.topic)
            await chat.say("a")
            live = await client.changes()
        assert [("a", False)] == [(change["record"]["content"], "tx" in change) for change in live]
        async with node.client(chat.ada, since) as client:
            await client.subscribe(chat.topic)
            assert live == await client.changes()


@in_both_modes
async def test_a_client_resumes_from_a_member_at_a_gateway_and_back(
    database: str, chat: Chat, nats: NatsServer, prefix: str, content: str
) -> None:
    async with (
        member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content) as one,
        gateway(nats.url, prefix) as two,
    ):
        async with AsyncExitStack() as stack:
            client = await follow(stack, one, chat)
            await chat.say("a")
            since = (await client.until("changes"))[-1]["pos"]
        await chat.say("b")
        async with AsyncExitStack() as stack:
            client = await follow(stack, two, chat, since)
            assert ["b"] == await read(client, "b")
            await chat.say("c")
            since = (await client.until("changes"))[-1]["pos"]
        await chat.say("d")
        async with AsyncExitStack() as stack:
            client = await follow(stack, one, chat, since)
            assert ["d"] == await read(client, "d")


async def test_who_may_not_read_a_topic_may_not_at_a_gateway_either(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with member(database, nats.url, prefix), gateway(nats.url, prefix) as two, two.client(chat.bob) as bob:
        answer = await bob.subscribe(chat.topic)
        assert ("error", "no_such_topic") == (answer["op"], answer["code"])


@in_both_modes
async def test_a_right_that_ends_ends_at_every_gateway(
    database: str, chat: Chat, nats: NatsServer, prefix: str, content: str
) -> None:
    async with (
        member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content),
        gateway(nats.url, prefix) as two,
        gateway(nats.url, prefix) as three,
        AsyncExitStack() as stack,
    ):
        clients = [await follow(stack, node, chat) for node in (two, three)]
        await chat.say("before")
        await chat.sql.execute("delete from chatgenius.channel_members where channel_id = $1", chat.channel)
        await chat.say("after")
        for client in clients:
            frames = await client.until("revoked")
            assert "before" in str(frames)
            assert "after" not in str(frames)


async def test_a_gateway_that_knows_no_member_says_so_and_begins_when_one_comes(
    database: str, nats: NatsServer, prefix: str, tmp_path: Path
) -> None:
    nodes = {"ROWCAST_NATS_URL": nats.url, "ROWCAST_NATS_PREFIX": prefix}
    with Notices(tmp_path / "notify") as notices, (tmp_path / "log").open("wb") as errors:
        environment = clean_environment(
            **nodes, NOTIFY_SOCKET=str(notices.path), ROWCAST_SECRET=SECRET, ROWCAST_LISTEN="127.0.0.1:0"
        )
        process = await start("gateway", environment=environment, directory=tmp_path, errors=errors.fileno())
        while "waiting_for_members" not in (tmp_path / "log").read_text():
            assert process.returncode is None
            await asyncio.sleep(0.1)
        async with member(database, nats.url, prefix):
            await notices.wait_for("READY=1")
            process.send_signal(signal.SIGTERM)
            assert 0 == await process.wait()


async def test_what_a_daemon_without_a_url_of_nats_is_made_of_has_nothing_of_nats() -> None:
    code = "import sys, daemon.app.serve; print({'nats', 'nkeys', 'daemon.relay.connection'} & set(sys.modules))"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    assert b"set()\n" == (await process.communicate())[0]


async def test_a_gateway_without_a_url_of_nats_says_what_to_set() -> None:
    code, _, errors = await command("gateway")
    assert 78 == code
    assert "set ROWCAST_NATS_URL" in errors


@asynccontextmanager
async def following(
    database: str, chat: Chat, prefix: str, content: str = "inline"
) -> AsyncIterator[tuple[NatsServer, Client]]:
    """A server of NATS that the test may stop, and a client that follows the chat at a gateway."""
    async with (
        running_nats() as nats,
        member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content),
        gateway(nats.url, prefix) as node,
        AsyncExitStack() as stack,
    ):
        yield nats, await follow(stack, node, chat)


@in_both_modes
async def test_clients_of_a_gateway_miss_nothing_when_nats_is_killed(
    database: str, chat: Chat, prefix: str, content: str
) -> None:
    async with following(database, chat, prefix, content) as (nats, client):
        await chat.say("0")
        for number in range(1, 4):
            await nats.kill()
            await chat.say(f"{number} while it is gone")
            await nats.start()
            await chat.say(f"{number}")
        assert ["0", *(f"{n}{more}" for n in range(1, 4) for more in (" while it is gone", ""))] == await read(
            client, "3"
        )


@in_both_modes
async def test_clients_of_a_gateway_miss_nothing_when_nats_hangs(
    database: str, chat: Chat, prefix: str, content: str
) -> None:
    async with following(database, chat, prefix, content) as (nats, client):
        nats.signal(signal.SIGSTOP)
        for number in range(20):
            await chat.say(str(number))
        nats.signal(signal.SIGCONT)
        await chat.say("last")
        assert [*map(str, range(20)), "last"] == await read(client, "last")


async def test_clients_of_a_gateway_learn_that_it_receives_nothing(database: str, chat: Chat, prefix: str) -> None:
    async with following(database, chat, prefix) as (nats, client):
        await nats.kill()
        while not (await heartbeat(client)).get("stale"):
            pass
        await chat.say("meanwhile")
        await nats.start()
        assert ["meanwhile"] == await read(client, "meanwhile")


async def test_a_gateway_gives_up_a_connection_that_something_in_between_has_forgotten(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with (
        Proxy(("127.0.0.1", nats.port)).serving() as proxy,
        member(database, nats.url, prefix),
        gateway(f"nats://127.0.0.1:{proxy.port}", prefix) as two,
        AsyncExitStack() as stack,
    ):
        client = await follow(stack, two, chat)
        proxy.forget()
        await chat.say("into the void")
        assert ["into the void"] == await read(client, "into the void")
        [lost] = [event for event in two.events() if event["event"] == "relay_lost"]
        assert "carried nothing any more" in lost["data"]["reason"]


@in_both_modes
async def test_a_leader_that_is_killed_loses_nothing_for_clients_of_a_gateway(
    database: str, chat: Chat, nats: NatsServer, prefix: str, content: str
) -> None:
    async with (
        member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content) as one,
        gateway(nats.url, prefix) as two,
        AsyncExitStack() as stack,
    ):
        client = await follow(stack, two, chat)
        async with member(database, nats.url, prefix, ROWCAST_NATS_CONTENT=content):
            await chat.say("0")
            one.process.send_signal(signal.SIGKILL)
            await one.process.wait()
            await chat.say("1")
            assert ["0", "1"] == await read(client, "1")


async def test_signals_reach_clients_of_other_nodes(database: str, chat: Chat, nats: NatsServer, prefix: str) -> None:
    async with member(database, nats.url, prefix) as one, gateway(nats.url, prefix) as two, AsyncExitStack() as stack:
        clients = [await follow(stack, node, chat) for node in (one, two)]
        for sender, other in (clients, clients[::-1]):
            await sender.say(op="signal", topic=chat.topic, name="typing", data={"on": True})
            frame = await other.next()
            assert ("signal", {"on": True}) == (frame["op"], frame["data"])


@in_both_modes
async def test_members_and_gateways_need_no_more_rights_than_the_guide_grants(
    database: str, chat: Chat, tmp_path: Path, content: str
) -> None:
    certificate, key = self_signed(tmp_path)
    [configuration] = [code for _, language, code in blocks("docs/scale.md") if language == "conf"]
    configuration = configuration.replace("/etc/nats/certificate.pem", str(certificate))
    configuration = configuration.replace("/etc/nats/key.pem", str(key))
    trusted = {"ROWCAST_NATS_CA_FILE": str(certificate)}
    async with (
        running_nats(configuration) as nats,
        member(
            database, f"tls://member:PASSWORD@{nats.address}", "chat", **trusted, ROWCAST_NATS_CONTENT=content
        ) as one,
        gateway(f"tls://gateway:PASSWORD@{nats.address}", "chat", **trusted) as two,
        AsyncExitStack() as stack,
    ):
        clients = [await follow(stack, node, chat) for node in (one, two)]
        await chat.say("a")
        assert [["a"], ["a"]] == [contents(await client.changes()) for client in clients]
        for sender, other in (clients, clients[::-1]):
            await sender.say(op="signal", topic=chat.topic, name="typing")
            assert "signal" == (await other.next())["op"]
        assert [] == [line for node in (one, two) for line in node.warnings() if line["event"] == "relay_refused"]
        async with running_link(f"tls://gateway:PASSWORD@{nats.address}", "chat", ca_file=certificate) as link:
            await link.connected.wait()
            for subject in ("log", "beat", "t.1"):
                link.publish(subject, b"forged")
                while f'publish to "chat.{subject.replace("t.1", "t.>")}"' not in link.failure:
                    await asyncio.sleep(0.001)


async def test_the_page_of_a_gateway_says_that_it_is_ready(
    database: str, chat: Chat, nats: NatsServer, prefix: str
) -> None:
    async with member(database, nats.url, prefix), gateway(nats.url, prefix) as two:
        assert 200 == (await get(f"{two.http}/readyz"))[0]
        assert [] == two.warnings()
        assert "rowcast_ready 1.0" in (await get(f"{two.http}/metrics"))[1]
