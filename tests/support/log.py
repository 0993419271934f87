"""A watched table, and a sequencer that numbers its events."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from uuid import UUID, uuid4

from daemon.log.queries import query
from daemon.log.sequencer import FOLLOWER_LOCK, LEASE, Offer, Sequencer
from daemon.postgres.connect import SESSION, Connection, Pool, connect

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
    max_offered: int = 100,
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


class ManualLeader:
    """A leader that takes each step when a test says so."""

    def __init__(self, connection: Connection, edits: Sequence[tuple[str, str]] = (), *, few: bool = False) -> None:
        """`edits` make mutants of the statements. With `few`, ordinary batches are left to the short one."""
        self.connection = connection
        self.few = few
        self.was_ordinary = False  # the last batch that was left to the short statement
        self.nonce: UUID | None = None
        self._full, self._few = query("number_events"), query("number_few")
        for old, new in edits:
            assert old in self._full
            assert old in self._few
            self._full, self._few = self._full.replace(old, new), self._few.replace(old, new)
        self._state: dict[str, Any] = {}

    async def lead(self, *, next_segment: bool = False) -> bool:
        """Open a term, if nobody else leads."""
        nonce = uuid4()
        opened = await self.connection.fetchrow(
            query("open_term"), nonce, self.nonce, LEASE, next_segment, self.nonce, self._state.get("base", 0)
        )
        assert opened is not None
        if opened["term"] is not None:
            self.nonce, self._state = nonce, dict(opened)
        return opened["term"] is not None

    @property
    def base(self) -> int:
        """The newest number."""
        return int(self._state["base"])

    async def number(self) -> bool:
        """Number what is new. False if another leads."""
        _, xmax, in_progress = self._state["snapshot"].split(":")
        xids = [xid for xid in in_progress.split(",") if xid]
        state, base = self._state, self.base
        place = (self.nonce, base, xmax, xids, state["first_segment"])
        if self.few:
            row, *_ = await self.connection.fetch(
                self._few, *place, 1000, FOLLOWER_LOCK, state["term"], base + 1000, 1_000_000, 1_000_000
            )
            self.was_ordinary = row["is_ordinary"]
            if self.was_ordinary:
                leads = row["seq"] is not None or not row["changes"]
                if leads:
                    self._state |= {"snapshot": row["snapshot"], "base": base + row["changes"]}
                return leads
        row, *_ = await self.connection.fetch(self._full, *place, 0, FOLLOWER_LOCK, state["term"], base, None, 0, 0)
        if not row["superseded"]:
            self._state |= {"snapshot": row["snapshot"], "base": row["last_seq"]}
        return not row["superseded"]


async def expire_lease(sql: Connection) -> None:
    """Let the leader's lease run out."""
    await sql.execute("update rowcast.lease set expires_at = clock_timestamp(), xid = pg_current_xact_id()")
