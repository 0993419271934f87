"""The numbering on a real Postgres, under random programs of several connections, one statement at a time.

A program depends only on its seed: each statement is awaited before the next, and statements that would wait for a
row lock are skipped.
"""

import json
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from itertools import permutations, product

import pytest

from daemon.core.change import Change, Seq
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from tests.support.log import ROWS, ManualLeader

NEW = "e.xid >= $3::text::xid8"
IN_PROGRESS = "e.xid = any ($4::text []::xid8 [])"
ORDER = "max(f.id) over (partition by f.xid) as tx,"

USE_PARAMETER = "and $3::text is not null"
NO_IN_PROGRESS = (IN_PROGRESS, "$4::text [] is null")

MUTANTS = {
    "a naive cursor": (
        (NEW, f"e.id > (select coalesce(max(o.event_id), 0) from rowcast.log as o) {USE_PARAMETER}"),
        NO_IN_PROGRESS,
    ),
    "the xmin horizon": (
        (
            NEW,
            f"e.xid < pg_snapshot_xmin(pg_current_snapshot()) {USE_PARAMETER}"
            " and not exists (select from rowcast.log as o where o.event_id = e.id)",
        ),
        NO_IN_PROGRESS,
        (ORDER, "f.xid::text::bigint as tx,"),
    ),
    "ordered by first event": ((ORDER, "min(f.id) over (partition by f.xid) as tx,"),),
    "transactions in progress are forgotten": (NO_IN_PROGRESS,),
}


class Bench:
    """Connections that write, a leader that numbers, and the committed versions."""

    def __init__(self, dsn: str, pool: Pool, connections: Sequence[Connection], numbering: ManualLeader) -> None:
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

    async def changes(self) -> list[Change]:
        found: list[Change] = []
        log = PgLogReader(self.pool)
        while changes := await log.read(found[-1].seq if found else Seq(0), 1000):
            found += changes
        return found

    async def faults(self) -> set[str]:
        """The names of the promises that the log breaks."""
        changes = await self.changes()
        sent = [
            (record["id"], record["version"]) for change in changes if (record := json.loads(change.record or ""))
        ]
        versions: defaultdict[int, list[int]] = defaultdict(list)
        for row, version in sent:
            versions[row].append(version)
        transactions = [
            change.tx for place, change in enumerate(changes) if not place or changes[place - 1].tx != change.tx
        ]
        terms = await self.pool.fetch("select base from rowcast.terms order by term")
        bases = {term["base"] + 1 for term in terms}
        return {
            name
            for name, holds in {
                "lost": self.committed <= set(sent),
                "never committed": set(sent) <= self.committed,
                "twice": len(sent) == len(set(sent)),
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
    """Makes a bench; given changes to the statements that number, that of a mutant."""
    pool = await open_pool(database, application_name="test", max_size=2)
    connections = [await connect(database, application_name=f"writer {number}") for number in range(4)]
    await connections[0].execute(ROWS)
    for connection in connections:
        await connection.execute("set rowcast.ring = off")  # what rings cannot be prepared

    async def make(changes: Sequence[tuple[str, str]] = ()) -> Bench:
        numbering = ManualLeader(connections[3], changes)
        await numbering.lead()
        return Bench(database, pool, connections[:3], numbering)

    yield make
    for connection in connections:
        await connection.close()
    await pool.close()


async def run_program(bench: Bench, seed: int, steps: int = 40) -> None:
    """A random program: begin, write, roll back to a savepoint, prepare, end, and number in any order."""
    chance = random.Random(seed)
    writing: dict[int, list[tuple[int, int]]] = {}  # by connection
    prepared: dict[str, list[tuple[int, int]]] = {}

    def locked(row: int, writer: int) -> bool:
        others = [written for one, written in writing.items() if one != writer]
        return any(row == one for written in (*others, *prepared.values()) for one, _ in written)

    async def end(writer: int, how: str) -> None:
        written, connection = writing.pop(writer), bench.connections[writer]
        if how == "prepare":
            name = f"p{seed}_{len(prepared)}_{chance.random()}"
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
        writer, row = chance.randrange(len(bench.connections)), chance.randint(1, 4)
        connection = bench.connections[writer]
        match chance.choice(
            ("begin", "write", "write", "write", "savepoint", "end", "end", "end prepared", "number")
        ):
            case "begin" if writer not in writing:
                await connection.execute("begin")
                writing[writer] = []
                if chance.random() < 0.5:
                    await connection.execute("select pg_current_xact_id()")
            case "write" if writer in writing and not locked(row, writer):
                writing[writer].append(await bench.write(connection, row))
            case "write" if writer not in writing and not locked(row, writer):
                bench.committed.add(await bench.write(connection, row))
            case "savepoint" if writer in writing and not locked(row, writer):
                await connection.execute("savepoint here")
                await bench.write(connection, row)
                await connection.execute("rollback to here")
            case "end" if writer in writing:
                await end(writer, chance.choice(("commit", "commit", "commit", "rollback", "prepare")))
            case "end prepared" if prepared:
                await end_prepared(chance.choice(sorted(prepared)), chance.choice(("commit", "commit", "rollback")))
            case "number":
                if chance.random() < 0.1:
                    await bench.numbering.lead()
                bench.numbering.few = chance.random() < 0.7
                await bench.numbering.number()
    for writer in sorted(writing):
        await end(writer, "commit")
    for name in sorted(prepared):
        await end_prepared(name, "commit")
    await bench.numbering.number()


async def run_programs(bench: Bench, limit: int) -> set[str]:
    """Run programs until one breaks a promise; return which."""
    for seed in range(limit):
        await run_program(bench, seed)
        if seed % 10 == 9 and (faults := await bench.faults()):
            return faults
    return await bench.faults()


async def test_no_program_makes_the_numbering_lose_repeat_or_reorder_changes(bench: Make) -> None:
    assert set() == await run_programs(await bench(), 150)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("a naive cursor", "lost"),
        ("the xmin horizon", "a row's order"),
        ("ordered by first event", "a row's order"),
        ("transactions in progress are forgotten", "lost"),
    ],
)
async def test_the_same_programs_catch_a_numbering_by_another_rule(bench: Make, name: str, fault: str) -> None:
    assert fault in await run_programs(await bench(MUTANTS[name]), 60)


async def early_ids(bench: Bench) -> None:
    """Three transactions that took their ids early write one row, in every order, with numberings in between."""
    for order in permutations(range(3)):
        for numbered in product((False, True), repeat=3):
            for connection in bench.connections:
                await connection.execute("begin; select pg_current_xact_id()")
            for writer, number in zip(order, numbered, strict=True):
                written = [await bench.write(bench.connections[writer], row) for row in (1, 2 + writer)]
                await bench.connections[writer].execute("commit")
                bench.committed |= set(written)
                if number:
                    bench.numbering.few = not bench.numbering.few
                    await bench.numbering.number()
            await bench.numbering.number()


async def test_ids_taken_early_keep_every_row_in_order_for_any_order_of_commits(bench: Make) -> None:
    made = await bench()
    await early_ids(made)
    assert set() == await made.faults()


async def test_ids_taken_early_catch_the_xmin_horizon(bench: Make) -> None:
    made = await bench(MUTANTS["the xmin horizon"])
    await early_ids(made)
    assert {"a row's order"} == await made.faults()
