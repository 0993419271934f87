"""Runs a case on a real Postgres and compares what clients saw with what the tables say."""

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import asyncpg

from daemon.core.change import CONTENT, RESET_KINDS, Change, Kind, Seq
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool, open_pool
from tests.postgres.truth.case import Case, Transaction, Watched
from tests.postgres.truth.tables import LONG
from tests.postgres.truth.values import OWN_TYPES
from tests.support.log import leader, until_numbered

PINNED = {
    "search_path": "pg_catalog, pg_temp", "timezone": "UTC", "datestyle": "ISO, YMD", "intervalstyle": "postgres",
    "extra_float_digits": "1", "bytea_output": "hex", "lc_monetary": "C", "quote_all_identifiers": "off",
    "standard_conforming_strings": "on", "client_min_messages": "error",
}  # fmt: skip
"""What the text of a value may depend on."""

CASES_OF_A_SESSION = 20

ROLES = """
do $$ begin create role truth_writer; exception when duplicate_object or unique_violation then null; end $$;
grant create on schema public to public;
"""
CLEAN = """
drop schema if exists app cascade;
drop schema public cascade;
create schema public;
create schema app;
truncate own.leaked;
select rowcast.unwatch_dropped();
"""
GRANTS = """
grant usage on schema app to truth_writer;
grant all on all tables in schema app to truth_writer;
"""
WITHOUT_CAPTURE = """
do $$
declare
    t record;
begin
    for t in
        select g.tgrelid::regclass as relation, g.tgname from pg_catalog.pg_trigger as g
        join pg_catalog.pg_proc as p on p.oid = g.tgfoid
        where p.pronamespace = 'rowcast'::regnamespace and g.tgparentid = 0
    loop
        execute pg_catalog.format('alter table %s disable trigger %I', t.relation, t.tgname);
    end loop;
end $$
"""

Row = tuple[str, str]  # table and key
Rooms = dict[str, dict[Row, str | None]]  # the records of each topic


@dataclass
class Verdict:
    """What a trial found. `refused`: why `watch` did not take a table. A case that cannot be set up is `invalid`."""

    problems: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    invalid: str = ""
    committed: int = 0
    failed: int = 0
    changes: int = 0


@dataclass(frozen=True)
class Said:
    """What the tables say after a commit: the records of each topic, and the rows that are not deleted."""

    rooms: Rooms
    rows: frozenset[Row]


def _without_details(outcomes: Sequence[str | None]) -> list[str | None]:
    """Which of several violations a commit reports depends on where the rows are on their pages."""
    return [outcome and outcome.partition("\n")[0] for outcome in outcomes]


async def _admin(dsn: str) -> Connection:
    return await asyncpg.connect(dsn, server_settings=PINNED, statement_cache_size=0)


async def _writer(dsn: str) -> Connection:
    return await asyncpg.connect(dsn, statement_cache_size=0)


