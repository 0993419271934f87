"""Members and gateways in processes of their own, and what their clients read."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, daemon_process

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"


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
async def gateway(url: str, prefix: str, **environment: str) -> AsyncIterator[Daemon]:
    nodes = {"ROWCAST_NATS_URL": url, "ROWCAST_NATS_PREFIX": prefix}
    async with daemon_process(NOWHERE, "gateway", environment={**nodes, **environment}) as process:
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
