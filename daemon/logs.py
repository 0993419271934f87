"""Logging: one line for each event, all in the same format, without secrets.

{"timestamp": "2026-01-10T12:00:00.123Z", "correlationId": "01J...", "level": "info", "event": "serving", "data": {}}
"""

import asyncio
import atexit
import json
import logging
import math
import os
import re
import select
import socket
import stat
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any, Final, Literal, TextIO

import structlog
from structlog.typing import FilteringBoundLogger
from ulid import ULID

Format = Literal["auto", "json", "pretty"]
Level = Literal["debug", "info", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of log line: its highest level, and its meaning."""

    level: Level
    meaning: str


EVENTS: Final[Mapping[str, Event]] = MappingProxyType(
    {
        "capture_restored": Event("info", "every watched table is captured as defined again"),
        "catching_up": Event(
            "info", "events written while no daemon was running are being numbered; this takes a while"
        ),
        "change_invalid": Event(
            "error", "a change could not be sent and was stored in rowcast.dead_letters; says why"
        ),
        "client_aborted": Event("warn", "a client was disconnected because it did not read or did not answer"),
        "client_connected": Event("debug", "a client connected"),
        "client_disconnected": Event("debug", "a client's connection ended"),
        "client_refused": Event(
            "info",
            "a connection or a handshake was refused; says why; debug, except if there are no descriptors left",
        ),
        "constraint_violation": Event(
            "error", "a row that Rowcast wrote or checked violates a constraint; names it and its table"
        ),
        "database_retry": Event("warn", "the database did not answer; it is retried after a delay"),
        "dead_letter_failed": Event(
            "error", "an invalid change could not be stored in rowcast.dead_letters; it is retried"
        ),
        "demo_step_failed": Event("debug", "the demo bot could not write"),
        "event_set_aside": Event(
            "error", "an event could not be numbered: it became a dead letter, and its topic or its pack was reset"
        ),
        "internal_error": Event("error", "a bug in Rowcast, with its traceback: please report it"),
        "job_done": Event("info", "a job ran; says for which due time, and how long it took"),
        "job_failed": Event("warn", "a job failed; says why; it is tried again after a delay"),
        "keys_changed": Event("info", "the keys at the URL in ROWCAST_JWKS have changed, and are used"),
        "keys_unavailable": Event(
            "warn", "the keys at the URL in ROWCAST_JWKS cannot be fetched; says why. Those fetched last stay valid"
        ),
        "leader_elected": Event("info", "this daemon became the leader, which numbers events"),
        "leader_lost": Event("warn", "this daemon is no longer the leader; it or another daemon will take over"),
        "log_lines_dropped": Event("warn", "nobody read stderr, so that many lines of the log were dropped"),
        "library_message": Event("error", "a message from a library that Rowcast uses"),
        "listener_connected": Event(
            "info", "the connection that receives NOTIFY is up, and a heartbeat has come through it"
        ),
        "listener_lost": Event(
            "warn", "the connection that receives NOTIFY is down; the log is polled until it is back"
        ),
        "log_unavailable": Event(
            "warn",
            "the log or the permissions cannot be read from the database at the moment. Where clients were refused "
            "for it, it is logged every 10 s at most, and `refused` counts them",
        ),
        "notify_blocked": Event(
            "warn", "a transaction holds the lock of NOTIFY, and others wait for it; says which, and how to end it"
        ),
        "notify_unblocked": Event("info", "notifications pass again"),
        "numbering_resumed": Event("info", "events are being numbered again"),
        "numbering_stalled": Event(
            "warn",
            "captured events get no numbers, so nothing new is delivered; says why, if this daemon knows",
        ),
        "nats_server_ended": Event(
            "warn", "the NATS server of `daemon up --nodes` ended; says why, and it is started again after a delay"
        ),
        "postgres_ended": Event(
            "warn", "the embedded Postgres of `daemon up` ended; says why, and it is started again"
        ),
        "waiting_for_members": Event("warn", "a gateway that starts hears no member over NATS; says why"),
        "relay_connected": Event(
            "info", "NATS, which carries messages between nodes, is reached; says at which server"
        ),
        "relay_lost": Event("warn", "NATS cannot be reached; says why, and it is tried until it can"),
        "relay_unreadable": Event(
            "error", "a message of a member cannot be read; says why: run the same version on all nodes"
        ),
        "relay_mixed": Event(
            "error", "a gateway hears members of different databases; give each a ROWCAST_NATS_PREFIX of its own"
        ),
        "relay_refused": Event(
            "warn", "NATS does not permit this node to use a subject; says which, and it is tried again"
        ),
        "reload_failed": Event(
            "warn", "a SIGHUP arrived, but something could not be read; says what. Everything stays as it was"
        ),
        "reload_incomplete": Event(
            "warn", "settings that were read again differ from those in effect, and need a restart; says which"
        ),
        "reloaded": Event(
            "info",
            "a SIGHUP arrived, and the keys, or the certificate, were read again; says how many there are. Or "
            "settings have changed; says which",
        ),
        "retention_failed": Event(
            "warn", "old segments could not be dropped, or deleted content not be removed; it is retried"
        ),
        "rights_missing": Event(
            "warn", "the daemon's role lacks rights that it needs, so it is not ready; says which, and what to run"
        ),
        "rights_restored": Event("info", "the daemon's role has every right again"),
        "rows_altered": Event(
            "warn", "this table or a type was altered so that its rows read otherwise, so its pack is reset"
        ),
        "rows_vanished": Event(
            "warn",
            "a partition of this table came or went with its rows, or capture triggers were off for a moment, so its"
            " pack is reset",
        ),
        "schema_migration": Event("info", "a schema revision was applied or rolled back"),
        "schema_newer": Event("info", "a schema is newer than this version, which it says it is compatible with"),
        "schema_warning": Event("warn", "the server sent a warning about the schema, such as a missing extension"),
        "segments_dropped": Event("info", "segments of the log older than ROWCAST_RETENTION were dropped"),
        "serving": Event("info", "the daemon is ready for clients"),
        "sharing_failed": Event(
            "warn",
            "signals, presence or acknowledgements cannot be exchanged through the database at the moment; says why",
        ),
        "snapshot_incomplete": Event(
            "warn", "a row does not fit its row model: a snapshot went without it; says why"
        ),
        "stopped": Event("info", "the daemon stopped"),
        "stopping": Event("info", "the daemon is stopping: clients are asked to reconnect"),
        "tables_served": Event("info", "which tables are served without a pack has changed, or how"),
        "transaction_too_large": Event(
            "warn", "a transaction, or a change in it, was too large to send; its topics were reset"
        ),
        "table_emptied": Event("warn", "a crash of Postgres emptied this unlogged table, so its pack is reset"),
        "trigger_error": Event(
            "error",
            "a watched table is not captured as defined, and what to do; or the capture of a lenient table failed",
        ),
        "tunnel_connected": Event("info", "the SSH tunnel to the database is open"),
        "tunnel_lost": Event("warn", "the SSH tunnel is down; says why, and it is opened again after a delay"),
        "tunnel_retry": Event("warn", "the SSH tunnel could not be opened; it is retried after a delay"),
        "worker_ended": Event("warn", "a worker ended unexpectedly; another takes its place after a delay"),
        "worker_hung": Event("error", "a worker showed no sign of life for ROWCAST_WORKER_SILENCE and was killed"),
        "worker_started": Event("info", "a worker was started, or started again"),
    }
)
"""Every event that is logged; the table in docs/operate.md."""

MAX_QUEUED: Final = 256 * 1024  # bytes of lines that wait for whoever reads the log
EXIT_TIMEOUT: Final = 1.0  # seconds that these lines have when the process exits
MAX_TEXT: Final = 500  # characters in a string
MAX_ITEMS: Final = 50  # values in a list or an object

_REDACTED: Final = "[redacted]"
_SECRET_NAME: Final = re.compile(
    r"passw|passphrase|token|secret|dsn|authorization|cookie|credential|database_url", re.IGNORECASE
)
# The user and password of a URL; a JSON Web Token.
_SECRET_TEXT: Final = re.compile(r"(?<=://)[^\s@]*(?=@)|\beyJ[\w-]+\.[\w-]+\.[\w-]*")

_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False)

RUN: Final = str(ULID())
"""The correlation id of lines outside a session: one for each run of the daemon, the same in all its processes."""

_correlation: ContextVar[str] = ContextVar("correlation", default=RUN)


class correlate:  # noqa: N801 - used like a function
    """Lines that are logged in the block, and in tasks that start there, have this correlation id.

    A class, since a generator takes twice as long, and this is entered for everything that a client sends.
    """

    __slots__ = ("_id", "_token")

    def __init__(self, correlation_id: str) -> None:
        self._id = correlation_id

    def __enter__(self) -> None:
        self._token = _correlation.set(self._id)

    def __exit__(self, *error: object) -> None:
        _correlation.reset(self._token)


def get_logger() -> FilteringBoundLogger:
    """A logger. Modules can get it at import: a later `configure` applies to it."""
    logger: FilteringBoundLogger = structlog.get_logger()
    return logger


def is_debugging() -> bool:
    """Whether lines of the level `debug` are written. To ask a logger takes longer: one is made each time."""
    return structlog.get_config()["wrapper_class"] is structlog.make_filtering_bound_logger("debug")


def configure(
    format: Format = "auto",  # noqa: A002
    level: Level = "info",
    stream: TextIO | None = None,
    *,
    worker: int | None = None,
) -> None:
    """Log to `stream` (default: stderr) from `level` on. `auto` is `pretty` on a terminal and `json` elsewhere.

    What libraries log with the logging module, from warnings on, appears in the same format. If `worker` is given, it
    is in the data of every line.
    """
    _configure(format, level, stream, {} if worker is None else {"worker": worker})
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _LibraryHandler)]:
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler())
    root.setLevel(logging.WARNING)
    logging.captureWarnings(capture=True)


def _configure(
    format: Format,  # noqa: A002
    level: Level,
    stream: TextIO | None = None,
    always: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    global _writer  # noqa: PLW0603 - logging is global
    written_to: TextIO | None = stream or sys.stderr  # None if the descriptor was closed at the start
    terminal = written_to is not None and written_to.isatty()
    pretty = format == "pretty" or (format == "auto" and terminal)
    _writer.close()  # in a forked process, what is queued is for its parent to write
    _writer = writer = _LineWriter(stream)
    structlog.configure(
        processors=[partial(_line, always), _Pretty(colours=terminal) if pretty else _json],
        wrapper_class=structlog.make_filtering_bound_logger("warning" if level == "warn" else level),
        logger_factory=lambda: writer,
        cache_logger_on_first_use=False,  # loggers are made at import, before this is called
    )


class _LineWriter:
    """Writes lines without ever waiting for the reader. Errors of the stream are ignored.

    Lines that cannot be written at once are queued, up to MAX_QUEUED bytes, and the rest is dropped and counted. The
    queue is flushed when the event loop sees that there is room, with the next line, and by `flush`. So are lines for
    a full disk, and for a reader that has gone. Without a stream, as under `2>&-`, nothing is written.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._opened: TextIO | None = None  # the stream that `_sink` writes to
        self._sink: _Sink | None = None
        self._queue: deque[bytes] = deque()
        self._queued = 0  # bytes
        self._dropped = 0  # lines since the last report
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that watches the sink

    def msg(self, line: str) -> None:
        stream: TextIO | None = self._stream or sys.stderr
        if stream is None:
            return
        with self._lock, suppress(OSError, ValueError):
            if stream is not self._opened:
                self.close()
                self._opened, self._sink = stream, _sink_of(stream)
            if self._sink is None:  # its reader is a disk
                self._write_to_disk(stream, line)
                return
            data = (line + "\n").encode(errors="backslashreplace")
            if self._queued + len(data) > MAX_QUEUED:
                self._drop(1)
            else:
                self._queue.append(data)
                self._queued += len(data)
            self._write_queued()

    debug = info = warning = error = critical = msg

    def _write_to_disk(self, stream: TextIO, line: str) -> None:
        try:
            stream.write(line + "\n")
            stream.flush()
        except OSError:
            self._drop(1)
        else:
            self._report_dropped()

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        for _ in range(lines):
            _on_dropped()

    def _report_dropped(self) -> None:
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            get_logger().warning("log_lines_dropped", lines=dropped)

    def flush(self, timeout: float = 0.0) -> None:
        """Write what is queued; wait for the reader for at most `timeout` seconds."""
        end = time.monotonic() + timeout
        with self._lock, suppress(OSError, ValueError):
            self._write_queued()
            while self._queue and self._sink is not None and (left := end - time.monotonic()) > 0:
                poll = select.poll()
                poll.register(self._sink.fd, select.POLLOUT)
                poll.poll(left * 1000)
                self._write_queued()

    def close(self) -> None:
        """Forget the stream and what is queued; the next line opens it again."""
        self._unwatch()
        if self._sink is not None:
            os.close(self._sink.fd)
        self._opened = self._sink = None
        self._queue.clear()
        self._queued = 0

    def _write_queued(self) -> None:
        try:
            while self._queue and self._sink is not None:
                written = self._sink.write(self._queue[0])
                self._queued -= written
                if written < len(self._queue[0]):
                    self._queue[0] = self._queue[0][written:]
                else:
                    self._queue.popleft()
        except BlockingIOError:
            self._watch()
            return
        except OSError:  # nobody will ever read it
            self._drop(len(self._queue))
            self._queue.clear()
            self._queued = 0
            self._unwatch()
            return
        self._unwatch()
        self._report_dropped()

    def _watch(self) -> None:
        """Let the event loop, if one runs in this thread, continue when there is room."""
        with suppress(RuntimeError):
            loop = asyncio.get_running_loop()
            if loop is not self._loop and self._sink is not None:
                loop.add_writer(self._sink.fd, self.flush)
                self._loop = loop

    def _unwatch(self) -> None:
        if self._loop is not None and self._sink is not None and not self._loop.is_closed():
            self._loop.remove_writer(self._sink.fd)
        self._loop = None


@dataclass(frozen=True)
class _Sink:
    """A file descriptor, and how to write to it without waiting; `write` raises BlockingIOError if it would."""

    fd: int
    write: Callable[[bytes], int]


def _sink_of(stream: TextIO) -> _Sink | None:
    """How to write to a pipe, a socket or a terminal without waiting; None for any other stream.

    Its file descriptor must not be made non-blocking, since other processes share it.
    """
    try:
        fd = stream.fileno()
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError):
        return None
    if stat.S_ISSOCK(mode):
        own = os.dup(fd)
        return _Sink(own, partial(_send, own))
    if not stat.S_ISFIFO(mode) and not stat.S_ISCHR(mode):
        return None
    with suppress(OSError):  # a second file description for the same pipe or terminal
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        return _Sink(own, partial(os.write, own))
    own = os.dup(fd)
    return _Sink(own, partial(_write_if_ready, own))