class Trial:
    """A database for any number of cases, one after the other."""

    def __init__(self, dsn: str, admin: Connection, writer: Connection, pool: Pool) -> None:
        self.admin = admin
        self.writer = writer
        self.pool = pool
        self._dsn = dsn
        self._cases = 0
        self._position = Seq(0)

    @classmethod
    @asynccontextmanager
    async def opened(cls, dsn: str) -> AsyncIterator["Trial"]:
        """A trial in a database with Rowcast's own schema, and a leader that numbers its events."""
        pool = await open_pool(dsn, application_name="test", max_size=4)
        trial = cls(dsn, await _admin(dsn), await _writer(dsn), pool)
        try:
            await trial.admin.execute(ROLES + OWN_TYPES)
            async with leader(dsn, pool, poll_every=0.005):
                yield trial
        finally:
            await asyncio.gather(trial.admin.close(), trial.writer.close(), pool.close())

    async def _begin(self) -> None:
        # A session keeps what it has planned for tables that are gone, and looks through all of it at each DDL.
        self._cases += 1
        if self._cases % CASES_OF_A_SESSION == 0:
            await asyncio.gather(self.admin.close(), self.writer.close())
            self.admin, self.writer = await _admin(self._dsn), await _writer(self._dsn)
        await self.writer.execute("discard all")

    async def run(self, case: Case) -> Verdict:
        verdict = Verdict()
        await self._begin()
        await self.admin.execute(CLEAN)
        try:
            await self.admin.execute(";\n".join(("select 1", *case.setup)))
        except asyncpg.PostgresError as error:
            verdict.invalid = str(error)
            return verdict
        watched = [w for w in case.watched if await self._watch(w, verdict)]
        if verdict.invalid:
            return verdict
        try:
            await self.admin.execute(";\n".join((*case.nests, GRANTS)))
            await self.writer.execute(";\n".join(("select 1", *case.settings)))
        except asyncpg.PostgresError as error:
            verdict.invalid = str(error)
            return verdict
        await self._changes()  # tables of these names were watched before
        if watched:
            await self._write(case, watched, verdict)
        if leaked := await self.admin.fetchval("select string_agg(distinct by_user, ', ') from own.leaked"):
            verdict.problems.append(f"capture ran the code of a type's cast, as {leaked}")
        return verdict

    async def _watch(self, watched: Watched, verdict: Verdict) -> bool:
        try:
            await self.admin.execute(watched.call)
        except asyncpg.PostgresError as error:
            if isinstance(error, asyncpg.UndefinedTableError):
                verdict.invalid = str(error)
            elif not str(error).startswith("rowcast: ") and not isinstance(error, asyncpg.InsufficientPrivilegeError):
                verdict.problems.append(f"watch fails without saying why: {error}")
            verdict.refused.append(str(error))
            return False
        return True

    async def _write(self, case: Case, watched: Sequence[Watched], verdict: Verdict) -> None:
        client = Client()
        for transaction in case.transactions:
            outcomes, bare = await self._run(transaction, case.savepoints)
            if any(outcomes):
                verdict.failed += 1
                if _without_details(bare) != _without_details(outcomes):
                    verdict.problems.append(f"outcomes {outcomes}, without capture {bare}, of {transaction}")
            else:
                verdict.committed += 1
            changes = await self._changes()
            verdict.changes += len(changes)
            try:
                said = await self._say(watched)
            except asyncpg.PostgresError as error:
                verdict.invalid = f"the oracle: {error}"
                return
            reasons = resets_explained(transaction, case)
            problems = client.check(changes, said, reasons)
            if problems:
                verdict.problems += [f"after {transaction}:", *problems]
                return

    async def _run(self, transaction: Transaction, savepoints: bool) -> tuple[list[str | None], list[str | None]]:
        """The error of each statement and of the commit; if there is one, also without capture."""
        await self.writer.execute(f"begin isolation level {transaction.isolation}")
        outcomes = await self._statements(transaction, savepoints)
        bare = list(outcomes)
        commits = transaction.commits and (savepoints or not any(outcomes))
        if any(outcomes):
            await self.writer.execute("rollback")
            bare = await self._run_bare(transaction, savepoints)
            await self.writer.execute("rollback")
            await self.writer.execute(f"begin isolation level {transaction.isolation}")
            await self._statements(transaction, savepoints)
        outcomes.append(await self._execute("commit" if commits else "rollback", savepoint=False))
        if outcomes[-1]:
            bare = [*await self._run_bare(transaction, savepoints), await self._execute("commit", savepoint=False)]
        else:
            bare.append(None)
        return outcomes, bare

    async def _statements(self, transaction: Transaction, savepoints: bool) -> list[str | None]:
        outcomes: list[str | None] = []
        for statement in transaction.statements:
            outcomes.append(await self._execute(statement, savepoints))
            if outcomes[-1] and not savepoints:
                break
        return outcomes

    async def _execute(self, statement: str, savepoint: bool) -> str | None:
        if statement.startswith(("savepoint", "rollback")):
            savepoint = False
        try:
            if savepoint:
                await self.writer.execute("savepoint truth")
            if statement.startswith("copy "):
                command, _, lines = statement.partition("\n")
                await self.writer._copy_in(command, BytesIO(lines.encode() + b"\n"), 60)  # type: ignore[attr-defined]
            else:
                await self.writer.execute(statement)
            if savepoint:
                await self.writer.execute("release savepoint truth")
        except asyncpg.PostgresError as error:
            if savepoint:
                await self.writer.execute("rollback to savepoint truth")
            return f"{error.sqlstate} {error}"
        return None

    async def _run_bare(self, transaction: Transaction, savepoints: bool) -> list[str | None]:
        """Begin the same without capture."""
        role = await self.writer.fetchval("select current_setting('role')")
        await self.writer.execute(f"begin isolation level {transaction.isolation}; set local role none")
        await self.writer.execute(WITHOUT_CAPTURE)
        await self.writer.execute(f"set local role {role}")
        return await self._statements(transaction, savepoints)

    async def _changes(self) -> Sequence[Change]:
        await until_numbered(self.pool)
        changes = await PgLogReader(self.pool).read(self._position, 100_000)
        if changes:
            self._position = changes[-1].seq
        return changes

    async def _say(self, watched: Iterable[Watched]) -> Said:
        rooms: Rooms = defaultdict(dict)
        rows: set[Row] = set()
        for table in watched:
            for topics, key, record in await self.admin.fetch(table.rows):
                row = (table.relation, key)
                rows.add(row)
                for topic in [topics] if isinstance(topics, str) else topics or ():
                    if topic is not None:
                        rooms[topic][row] = record
        return Said(rooms, frozenset(rows))


