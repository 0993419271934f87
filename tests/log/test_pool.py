"""The pool of connections to a real Postgres."""

import asyncio

import pytest

from daemon.postgres.connect import Connection, Pool, acquired


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