def _send(fd: int, data: bytes) -> int:
    peer = socket.socket(fileno=fd)
    try:
        return peer.send(data, socket.MSG_DONTWAIT)
    finally:
        peer.detach()


def _write_if_ready(fd: int, data: bytes) -> int:
    """A pipe that is ready takes PIPE_BUF bytes, unless another process is quicker."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    if not poll.poll(0):
        raise BlockingIOError
    return os.write(fd, data[: select.PIPE_BUF])


def _ignore() -> None:
    """Nobody counts."""


_on_dropped: Callable[[], object] = _ignore


def count_dropped_lines(count: Callable[[], object]) -> None:
    """Call `count` for each line that is dropped."""
    global _on_dropped  # noqa: PLW0603 - logging is global
    _on_dropped = count


def flush(timeout: float = 0.0) -> None:
    """Write the lines that are queued; wait for the reader for at most `timeout` seconds."""
    _writer.flush(timeout)


class _LibraryHandler(logging.Handler):
    """Logs the messages of libraries, but only their first line: the rest may quote anything."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.ERROR if record.levelno >= logging.ERROR else logging.WARNING
        is_bug = level == logging.ERROR and record.exc_info
        try:
            get_logger().log(
                level,
                "internal_error" if is_bug else "library_message",
                logger=record.name,
                message=record.getMessage().partition("\n")[0],
                exc_info=record.exc_info,
            )
        except Exception:  # noqa: BLE001 - a log call must not fail in the library that made it
            self.handleError(record)


