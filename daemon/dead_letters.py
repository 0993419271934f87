"""What the operator can do with changes that their row model refused: look at them, replay them, drop them."""

import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import ClassVar, Final

import asyncpg
import click

from daemon.app import SESSION, NotCurrent
from daemon.core.errors import OperatorFault
from daemon.postgres.connect import DRIVER_ERRORS, Connection, DatabaseFault, address_of, connect, explain
from daemon.postgres.queries import query
from daemon.settings import Settings

_REFUSALS: Final = {
    "forgotten": "its event is no longer in the log, and nobody can say what became of its row",
    "gone": "its row has been deleted since",
    "changed": "its row has changed since",
}
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class UnknownLetter(OperatorFault):
    """There is no dead letter {seqs}: `daemon dead-letters list` shows those that there are."""

    exit_code: ClassVar[int] = 37

    def __init__(self, seqs: Iterable[int]) -> None:
        self.seqs = ", ".join(map(str, sorted(seqs)))


class OutOfDate(OperatorFault):
    """{refused} of the dead letters would tell what is no longer true, as said above: drop them."""

    exit_code: ClassVar[int] = 38

    def __init__(self, refused: int) -> None:
        self.refused = refused


@dataclass(frozen=True)
class Selection:
    """Which letters are meant. None is no restriction."""

    seqs: Sequence[int] | None = None
    pack: str | None = None
    table: str | None = None
    limit: int | None = None  # only the newest


async def show_list(settings: Settings, selection: Selection, *, as_json: bool) -> None:
    """Print one line for each letter, without its record, the newest last. Raises an OperatorFault."""
    async with _database(settings) as connection:
        for letter in await _find(connection, selection):
            click.echo(_visible(letter["json"]) if as_json else line(letter))


def line(letter: asyncpg.Record) -> str:
    """One letter as a person reads it: when, which number it had, what happened to which row, and what is wrong."""
    parts = [
        click.style(letter["at"], dim=True),
        f"{letter['seq']:>9}",
        f"{letter['pack']}.{letter['table_name']}",
        _visible(letter["topic"]),
        click.style(letter["kind"], bold=True),
        _visible(letter["key"]),
        click.style(_visible(letter["reason"]), fg="red"),
    ]
    return " ".join(parts)


def _visible(text: str) -> str:
    """The same on one line that no terminal obeys."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


async def show(settings: Settings, seq: int) -> None:
    """Print all of one letter, its record included, as JSON. Raises an OperatorFault."""
    async with _database(settings) as connection:
        whole: str | None = await connection.fetchval(query("whole_letter"), seq)
    if whole is None:
        raise UnknownLetter([seq])
    click.echo("\n".join(map(_visible, whole.split("\n"))))


async def replay(settings: Settings, selection: Selection) -> None:
    """Tell these changes again, under new numbers, and say how many they were. Raises an OperatorFault.

    Those that would tell what is no longer true stay, each with a line that says why; OutOfDate ends it then.
    """
    replayed = refused = 0
    async with _database(settings) as connection:
        rows: dict[tuple[str, str, str], list[int]] = {}
        for letter in await _find(connection, selection):
            rows.setdefault(itemgetter("schema_name", "table_name", "key")(letter), []).append(letter["seq"])
        for (schema, table, key), seqs in rows.items():
            # A transaction for each row: an application that writes to it waits for no more than that.
            async with connection.transaction(isolation="read_committed"):
                await connection.execute(query("share_letters"))
                lives = await _lock(connection, schema, table, key)
                verdicts = await connection.fetch(query("judge_letters"), seqs, lives)
                good = [seq for seq, refusal in verdicts if refusal is None]
                replayed += await connection.fetchval(query("replay_letters"), good)
            for seq, refusal in verdicts:
                if refusal is not None:
                    refused += 1
                    click.echo(f"{seq} of {schema}.{table} stays: {_REFUSALS[refusal]}", err=True)
    click.echo(f"replayed {_counted(replayed)}")
    if refused:
        raise OutOfDate(refused)


async def _lock(connection: Connection, schema: str, table: str, key: str) -> bool:
    """Does the row live? Until the transaction ends nobody changes that, nor the row."""
    statement = await connection.fetchval(query("lock_row"), schema, table)
    return bool(statement and await connection.fetchval(statement, key))


async def drop(settings: Settings, selection: Selection) -> None:
    """Delete these letters, and say how many they were. Raises an OperatorFault."""
    async with _database(settings) as connection:
        seqs = [letter["seq"] for letter in await _find(connection, selection)]
        dropped = await connection.fetchval(query("drop_letters"), seqs)
    click.echo(f"dropped {_counted(dropped)}")


async def _find(connection: Connection, selection: Selection) -> list[asyncpg.Record]:
    """The letters that are meant, oldest first. Raises UnknownLetter, if any that is named is not there."""
    letters = await connection.fetch(
        query("letters"), selection.seqs, selection.pack, selection.table, selection.limit
    )
    if missing := set(selection.seqs or ()) - {letter["seq"] for letter in letters}:
        raise UnknownLetter(islice(missing, 10))
    return letters


def _counted(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Connection]:
    """A connection for the block. Raises an OperatorFault for what goes wrong with it there."""
    dsn = settings.require_dsn()
    connection = await connect(
        dsn,
        application_name="rowcast dead-letters",
        server_settings=SESSION,
        attempts=settings.connect_attempts,
    )
    try:
        yield connection
    except DRIVER_ERRORS as error:
        fault = explain(error, address=address_of(dsn))
        if isinstance(fault, DatabaseFault) and fault.sqlstate in ("3F000", "42P01"):
            raise NotCurrent("there are no dead letters in this database") from None
        raise fault from None
    finally:
        connection.terminate()
