"""What a daemon does before it serves: it waits for as long as order is being made, and for no longer."""

import asyncio

import pytest
from structlog.testing import capture_logs

from daemon.app import SequencingFailed, wait_until_sequenced
from daemon.postgres.connect import Connection, Pool
from tests.support.log import leader

pytestmark = pytest.mark.usefixtures("rows")

SOON = 0.01  # seconds


async def test_it_waits_for_as_long_as_what_was_written_before_is_being_numbered(
    database: str, pool: Pool, sql: Connection
) -> None:
    locking = sql.transaction()
    await locking.start()
    await sql.execute("lock table rowcast.log in access exclusive mode")
    with capture_logs() as lines:
        async with leader(database, pool, leads=False) as sequencer:
            waiting = asyncio.create_task(wait_until_sequenced(sequencer, SOON))
            while 3 > [line["event"] for line in lines].count("catching_up"):
                await asyncio.sleep(0)
            assert not waiting.done()
            await locking.rollback()
            await waiting


async def test_it_ends_and_says_why_if_nothing_can_be_numbered(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute("drop view rowcast.contents cascade")
    async with leader(database, pool, leads=False) as sequencer:
        with pytest.raises(SequencingFailed, match=r"Cannot sequence events \(UndefinedTableError 42P01\)"):
            await wait_until_sequenced(sequencer, SOON)