def _line(always: Mapping[str, Any], _: object, method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    """Turn a log call into the object that is written; `always` is added to its data."""
    name = event.pop("event")
    error = _error(event.pop("exc_info", None))
    data = {**always, **{key: _plain(value, key) for key, value in event.items()}}
    if error is not None:
        data["error"] = type(error).__name__
        if name == "internal_error":
            data["traceback"] = _traceback(error)
    level = {"warning": "warn", "critical": "error"}.get(method, method)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
    return {
        "timestamp": f"{now}Z",
        "correlationId": _correlation.get(),
        "level": level,
        "event": name,
        "data": data,
    }


def _error(exc_info: object) -> BaseException | None:
    match exc_info:
        case BaseException():
            return exc_info
        case (_, BaseException() as error, _):
            return error
        case None | False:
            return None
    return sys.exception()


def _traceback(error: BaseException) -> str:
    """A traceback with only the first line of each error: the rest, such as Postgres's DETAIL, may quote rows."""
    parts: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        first, _, _ = str(link).partition("\n")
        frames = "".join(traceback.format_tb(link.__traceback__))
        within = link.exceptions if isinstance(link, BaseExceptionGroup) else ()
        parts.append("\n\n".join([f"{frames}{type(link).__name__}: {_clean(first)}", *map(_traceback, within)]))
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return "\n\n".join(reversed(parts))


def _plain(value: object, name: str = "") -> Any:  # noqa: ANN401 - any JSON value
    """A value as JSON: truncated, and without secrets."""
    if _SECRET_NAME.search(name):
        return _REDACTED
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case bytes() | bytearray() | memoryview():
            return f"{len(value)} bytes"
        case BaseException():
            return type(value).__name__
        case Mapping():
            return {str(key): _plain(item, str(key)) for key, item in list(value.items())[:MAX_ITEMS]}
        case list() | tuple() | set() | frozenset():
            return [_plain(item) for item in list(value)[:MAX_ITEMS]]
    return _clean(str(value))


def _clean(text: str) -> str:
    text = _SECRET_TEXT.sub(_REDACTED, text[: 2 * MAX_TEXT])
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"


def _json(_: object, __: str, line: MutableMapping[str, Any]) -> str:
    return _ENCODER.encode(line)


class _Pretty:
    """Renders a line for a terminal, which no text can control: unprintable characters are escaped."""

    _COLOURS: Final = {"debug": "\x1b[2m", "info": "\x1b[32m", "warn": "\x1b[33m", "error": "\x1b[31m"}

    def __init__(self, *, colours: bool) -> None:
        self._colours = colours

    def __call__(self, _: object, __: str, line: MutableMapping[str, Any]) -> str:
        data = dict(line["data"])
        trace = data.pop("traceback", "")
        level = self._in(self._COLOURS[line["level"]], f"{line['level']:<5}")
        words = [self._in("\x1b[2m", line["timestamp"][11:-1]), level, self._in("\x1b[1m", line["event"])]
        words += [f"{self._in(chr(27) + '[36m', name)}={_word(value)}" for name, value in data.items()]
        if line["correlationId"] != RUN:
            words.append(self._in("\x1b[2m", f"({line['correlationId']})"))
        return "\n".join([" ".join(words), *(f"    {text}" for text in trace.splitlines())])

    def _in(self, colour: str, text: str) -> str:
        return f"{colour}{text}\x1b[0m" if self._colours else text


def _word(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and not re.search(r'[\s"=]', value) and value:
        return value
    return json.dumps(value)


_writer = _LineWriter(None)
_configure("auto", "info")  # structlog's default shows local variables, which may be secret
atexit.register(lambda: flush(EXIT_TIMEOUT))