def resets_explained(transaction: Transaction, case: Case) -> set[Kind]:
    """The kinds of reset that this transaction may cause."""
    text = " ".join((*transaction.statements, *case.nests))
    long = any(column.type is LONG for watched in case.watched for column in watched.key)
    partitioned = any(" partition by " in line for line in case.setup)
    keys = {f"{column.quoted} = " for watched in case.watched for column in watched.key} if partitioned else set()
    by_merge = any(f" then update set {key}" in text for key in keys)
    with_others = any(sum(key in sets for key in keys) > 1 for sets in re.findall(r" set (.*?)(?= where |;|$)", text))
    uncaptured = "rowcast." in text
    reasons = {
        Kind.TRUNCATE: "truncate " in text,
        Kind.LIMIT: long,
        Kind.LOST: by_merge or with_others or uncaptured,
    }
    return {kind for kind, explained in reasons.items() if explained}


class Client:
    """Follows every topic. Applies changes as a client library does, and checks each transaction."""

    def __init__(self) -> None:
        self.rooms: Rooms = defaultdict(dict)

    def check(self, changes: Sequence[Change], said: Said, reasons: set[Kind]) -> list[str]:
        problems = [
            f"a reset for no reason: {change.kind} {change.topic}"
            for change in changes
            if change.kind in RESET_KINDS and change.kind not in reasons
        ]
        problems += [
            f"content of a row that was deleted: {c.topic} {c.key} {c.record}" for c in ghosts(changes, said)
        ]
        before = {topic: dict(rows) for topic, rows in self.rooms.items()}
        for change in changes:
            self._apply(change)
        every = {*self.rooms, *said.rooms}
        anew = {
            room
            for reset in {change.topic for change in changes if change.kind in RESET_KINDS}
            for room in (every if reset.startswith("*") else {str(reset)})
        }
        for room in anew:
            self.rooms[room] = dict(said.rooms.get(room, {}))
        for topic in sorted({*self.rooms, *said.rooms}):
            problems += _differences(topic, self.rooms.get(topic, {}), said.rooms.get(topic, {}))
        problems += _unnamed_columns([change for change in changes if change.topic not in anew], before, self.rooms)
        if problems:
            problems += [
                "the changes were:",
                *(f"  {c.topic} {c.kind} {c.key} {c.record} {c.changed}" for c in changes),
            ]
        return problems

    def _apply(self, change: Change) -> None:
        if change.kind in CONTENT:
            self.rooms[change.topic][_row(change)] = change.record
        elif change.kind not in RESET_KINDS:
            self.rooms[change.topic].pop(_row(change), None)


def ghosts(changes: Sequence[Change], said: Said) -> list[Change]:
    """Changes with content of rows that do not exist.

    Unless they then left the topic, or their table was reset.
    """
    reset = {change.table for change in changes if change.kind in {Kind.TRUNCATE, Kind.LOST}}
    left = {(change.topic, _row(change)) for change in changes if change.kind is Kind.LEAVE}
    return [
        change
        for change in changes
        if change.kind in CONTENT
        and change.record is not None
        and _row(change) not in said.rows
        and change.table not in reset
        and (change.topic, _row(change)) not in left
    ]


def _row(change: Change) -> Row:
    return (relation_of(change), change.key)


def relation_of(change: Change) -> str:
    def quoted(name: str) -> str:
        return '"' + name.replace('"', '""') + '"'

    return f"{change.schema}.{quoted(change.table)}"


def _differences(topic: str, got: dict[Row, str | None], right: dict[Row, str | None]) -> list[str]:
    return [
        f"topic {topic!r}, row {row}: the client has {got.get(row, 'nothing')}, the table {right.get(row, 'nothing')}"
        for row in sorted({*got, *right})
        if row not in got or row not in right or got[row] != right[row]
    ]


def _unnamed_columns(changes: Sequence[Change], before: Rooms, after: Rooms) -> list[str]:
    """Columns of a row that changed although no update of the transaction names them."""
    named: dict[tuple[str, Row], set[str]] = defaultdict(set)
    complete: set[tuple[str, Row]] = set()
    for change in changes:
        if change.kind is Kind.UPDATE:
            named[change.topic, _row(change)].update(change.changed)
        elif change.kind not in RESET_KINDS:
            complete.add((change.topic, _row(change)))
    problems = []
    for (topic, row), names in named.items():
        old, new = before.get(topic, {}).get(row), after.get(topic, {}).get(row)
        if old and new and (topic, row) not in complete:
            was, is_ = _members(old), _members(new)
            missing = {name for name in is_ if was.get(name) != is_[name]} - names
            if missing:
                problems.append(
                    f"topic {topic!r}, row {row}: {sorted(missing)} changed, the updates name {sorted(names)}"
                )
    return problems


def _members(record: str) -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = json.loads(
        record, object_pairs_hook=list, parse_float=str, parse_int=str, parse_constant=str
    )
    return dict(pairs)
