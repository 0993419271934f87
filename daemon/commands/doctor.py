"""`daemon doctor`: looks at everything that a daemon needs, and says what is wrong and what to do about it."""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click

from daemon.app.build import DAEMON_CONNECTIONS
from daemon.commands.doctor_door import door
from daemon.commands.findings import Finding, State, failed, level
from daemon.core.errors import OperatorFault
from daemon.log.queries import query as log_query
from daemon.postgres.connect import Connection, Link, Record, connect, link_of
from daemon.postgres.errors import DATABASE_ERRORS, address_of, explain
from daemon.postgres.queries import Queries
from daemon.schema.health import check
from daemon.schema.schema_check import NOT_COMPARED
from daemon.settings import Settings

query: Final = Queries(Path(__file__).with_name("doctor.sql"))

SKEW: Final = 1.0, 30.0  # seconds between the clocks from which it is a warning, and a failure
QUEUE: Final = 0.5, 0.9  # fill levels of the queue of NOTIFY, likewise


async def examine(settings: Settings) -> AsyncIterator[Finding]:
    """Everything that was looked at, in the order in which one thing depends on another. Raises nothing expected."""
    for finding in (*_settings(settings), *door(settings)):
        yield finding
    try:
        connection = await connect(
            settings.require_dsn(), application_name="rowcast doctor", target="writable", attempts=1
        )
    except OperatorFault as fault:
        for finding in failed("database", fault):
            yield finding
        return
    try:
        session = await connection.fetchrow(query("session"))
        assert session is not None
        for finding in _of_session(settings, connection, session):
            yield finding
        for look in _LOOKS if session["installed"] else (_clock, _notify):
            async for finding in _looked(look, connection, settings):
                yield finding
    except DATABASE_ERRORS as error:
        yield Finding("database", State.FAIL, str(explain(error, address=address_of(settings.require_dsn()))))
        return
    finally:
        connection.terminate()
    async for finding in _schemas(settings):
        yield finding


async def _looked(look: "_Look", connection: Connection, settings: Settings) -> AsyncIterator[Finding]:
    """What one look found. A statement that fails is a finding as well."""
    try:
        async for finding in look(connection, settings):
            yield finding
    except DATABASE_ERRORS as error:
        fault = explain(error, address=address_of(settings.require_dsn()))
        yield Finding(look.__name__.strip("_"), State.FAIL, str(fault))


def _settings(settings: Settings) -> Iterator[Finding]:
    problems = []
    if not (settings.secrets or settings.public_keys or settings.jwks):
        problems.append("no key for tokens is configured: set ROWCAST_SECRET or ROWCAST_SECRET_FILE")
    if not settings.notifications:
        problems.append("ROWCAST_NOTIFICATIONS is off, so the daemon does not serve: turn it on")
    for problem in problems:
        yield Finding("settings", State.FAIL, problem)
    if settings.workers > 1 and settings.metrics_listen is None:
        yield Finding(
            "settings",
            State.WARN,
            "each request for /metrics is answered by any one worker",
            "set ROWCAST_METRICS_LISTEN to reach each of them",
        )
    if not problems:
        packs = ", ".join(settings.packs) or "none"
        yield Finding("settings", State.OK, f"{settings.environment}, packs {packs}, workers {settings.workers}")


def _of_session(settings: Settings, connection: Connection, session: Record) -> Iterator[Finding]:
    address = address_of(settings.require_dsn())
    where = f"PostgreSQL {session['version']} at {address}, database {session['database']}"
    yield Finding("database", State.OK, where)
    if session["pid"] != connection.get_server_pid():
        yield Finding("pooler", State.OK, "a pooler in session mode; each new connection needs one more for a moment")
    else:
        yield Finding("pooler", State.OK, "none: the connection leads to Postgres itself")
    yield _tls(settings, link_of(connection))
    if session["superuser"]:
        yield Finding(
            "role",
            State.WARN,
            f"{session['role']} is a superuser, which production refuses",
            "connect as the database's owner, an ordinary role",
        )
    elif session["attributes"]:
        yield Finding(
            "role",
            State.WARN,
            f"{session['role']} has {session['attributes']}, which a daemon does not need",
            f"alter role {session['role']} with NO{session['attributes'].replace(', ', ' NO')}",
        )
    else:
        yield Finding("role", State.OK, f"{session['role']}, an ordinary role")
    yield _connections(settings, session)


