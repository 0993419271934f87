"""Dead letters: changes that their model refused, stored, listed, replayed and dropped."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import ClassVar, NamedTuple

import asyncpg

from daemon.core.change import Change
from daemon.core.errors import OperatorFault
from daemon.log.queries import query
from daemon.log.reader import translated
from daemon.postgres.connect import Connection, Pool, acquired

STORE_TIMEOUT = 30.0  # seconds


class DeadLetters:
    """Where changes go that their model refused."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def store_dead_letters(self, letters: Sequence[tuple[Change, str, str]]) -> None:
        """Keep each (change, pack, reason). Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, STORE_TIMEOUT) as connection:
                await connection.executemany(
                    query("store_dead_letters"), [(c.seq, pack, why) for c, pack, why in letters]
                )


class UnknownDeadLetter(OperatorFault):
    """There is no dead letter {seqs}: run `daemon dead-letters list` to see which exist."""

    exit_code: ClassVar[int] = 37

    def __init__(self, seqs: Iterable[int]) -> None:
        self.seqs = ", ".join(map(str, sorted(seqs)))


@dataclass(frozen=True)
class Selection:
    """Which letters are meant. None is no restriction."""

    seqs: Sequence[int] | None = None
    pack: str | None = None
    table: str | None = None
    limit: int | None = None  # only the newest


class Refusal(NamedTuple):
    """A dead letter that is not replayed, and why: `forgotten`, `gone` or `changed`."""

    seq: int
    table: str
    reason: str


async def find(connection: Connection, selection: Selection) -> list[asyncpg.Record]:
    """The selected dead letters, oldest first. Raises UnknownDeadLetter if one that is named does not exist."""
    letters = await connection.fetch(
        query("dead_letters"), selection.seqs, selection.pack, selection.table, selection.limit
    )
    if missing := set(selection.seqs or ()) - {letter["seq"] for letter in letters}:
        raise UnknownDeadLetter(islice(missing, 10))
    return letters


async def fetch(connection: Connection, seq: int) -> str:
    """One dead letter as JSON, its record included. Raises UnknownDeadLetter."""
    whole: str | None = await connection.fetchval(query("dead_letter"), seq)
    if whole is None:
        raise UnknownDeadLetter([seq])
    return whole


async def replay(connection: Connection, selection: Selection) -> tuple[int, list[Refusal]]:
    """Append the selected changes to the log under new numbers, unless they are stale.

    Returns how many were replayed, and those that were not. Raises UnknownDeadLetter.
    """
    replayed = 0
    refusals: list[Refusal] = []
    rows: dict[tuple[str, str, str], list[int]] = {}
    for letter in await find(connection, selection):
        rows.setdefault(itemgetter("schema_name", "table_name", "key")(letter), []).append(letter["seq"])
    for (schema, table, key), seqs in rows.items():
        # One transaction per row, so that an application that writes to the row waits no longer than that.
        async with connection.transaction(isolation="read_committed"):
            await connection.execute(query("lock_dead_letters"))
            exists = await _lock_row(connection, schema, table, key)
            verdicts = await connection.fetch(query("check_replayable"), seqs, exists)
            good = [seq for seq, reason in verdicts if reason is None]
            replayed += await connection.fetchval(query("replay_dead_letters"), good)
        refusals += [Refusal(seq, f"{schema}.{table}", reason) for seq, reason in verdicts if reason is not None]
    return replayed, refusals


async def _lock_row(connection: Connection, schema: str, table: str, key: str) -> bool:
    """Does the row exist? Until the transaction ends nobody changes that, nor the row."""
    statement = await connection.fetchval(query("lock_row"), schema, table)
    return bool(statement and await connection.fetchval(statement, key))


async def drop(connection: Connection, selection: Selection) -> int:
    """Delete the selected dead letters; how many there were. Raises UnknownDeadLetter."""
    seqs = [letter["seq"] for letter in await find(connection, selection)]
    dropped: int = await connection.fetchval(query("drop_dead_letters"), seqs)
    return dropped
