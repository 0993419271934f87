"""The numbering on a real Postgres, under random programs of several connections, one statement at a time.

Nothing is left to chance but the program, which its number decides: each statement is awaited before the next, and
what would wait for a row is not tried.
"""

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import permutations, product
from typing import Any

import pytest

from daemon.core.change import Change, Seq
from daemon.log.queries import query
from daemon.log.reader import PgLogReader
from daemon.log.sequencer import FOLLOWER_LOCK
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from tests.support.log import ROWS

NEW = "e.xid >= $3::text::xid8"
RUNNING = "e.xid = any ($4::text []::xid8 [])"
ORDER = "max(f.id) over (partition by f.xid) as tx,"

UNUSED = "and $3::text is not null"
NONE = (RUNNING, "$4::text [] is null")

MUTANTS = {
    "a naive cursor": ((NEW, f"e.id > (select coalesce(max(o.event_id), 0) from rowcast.log as o) {UNUSED}"), NONE),
    "the horizon of xmin": (
        (
            NEW,
            f"e.xid < pg_snapshot_xmin(pg_current_snapshot()) {UNUSED}"
            " and not exists (select from rowcast.log as o where o.event_id = e.id)",
        ),
        NONE,
        (ORDER, "f.xid::text::bigint as tx,"),
    ),
    "the order of first events": ((ORDER, "min(f.id) over (partition by f.xid) as tx,"),),
    "running transactions are forgotten": (NONE,),
}


class Numbering:
    """A leader, one statement at a time."""

    def __init__(self, connection: Connection, statement: str) -> None:
        self._connection = connection
        self._statement = statement
        self._state: dict[str, Any] = {}

    async def lead(self) -> None:
        """Begin a term where the log says that numbering has come."""
        opened = await self._connection.fetchrow(query("open_term"), False)
        assert opened is not None
        self._state = dict(opened)

    async def number(self) -> None:
        _, xmax, running = self._state["snapshot"].split(":")
        xids = [xid for xid in running.split(",") if xid]
        state = self._state
        row, *_ = await self._connection.fetch(
            self._statement, state["term"], state["base"], xmax, xids, state["first_segment"], 0, FOLLOWER_LOCK
        )
        self._state |= {"snapshot": row["snapshot"], "base": row["last_seq"]}


class Bench:
    """Connections that write, a leader that numbers, and what was committed."""

    def __init__(self, dsn: str, pool: Pool, connections: Sequence[Connection], numbering: Numbering) -> None:
        self.dsn = dsn
        self.pool = pool
        self.connections = connections
        self.numbering = numbering
        self.committed: set[tuple[int, int]] = set()

    async def write(self, connection: Connection, row: int) -> tuple[int, int]:
        version = await connection.fetchval(
            "update app.rows set version = version + 1 where id = $1 returning version", row
        )
        return row, version

    async def told(self) -> list[Change]:
        found: list[Change] = []
        log = PgLogReader(self.pool)
        while changes := await log.read(found[-1].seq if found else Seq(0), 1000):
            found += changes
        return found

    async def faults(self) -> set[str]:
        """What does not hold of the log."""
        changes = await self.told()
        told = [
            (record["id"], record["version"]) for change in changes if (record := json.loads(change.record or ""))
        ]
        versions: defaultdict[int, list[int]] = defaultdict(list)
        for row, version in told:
            versions[row].append(version)
        transactions = [
            change.tx for place, change in enumerate(changes) if not place or changes[place - 1].tx != change.tx
        ]
        terms = await self.pool.fetch("select base from rowcast.terms order by term")
        bases = {term["base"] + 1 for term in terms}
        return {
            name
            for name, holds in {
                "lost": self.committed <= set(told),
                "never committed": set(told) <= self.committed,
                "twice": len(told) == len(set(told)),
                "a row's order": all(history == sorted(history) for history in versions.values()),
                "a torn transaction": len(transactions) == len(set(transactions)),
                "a gap": all(
                    change.seq in bases or changes[place - 1].seq + 1 == change.seq
                    for place, change in enumerate(changes)
                ),
            }.items()
            if not holds
        }


Make = Callable[..., Awaitable[Bench]]


@pytest.fixture
async def bench(database: str) -> AsyncIterator[Make]:
    """Makes a bench; given changes to the statement that numbers, that of a mutant."""
    pool = await open_pool(database, application_name="test", max_size=2)
    connections = [await connect(database, application_name=f"writer {number}") for number in range(4)]
    await connections[0].execute(ROWS)
    for connection in connections:
        await connection.execute("set rowcast.ring = off")  # what rings cannot be prepared

    async def make(changes: Sequence[tuple[str, str]] = ()) -> Bench:
        statement = query("number_events")
        for old, new in changes:
            assert old in statement
            statement = statement.replace(old, new)
        numbering = Numbering(connections[3], statement)
        await numbering.lead()
        return Bench(database, pool, connections[:3], numbering)

    yield make
    for connection in connections:
        await connection.close()
    await pool.close()


