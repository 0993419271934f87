"""The start of a daemon: it serves once the events captured before are numbered."""

import asyncio

import pytest
from structlog.testing import capture_logs

from daemon.app.serve import SequencingFailed, wait_until_sequenced
from daemon.postgres.connect import Connection, Pool
from tests.support.log import leader

pytestmark = pytest.mark.usefixtures("rows")

REPORT_INTERVAL = 0.01  # seconds


async def test_the_start_waits_until_earlier_events_are_numbered(database: str, pool: Pool, sql: Connection) -> None:
    lock = sql.transaction()
    await lock.start()
    await sql.execute("lock table rowcast.log in access exclusive mode")
    with capture_logs() as lines:
        async with leader(database, pool, leads=False) as sequencer:
            waiting = asyncio.create_task(wait_until_sequenced(sequencer, REPORT_INTERVAL))
            while 3 > [line["event"] for line in lines].count("catching_up"):
                await asyncio.sleep(0)
            assert not waiting.done()
            await lock.rollback()
            await waiting


async def test_the_start_fails_with_the_reason_if_events_cannot_be_numbered(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute("drop view rowcast.contents cascade")
    async with leader(database, pool, leads=False) as sequencer:
        with pytest.raises(SequencingFailed, match=r"Cannot sequence events \(UndefinedTableError 42P01\)"):
            await wait_until_sequenced(sequencer, REPORT_INTERVAL)
