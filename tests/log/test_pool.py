"""The pool of connections to a real Postgres."""

import asyncio
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any

import asyncpg
import pytest

from daemon.log.notifier import Notifier
from daemon.log.sequencer import Sequencer
from daemon.log.wakeup_lock import WakeupLock
from daemon.postgres.connect import SESSION, Connection, Pool, acquired, connect, open_pool
from tests.faults.harness import dsn_through, socket_of
from tests.faults.proxy import Proxy


async def test_a_cancellation_is_not_replaced_by_the_error_of_a_connection_that_was_lost_meanwhile(
    pool: Pool, sql: Connection
) -> None:
    acquiring = asyncio.get_running_loop().create_future()

    async def hold() -> None:
        async with acquired(pool, 60) as connection:
            acquiring.set_result(connection)
            await asyncio.Event().wait()

    holding = asyncio.create_task(hold())
    connection: Connection = await acquiring
    lost = asyncio.Event()
    connection.add_termination_listener(lambda _: lost.set())
    await sql.execute("select pg_terminate_backend($1)", connection.get_server_pid())
    await lost.wait()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding


async def test_a_cancellation_is_not_replaced_by_that_of_a_rollback_that_fails(database: str) -> None:
    async with Proxy(socket_of(database)).serving() as proxy:
        pool = await open_pool(dsn_through(proxy, database), application_name="test", max_size=1)

        async def write() -> None:
            async with acquired(pool, 60) as connection, connection.transaction():
                proxy.hold()
                await connection.execute("select 1")

        writing = asyncio.create_task(write())
        await proxy.up.holds.wait()
        await cancelled_and_lost(writing, proxy)
        pool.terminate()


async def cancelled_and_lost(task: asyncio.Task[Any], proxy: Proxy) -> None:
    """Cancel a task, and lose its connection while it cleans up."""
    accepted = proxy.accepted
    task.cancel()
    while not task.done() and proxy.accepted == accepted:  # the driver asks the server to cancel the statement
        await asyncio.sleep(0)
    proxy.reset()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_opening_of_a_session_can_be_cancelled_when_its_connection_is_lost(database: str) -> None:
    async with Proxy(socket_of(database)).serving() as proxy:
        for pieces in count():
            proxy.heal()
            proxy.up.allowed = pieces
            proxy.up.holds.clear()
            opening = asyncio.create_task(
                connect(dsn_through(proxy, database), application_name="test", server_settings=SESSION)
            )
            holds = asyncio.create_task(proxy.up.holds.wait())
            await asyncio.wait({opening, holds}, return_when=asyncio.FIRST_COMPLETED)
            holds.cancel()
            if opening.done():
                break
            await cancelled_and_lost(opening, proxy)
        (await opening).terminate()
    assert pieces > 5


async def connect_lost() -> Connection:
    """What a driver may do that cleans up when it is cancelled."""
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        raise asyncpg.ConnectionDoesNotExistError("lost meanwhile") from None
    raise AssertionError


PARTS: dict[str, Callable[[Pool], Coroutine[Any, Any, None]]] = {
    "the sequencer": lambda pool: Sequencer(connect_lost, pool, asyncio.Event(), asyncio.Event()).run(),
    "the wakeup lock": lambda _: WakeupLock(connect_lost, lambda: None).run(),
    "the listener": lambda _: Notifier(connect_lost, {}).run(),
}


@pytest.mark.parametrize("part", PARTS)
async def test_a_part_that_is_cancelled_ends_whatever_its_connection_raises(pool: Pool, part: str) -> None:
    running = asyncio.create_task(PARTS[part](pool))
    for _ in range(3):
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.wait({running}, timeout=10)
    was_cancelled = running.cancelled()
    running.cancel()
    assert was_cancelled
