"""A watched table, and a sequencer that numbers its events."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from daemon.log.sequencer import Offer, Sequencer
from daemon.postgres.connect import SESSION, Pool, connect

ROWS = """
create schema app;
create table app.rows (id integer primary key, version integer not null);
insert into app.rows select n, 0 from generate_series(1, 8) as n;
select rowcast.watch('app.rows', $$'row:' || r.id$$, '{id,version}');
"""


@asynccontextmanager
async def leader(
    database: str,
    pool: Pool,
    poll_every: float = 0.01,
    *,
    numbers: asyncio.Event | None = None,
    offer: Offer = lambda _, __: None,
    max_offered: int = 0,
    leads: bool = True,
    killed: bool = False,
) -> AsyncIterator[Sequencer]:
    """A sequencer that leads or, without `leads`, has only been started. It polls: nothing notifies it.

    At the end it stops in order or, if `killed`, loses its connection first.
    """
    connecting = partial(connect, database, application_name="sequencer", server_settings=SESSION)
    sequencer = Sequencer(
        connecting,
        pool,
        asyncio.Event(),
        numbers or asyncio.Event(),
        offer,
        max_offered=max_offered,
        poll_every=poll_every,
    )
    task = asyncio.create_task(sequencer.run())
    try:
        if leads:
            await sequencer.leading.wait()
        yield sequencer
    finally:
        if killed:
            await pool.execute("select pg_terminate_backend($1)", sequencer.backend_pid)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_numbered(pool: Pool) -> None:
    """Wait until every captured event is numbered."""
    while await pool.fetchval(
        """select exists (
               select from rowcast.events as e
               cross join (select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1) as newest
               where not pg_visible_in_snapshot(e.xid, newest.snapshot))"""
    ):
        await asyncio.sleep(0)
