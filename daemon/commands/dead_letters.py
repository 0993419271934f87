"""`daemon dead-letters`: lists, shows, replays and drops changes that did not fit their row model."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import ClassVar, Final

import click

from daemon.core.errors import OperatorFault
from daemon.log import dead_letters
from daemon.log.dead_letters import Selection
from daemon.postgres.connect import SESSION, Connection, Record, connect
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, address_of, explain
from daemon.schema.health import SchemaNotCurrent
from daemon.settings import Settings

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class StaleDeadLetters(OperatorFault):
    """Not replayed because they are out of date: {refused} (see above). Drop them."""

    exit_code: ClassVar[int] = 38

    def __init__(self, refused: int) -> None:
        self.refused = refused


async def show_list(settings: Settings, selection: Selection, *, as_json: bool) -> None:
    """Print a line for each dead letter, without its record, the newest last. Raises an OperatorFault."""
    async with _database(settings) as connection:
        for dead_letter in await dead_letters.find(connection, selection):
            click.echo(_escape(dead_letter["json"]) if as_json else line(dead_letter))


def line(dead_letter: Record) -> str:
    """A dead letter for the terminal: its time, number, table, topic, kind, key, and the reason."""
    parts = [
        click.style(dead_letter["at"], dim=True),
        f"{dead_letter['seq']:>9}",
        f"{dead_letter['pack']}.{dead_letter['table_name']}",
        _escape(dead_letter["topic"]),
        click.style(dead_letter["kind"], bold=True),
        _escape(dead_letter["key"]),
        click.style(_escape(dead_letter["reason"]), fg="red"),
    ]
    return " ".join(parts)


def _escape(text: str) -> str:
    """Escape control characters, so that the text is one line and cannot control the terminal."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


async def show(settings: Settings, seq: int) -> None:
    """Print one dead letter as JSON, including its record. Raises an OperatorFault."""
    async with _database(settings) as connection:
        text = await dead_letters.fetch(connection, seq)
    click.echo("\n".join(map(_escape, text.split("\n"))))


async def replay(settings: Settings, selection: Selection) -> None:
    """Replay the selected dead letters, and print how many. Raises an OperatorFault.

    Stale ones are kept, with a line each that says why, and StaleDeadLetters is raised at the end.
    """
    refused = 0

    def report(refusal: dead_letters.Refusal) -> None:
        nonlocal refused
        refused += 1
        click.echo(
            f"{refusal.seq} of {refusal.table} is not replayed: {dead_letters.REFUSALS[refusal.reason]}", err=True
        )

    async with _database(settings) as connection:
        replayed = await dead_letters.replay(connection, selection, report)
    click.echo(f"replayed {_counted(replayed)}")
    if refused:
        raise StaleDeadLetters(refused)


async def drop(settings: Settings, selection: Selection) -> None:
    """Delete the selected dead letters, and print how many. Raises an OperatorFault."""
    async with _database(settings) as connection:
        dropped = await dead_letters.drop(connection, selection)
    click.echo(f"dropped {_counted(dropped)}")


def _counted(number: int) -> str:
    return f"{number} dead letter{'' if number == 1 else 's'}"


@asynccontextmanager
async def _database(settings: Settings) -> AsyncIterator[Connection]:
    """A database connection. Driver errors in the block are raised as an OperatorFault."""
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
            raise SchemaNotCurrent("there are no dead letters in this database") from None
        raise fault from None
    finally:
        connection.terminate()