def _tls(settings: Settings, link: Link) -> Finding:
    if settings.ssh_route is not None:
        return Finding("tls", State.OK, "not needed: the connection goes through an SSH tunnel")
    if link.is_local:
        return Finding("tls", State.OK, "not needed: the connection is a Unix socket")
    if not link.encryption:
        return Finding("tls", State.WARN, "the connection is not encrypted", "add sslmode=verify-full to its URL")
    if link.is_verified:
        return Finding("tls", State.OK, f"{link.encryption}, and the certificate is that of the host")
    return Finding("tls", State.WARN, f"{link.encryption}, but it may be any host", "use sslmode=verify-full")


def _connections(settings: Settings, session: Record) -> Finding:
    """Whether the server, the database and the role allow the connections of all workers."""
    needed = settings.workers * DAEMON_CONNECTIONS
    places = session["max_connections"] - session["reserved"]
    limits = [("max_connections", places)]
    limits += [(what, session[key]) for what, key in _CONNECTION_LIMITS if session[key] >= 0]
    what, lowest = min(limits, key=lambda limit: limit[1])
    found = f"the daemon needs up to {needed}; {what} allows {lowest}, and {session['used']} are in use"
    if needed > lowest:
        return Finding("connections", State.FAIL, found, f"raise {what}, or lower ROWCAST_WORKERS")
    if needed > places - session["used"]:
        return Finding(
            "connections", State.WARN, f"{found}, perhaps by a daemon", "raise max_connections if that is not so"
        )
    return Finding("connections", State.OK, found)


_CONNECTION_LIMITS: Final = (
    ("the connection limit of the role", "role_limit"),
    ("the connection limit of the database", "database_limit"),
)


async def _rights(connection: Connection, settings: Settings) -> AsyncIterator[Finding]:
    ownership = await connection.fetchrow(query("ownership"))
    assert ownership is not None
    lacking = [row["lacks"] for row in await connection.fetch(query("lacking"))] if ownership["may_serve"] else []
    if not ownership["may_serve"]:
        lacking = ["everything that a daemon needs"]
    for lacks in lacking:
        remedy = f"run `daemon --apply-ddl --grant-to` with this role as {ownership['owner']}, which --owner takes on"
        yield Finding("rights", State.FAIL, f"this role lacks {lacks}", remedy)
    not_callable = await connection.fetch(query("not_callable"), list(settings.schemas.values()))
    for row in not_callable:
        schema = row["schema_name"]
        yield Finding(
            "rights",
            State.FAIL,
            f"this role may not call {schema}.may_read",
            f"grant usage on schema {schema} and execute on {schema}.may_read(text, text) to it",
        )
    if ownership["owns_log"]:
        yield Finding(
            "rights",
            State.WARN,
            "this role owns the log, which a daemon does not need",
            "create role rowcast_daemon login, run `daemon --apply-ddl --grant-to rowcast_daemon`, and connect as it",
        )
    elif not (not_callable or lacking):
        yield Finding("rights", State.OK, "this role has what a daemon needs, and does not own the log")
    capture = await connection.fetchrow(query("capture_role"))
    if capture is None:
        yield Finding(
            "capture",
            State.WARN,
            "there is no role rowcast_capture, so captures run with the rights of whoever applied the DDL",
            "create role rowcast_capture nologin bypassrls, and run `daemon --apply-ddl`",
        )
    elif capture["passes_row_security"]:
        yield Finding("capture", State.OK, "captures run as rowcast_capture, which passes row security")
    else:
        yield Finding(
            "capture",
            State.OK,
            "captures run as rowcast_capture, to which row security applies: see `alter role ... bypassrls`",
        )


