"""Dead letters: storing, listing, replaying and dropping the changes that failed validation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import ClassVar, Final, NamedTuple

import asyncpg

from daemon.core.change import Change
from daemon.core.errors import OperatorFault
from daemon.log.queries import query
from daemon.log.reader import translated
from daemon.postgres.connect import Connection, Pool, acquired
from daemon.postgres.errors import is_about_data

STORE_TIMEOUT = 30.0  # seconds


class DeadLetters:
    """Stores changes that must not be sent."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def store_dead_letters(self, dead_letters: Sequence[tuple[Change, str, str]]) -> None:
        """Store each (change, pack, reason), without its record if that cannot be stored. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, STORE_TIMEOUT) as connection:
                readable = [dead_letter for dead_letter in dead_letters if not dead_letter[0].unreadable]
                unreadable = [dead_letter for dead_letter in dead_letters if dead_letter[0].unreadable]
                try:
                    await _store(connection, readable)
                except Exception as error:
                    if not is_about_data(error):
                        raise
                    for dead_letter in readable:
                        try:
                            await _store(connection, [dead_letter])
                        except Exception as reason:
                            if not is_about_data(reason):
                                raise
                            unreadable.append(dead_letter)
                await connection.executemany(
                    query("store_unreadable"),
                    [(change.seq, pack, reason, change.topic) for change, pack, reason in unreadable],
                )


async def _store(connection: Connection, dead_letters: Sequence[tuple[Change, str, str]]) -> None:
    await connection.executemany(
        query("store_dead_letters"), [(change.seq, pack, reason) for change, pack, reason in dead_letters]
    )


class UnknownDeadLetter(OperatorFault):
    """There is no dead letter {seqs}: run `daemon dead-letters list` to see which exist."""

    exit_code: ClassVar[int] = 37

    def __init__(self, seqs: Iterable[int]) -> None:
        self.seqs = ", ".join(map(str, sorted(seqs)))


@dataclass(frozen=True)
class Selection:
    """Selects dead letters. None means no restriction."""

    seqs: Sequence[int] | None = None
    pack: str | None = None
    table: str | None = None
    limit: int | None = None  # only the newest


class ReplayNotAllowed(OperatorFault):
    """Replaying locks the row in {table}, which this role may not ({reason}): use {owner}, or grant usage on the \
schema, and select and update on the table, to this role."""

    exit_code: ClassVar[int] = 14

    def __init__(self, table: str, owner: str, reason: str) -> None:
        self.table, self.owner, self.reason = table, owner, reason


REFUSALS: Final = {
    "set_aside": "its event could not be numbered, and its topic has been reset",
    "forgotten": "its event is no longer in the log, so the row's later changes are unknown",
    "unreadable": "it could not be read, so there is nothing to send; update its row instead",
    "gone": "its row has been deleted since",
    "changed": "its row has changed since",
}
"""Why a dead letter is not replayed."""


class Refusal(NamedTuple):
    """A dead letter that was not replayed. `reason` is one of REFUSALS."""

    seq: int
    table: str
    reason: str


async def find(connection: Connection, selection: Selection) -> list[asyncpg.Record]:
    """The selected dead letters, oldest first. Raises UnknownDeadLetter if a selected seq does not exist."""
    found = await connection.fetch(
        query("dead_letters"), selection.seqs, selection.pack, selection.table, selection.limit
    )
    if missing := set(selection.seqs or ()) - {dead_letter["seq"] for dead_letter in found}:
        raise UnknownDeadLetter(islice(missing, 10))
    return found


async def fetch(connection: Connection, seq: int) -> str:
    """One dead letter as JSON, including its record. Raises UnknownDeadLetter."""
    text: str | None = await connection.fetchval(query("dead_letter"), seq)
    if text is None:
        raise UnknownDeadLetter([seq])
    return text


async def replay(connection: Connection, selection: Selection, on_refusal: Callable[[Refusal], None]) -> int:
    """Replay the selected changes as new ones, and return how many there were.

    Stale ones are skipped; `on_refusal` is called for each as soon as that is certain. Raises UnknownDeadLetter, and
    ReplayNotAllowed if this role may not lock a row.
    """
    replayed = 0
    rows: dict[tuple[str, str, str], list[int]] = {}
    for dead_letter in await find(connection, selection):
        row = itemgetter("schema_name", "table_name", "key")(dead_letter)
        rows.setdefault(row, []).append(dead_letter["seq"])
    for (schema, table, key), seqs in rows.items():
        # One transaction per row keeps its lock short: applications that write to the row wait for it.
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(query("lock_dead_letters"))
            try:
                async with connection.transaction():
                    live = await _lock_row(connection, schema, table, key)
            except asyncpg.InsufficientPrivilegeError as error:
                owner = await connection.fetchval(query("owner_of"), schema, table)
                raise ReplayNotAllowed(f"{schema}.{table}", owner, str(error)) from None
            verdicts = await connection.fetch(query("check_replayable"), seqs, live)
            replayable = [seq for seq, reason in verdicts if reason is None]
            replayed += await connection.fetchval(query("replay_dead_letters"), replayable)
        for seq, reason in verdicts:
            if reason is not None:
                on_refusal(Refusal(seq, f"{schema}.{table}", reason))
    return replayed


async def _lock_row(connection: Connection, schema: str, table: str, key: str) -> bool:
    """Lock the row until the transaction ends. Returns whether it exists and is not soft-deleted."""
    statement = await connection.fetchval(query("lock_row"), schema, table)
    return bool(statement and await connection.fetchval(statement, key))


async def drop(connection: Connection, selection: Selection) -> int:
    """Delete the selected dead letters; returns how many there were. Raises UnknownDeadLetter."""
    seqs = [dead_letter["seq"] for dead_letter in await find(connection, selection)]
    dropped: int = await connection.fetchval(query("drop_dead_letters"), seqs)
    return dropped