async def run_program(bench: Bench, number: int, steps: int = 40) -> None:
    """A random program: begin, write, take back, prepare, end in any order, and number in between."""
    chance = random.Random(number)
    writing: dict[int, list[tuple[int, int]]] = {}  # by connection
    prepared: dict[str, list[tuple[int, int]]] = {}

    def locked(row: int, by: int) -> bool:
        others = [written for one, written in writing.items() if one != by]
        return any(row == one for written in (*others, *prepared.values()) for one, _ in written)

    async def end(who: int, how: str) -> None:
        written, connection = writing.pop(who), bench.connections[who]
        if how == "prepare":
            name = f"p{number}_{len(prepared)}_{chance.random()}"
            await connection.execute(f"prepare transaction '{name}'")
            prepared[name] = written
        else:
            await connection.execute(how)
            bench.committed |= set(written) if how == "commit" else set()

    async def end_prepared(name: str, how: str) -> None:
        written = prepared.pop(name)
        await bench.pool.execute(f"{how} prepared '{name}'")
        bench.committed |= set(written) if how == "commit" else set()

    for _ in range(steps):
        who, row = chance.randrange(len(bench.connections)), chance.randint(1, 4)
        connection = bench.connections[who]
        match chance.choice(
            ("begin", "write", "write", "write", "take back", "end", "end", "end prepared", "number")
        ):
            case "begin" if who not in writing:
                await connection.execute("begin")
                writing[who] = []
                if chance.random() < 0.5:
                    await connection.execute("select pg_current_xact_id()")
            case "write" if who in writing and not locked(row, who):
                writing[who].append(await bench.write(connection, row))
            case "write" if who not in writing and not locked(row, who):
                bench.committed.add(await bench.write(connection, row))
            case "take back" if who in writing and not locked(row, who):
                await connection.execute("savepoint here")
                await bench.write(connection, row)
                await connection.execute("rollback to here")
            case "end" if who in writing:
                await end(who, chance.choice(("commit", "commit", "commit", "rollback", "prepare")))
            case "end prepared" if prepared:
                await end_prepared(chance.choice(sorted(prepared)), chance.choice(("commit", "commit", "rollback")))
            case "number":
                if chance.random() < 0.1:
                    await bench.numbering.lead()
                await bench.numbering.number()
    for who in sorted(writing):
        await end(who, "commit")
    for name in sorted(prepared):
        await end_prepared(name, "commit")
    await bench.numbering.number()


async def run_programs(bench: Bench, limit: int) -> set[str]:
    """Programs until one shows a fault, and what that is."""
    for number in range(limit):
        await run_program(bench, number)
        if number % 10 == 9 and (faults := await bench.faults()):
            return faults
    return await bench.faults()


async def test_no_program_makes_the_numbering_lose_repeat_or_turn_anything_round(bench: Make) -> None:
    assert set() == await run_programs(await bench(), 150)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a naive cursor", "lost"),
        ("the horizon of xmin", "a row's order"),
        ("the order of first events", "a row's order"),
        ("running transactions are forgotten", "lost"),
    ],
)
async def test_a_numbering_by_another_rule_is_caught_by_the_same_programs(bench: Make, name: str, fault: str) -> None:
    assert fault in await run_programs(await bench(MUTANTS[name]), 60)


async def early_ids(bench: Bench) -> None:
    """Three transactions that have their ids early write one row, in every order and with numberings anywhere."""
    for order in permutations(range(3)):
        for numbered in product((False, True), repeat=3):
            for connection in bench.connections:
                await connection.execute("begin; select pg_current_xact_id()")
            for who, number in zip(order, numbered, strict=True):
                written = [await bench.write(bench.connections[who], row) for row in (1, 2 + who)]
                await bench.connections[who].execute("commit")
                bench.committed |= set(written)
                if number:
                    await bench.numbering.number()
            await bench.numbering.number()


async def test_ids_that_are_taken_early_turn_no_row_round_in_any_order_of_commits(bench: Make) -> None:
    made = await bench()
    await early_ids(made)
    assert set() == await made.faults()


async def test_the_horizon_of_xmin_is_caught_where_ids_are_taken_early(bench: Make) -> None:
    made = await bench(MUTANTS["the horizon of xmin"])
    await early_ids(made)
    assert {"a row's order"} == await made.faults()
