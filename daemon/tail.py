"""Follow a topic in the terminal, straight from the log: no token, no websocket, just the database."""

import asyncio
from contextlib import suppress
from functools import partial

import click

from daemon.app import SESSION
from daemon.core import wire
from daemon.core.change import CONTENT, Change, Kind, Position, Topic
from daemon.core.errors import BadPosition, LogForgotten, LogUnavailable, NoLog, OperatorFault
from daemon.postgres.connect import connect, open_pool
from daemon.postgres.doorbell import Doorbell
from daemon.postgres.event_log import PgEventLog
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
WIDEST = 160  # characters of a record on one line; --json shows all of it


class NotContinuable(OperatorFault):
    """The log cannot be followed from there ({reason}): leave --since out."""

    exit_code = 35

    def __init__(self, reason: str) -> None:
        self.reason = reason


def line(change: Change) -> str:
    """One change as a person reads it: when, where it stands, what happened to which row."""
    record = change.record or ""
    if len(record) > WIDEST:
        record = f"{record[:WIDEST]}… ({len(record):,} characters)"
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
    """Print the topic's changes as they come, until interrupted. Raises an OperatorFault."""
    dsn = settings.require_dsn()
    pool = await open_pool(dsn, application_name="rowcast tail", server_settings=SESSION, most=1)
    event_log = PgEventLog(pool, settings.transaction_changes)
    try:
        position = await _begin(event_log, since)
    except LogUnavailable as error:
        raise NoLog(error.reason) from None
    bell = asyncio.Event()
    doorbell = Doorbell(
        partial(connect, dsn, application_name="rowcast tail", server_settings=SESSION, attempts=1),
        {"rowcast_log": bell},
        beat_every=settings.beat_every,
        beat_limit=settings.beat_limit,
    )
    listening = asyncio.create_task(doorbell.run())
    stale = False
    try:
        while True:
            bell.clear()
            try:
                position = await _print_new(event_log, Topic(topic), position, as_json=as_json)
                if stale:
                    click.echo("daemon: The log is read again.", err=True)
                stale = False
            except LogUnavailable as error:
                if not stale:
                    click.echo(f"daemon: {error} What follows may come late.", err=True)
                stale = True
            # Not wait_for: in Python 3.11 it can swallow a cancellation.
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.poll_every):
                    await bell.wait()
    finally:
        listening.cancel()
        pool.terminate()


async def _begin(event_log: PgEventLog, since: str | None) -> Position:
    if since is None:
        return await event_log.head()
    try:
        position = Position.parse(since)
    except BadPosition as error:
        raise NotContinuable(str(error)) from None
    reason = await event_log.continuity(position)
    if reason is not None:
        raise NotContinuable(reason)
    return position


async def _print_new(event_log: PgEventLog, topic: Topic, position: Position, *, as_json: bool) -> Position:
    """Print what came after `position`; returns where that ends."""
    head = await event_log.head()
    seq = position.seq
    while seq < head.seq:
        try:
            changes = await event_log.read_topics([topic], seq, head.seq, 1000)
        except LogForgotten as error:
            click.echo(f"daemon: {error} What lies between is left out.", err=True)
            return head
        for change in changes:
            if change.record is None and change.kind in CONTENT:
                continue  # the row has been deleted since
            click.echo(wire.change(change).decode() if as_json else line(change))
        if len(changes) < 1000:
            break
        seq = changes[-1].seq
    return head
