"""Members and gateways in processes of their own, and what their clients read."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, daemon_process
from tests.support.nats import running_nats

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
PLACES = "daemon", "gateway"
"""Where clients may connect: what they meet is the same."""


@asynccontextmanager
async def node(
    place: str, database: str, *arguments: str, environment: Mapping[str, str] = {}, module: str = "daemon"
) -> AsyncIterator[Daemon]:
    """A daemon, or a gateway of one, which has the same environment. See `daemon_process`."""
    if place == "daemon":
        async with daemon_process(database, *arguments, environment=environment, module=module) as process:
            yield process
        return
    async with running_nats() as nats:
        both = {**environment, "ROWCAST_NATS_URL": nats.url}
        async with (
            daemon_process(database, environment=both),
            daemon_process(NOWHERE, *arguments, "gateway", environment=both, module=module) as process,
        ):
            yield process


@asynccontextmanager
async def member(
    database: str, url: str, prefix: str, mutant: str | None = None, **environment: str
) -> AsyncIterator[Daemon]:
    """`mutant` names what tests/faults/mutant.py changes in it."""
    nodes = {"ROWCAST_NATS_URL": url, "ROWCAST_NATS_PREFIX": prefix}
    mutants, module = ([mutant], "tests.faults.mutant") if mutant else ([], "daemon")
    async with daemon_process(database, *mutants, environment={**nodes, **environment}, module=module) as process:
        yield process


@asynccontextmanager
async def gateway(url: str, prefix: str, mutant: str | None = None, **environment: str) -> AsyncIterator[Daemon]:
    """See `member`."""
    nodes = {"ROWCAST_NATS_URL": url, "ROWCAST_NATS_PREFIX": prefix}
    mutants, module = ([mutant], "tests.faults.mutant") if mutant else ([], "daemon")
    running = daemon_process(NOWHERE, *mutants, "gateway", environment={**nodes, **environment}, module=module)
    async with running as process:
        yield process


async def follow(stack: AsyncExitStack, node: Daemon, chat: Chat, since: str | None = None) -> Client:
    client = await stack.enter_async_context(node.client(chat.ada, since))
    assert "subscribed" == (await client.subscribe(chat.topic))["op"]
    return client


def contents(changes: list[Frame]) -> list[str]:
    return [change["record"]["content"] for change in changes]


async def heartbeat(client: Client) -> Frame:
    """The next `head` frame."""
    while True:
        frame: Frame = json.loads(await client.connection.recv())
        if frame["op"] == "head":
            return frame


async def read(client: Client, last: str) -> list[str]:
    """The contents of all messages up to the one with this content."""
    found: list[str] = []
    while last not in found:
        frame = await client.next()
        if frame["op"] == "changes":
            found += contents(frame["changes"])
        else:
            assert frame["op"] in {"stale", "fresh", "resumed"}, frame
    return found
