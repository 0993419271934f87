"""`daemon tail`: follows a topic in the terminal, straight from the log in the database."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import ClassVar

import click

from daemon.core import wire
from daemon.core.change import CONTENT, Change, Kind, Position, Topic
from daemon.core.errors import BadPosition, LogTruncated, LogUnavailable, LogUnreadable, OperatorFault
from daemon.log.notifier import Notifier
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import SESSION, connect, open_pool
from daemon.settings import Settings

COLOURS = {
    Kind.INSERT: "green",
    Kind.UPDATE: "yellow",
    Kind.DELETE: "red",
    Kind.RESTORE: "cyan",
    Kind.LEAVE: "magenta",
    Kind.TRUNCATE: "red",
    Kind.LOST: "red",
    Kind.LIMIT: "red",
}
MAX_RECORD = 160  # characters of a record on a line; --json prints all of it


class CannotResume(OperatorFault):
    """Cannot continue from that position ({reason}): omit --since."""

    exit_code: ClassVar[int] = 43

    def __init__(self, reason: str) -> None:
        self.reason = reason


def line(change: Change) -> str:
    """A change for the terminal: its time, number, kind, table, key, changed columns and record."""
    record = change.record or ""
    if len(record) > MAX_RECORD:
        record = f"{record[:MAX_RECORD]}… ({len(record):,} characters)"
    parts = [
        click.style(change.at[11:23], dim=True),
        f"{change.seq:>9}",
        click.style(f"{change.kind.value:8}", fg=COLOURS[change.kind], bold=True),
        change.table,
        change.key,
        click.style(f"[{', '.join(change.changed)}]", dim=True) if change.changed else "",
        record,
    ]
    return " ".join(filter(None, parts))


async def tail(settings: Settings, topic: str, *, as_json: bool, since: str | None) -> None:
    """Print the topic's changes as they arrive, until interrupted. Raises an OperatorFault."""
    dsn = settings.require_dsn()
    pool = await open_pool(
        dsn, application_name="rowcast tail", server_settings=SESSION, target="primary", max_size=1
    )
    log_reader = PgLogReader(pool, settings.transaction_changes, settings.transaction_bytes)
    try:
        position = await _start_position(log_reader, since)
    except LogUnavailable as error:
        raise LogUnreadable(error.reason) from None
    show = partial(_json, has_tx=settings.transaction_ids) if as_json else line
    wakeup = asyncio.Event()
    notifier = Notifier(
        partial(connect, dsn, application_name="rowcast tail", server_settings=SESSION, target="primary", attempts=1),
        {"rowcast_log": wakeup},
        beat_every=settings.beat_every,
        beat_limit=settings.beat_limit,
    )
    listening = asyncio.create_task(notifier.run())
    delayed = False
    try:
        while True:
            wakeup.clear()
            try:
                position = await _print_new(log_reader, Topic(topic), position, show)
                if delayed:
                    click.echo("daemon: The log can be read again.", err=True)
                delayed = False
            except LogUnavailable as error:
                if not delayed:
                    click.echo(f"daemon: {error} Output may be delayed.", err=True)
                delayed = True
            # Not asyncio.wait_for(): in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.poll_every):
                    await wakeup.wait()
    finally:
        listening.cancel()
        pool.terminate()


async def _start_position(log_reader: PgLogReader, since: str | None) -> Position:
    if since is None:
        return await log_reader.head()
    try:
        position = Position.parse(since)
    except BadPosition as error:
        raise CannotResume(str(error)) from None
    reason = await log_reader.continuity(position)
    if reason is not None:
        raise CannotResume(reason)
    return position


def _json(change: Change, *, has_tx: bool) -> str:
    """A change as clients get it."""
    return wire.change(change, has_tx=has_tx).decode()


async def _print_new(
    log_reader: PgLogReader, topic: Topic, position: Position, show: Callable[[Change], str]
) -> Position:
    """Print the changes after `position`, and return the position after them."""
    head = await log_reader.head()
    seq = position.seq
    while seq < head.seq:
        try:
            changes = await log_reader.read_topics([topic], seq, head.seq, 1000)
        except LogTruncated as error:
            click.echo(f"daemon: {error} Some changes are missing here.", err=True)
            return head
        for change in changes:
            if change.record is None and change.kind in CONTENT:
                continue  # the row has been deleted since
            click.echo(show(change))
        if not changes.more:
            break
        seq = changes[-1].seq
    return head