async def _clock(connection: Connection, _: Settings) -> AsyncIterator[Finding]:
    """The server's clock against this one, each read in the middle of a round trip; the shortest of three counts."""
    skews: list[tuple[float, float]] = []
    for _attempt in range(3):
        before = datetime.now(UTC)
        there = await connection.fetchval(query("clock"))
        trip = datetime.now(UTC) - before
        skews.append((trip.total_seconds(), (there - before - trip / 2).total_seconds()))
    trip_seconds, skew = min(skews)
    found = f"the database's clock is {abs(skew):.3f} s {'ahead' if skew > 0 else 'behind'}"
    state = level(abs(skew), SKEW)
    remedy = "" if state is State.OK else "let both machines set their clocks by NTP"
    yield Finding("clock", state, f"{found} (round trip {trip_seconds * 1000:.1f} ms)", remedy)


async def _notify(connection: Connection, _: Settings) -> AsyncIterator[Finding]:
    queue = await connection.fetchrow(log_query("notify_queue"))
    assert queue is not None
    state = level(queue["usage"], QUEUE)
    remedy = ""
    if state is not State.OK:
        remedy = "end the session that listens and stays in a transaction"
        remedy += f": select pg_terminate_backend({queue['oldest']})" if queue["oldest"] else ""
    yield Finding("notify", state, f"the queue is {queue['usage']:.0%} full", remedy)
    lock = await connection.fetchrow(log_query("notify_lock"))
    if lock is not None and lock["waiters"]:
        yield Finding(
            "notify",
            State.WARN,
            f"process {lock['pid']} holds the lock of NOTIFY, and {lock['waiters']} transactions wait",
            f"if it hangs: select pg_terminate_backend({lock['pid']})",
        )


async def _log(connection: Connection, settings: Settings) -> AsyncIterator[Finding]:
    found = await connection.fetchrow(query("log"), settings.retention)
    assert found is not None
    if found["led"]:
        yield Finding("leader", State.OK, "a daemon numbers events")
    elif found["used"]:
        yield Finding("leader", State.WARN, "no daemon numbers events", "start one, or see why it is not ready")
    else:
        yield Finding("leader", State.OK, "no daemon has run yet")
    if found["late"]:
        yield Finding(
            "retention",
            State.WARN,
            f"{found['late']} segments of the log should have been dropped ({found['size']} in all)",
            "see retention_failed in the log of the daemon, and end long transactions",
        )
    elif found["used"] and not found["ahead"]:
        yield Finding("retention", State.WARN, "no segment is ready to be opened", "see retention_failed in the log")
    else:
        yield Finding("retention", State.OK, f"the log takes {found['size']}, and nothing is overdue")
    if found["dead_letters"]:
        newest = found["newest_dead_letter"].astimezone(UTC).isoformat(timespec="seconds")
        yield Finding(
            "dead letters",
            State.WARN,
            f"{found['dead_letters']} changes could not be sent, the newest at {newest}",
            "see `daemon dead-letters list`",
        )


async def _schemas(settings: Settings) -> AsyncIterator[Finding]:
    """What `daemon check` says."""
    try:
        findings = await check(settings)
    except OperatorFault as fault:
        for finding in failed("schemas", fault):
            yield finding
        return
    problems = [problem for problem in findings.problems if problem != str(NOT_COMPARED)]
    for problem in problems:
        yield Finding("schemas", State.FAIL, problem)
    for note in findings.notes:
        yield Finding("schemas", State.WARN, note)
    if problems:
        return
    if findings.problems:  # a daemon's role may not build them anew, and need not
        found = f"current, and {findings.captured} as defined; `daemon check` compares the rest, as the owner"
        yield Finding("schemas", State.OK, found)
    else:
        yield Finding("schemas", State.OK, f"nothing has drifted: {findings.captured}")


_Look = Callable[[Connection, Settings], AsyncIterator[Finding]]

_LOOKS: Final[tuple[_Look, ...]] = (_rights, _clock, _notify, _log)


def show(finding: Finding, *, as_json: bool) -> None:
    """Print one finding."""
    click.echo(json.dumps(finding._asdict()) if as_json else str(finding))


async def doctor(settings: Settings, found: list[Finding], *, as_json: bool) -> None:
    """Print each finding as soon as it is there, and append it to `found`."""
    async for finding in examine(settings):
        found.append(finding)
        show(finding, as_json=as_json)


def has_failed(findings: Iterable[Finding]) -> bool:
    """Whether something must be mended before a daemon can serve."""
    return any(finding.state is State.FAIL for finding in findings)
