"""What a log line contains, and what it must not contain."""

import asyncio
import fcntl
import io
import json
import logging
import os
import pty
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from daemon.logs import (
    EVENTS,
    MAX_ITEMS,
    MAX_TEXT,
    RUN,
    configure,
    correlate,
    count_dropped_lines,
    flush,
    get_logger,
    is_debugging,
)

log = get_logger()  # at import, as every module of daemon/ does it

Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Logging is global: restore it after each test."""
    root, before = logging.getLogger(), structlog.get_config()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.configure(**before)
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)


@pytest.fixture
def lines() -> Lines:
    """The lines logged so far, as JSON, from debug on."""
    stream = io.StringIO()
    configure("json", "debug", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def data(lines: Lines) -> dict[str, Any]:
    (line,) = lines()
    found: dict[str, Any] = line["data"]
    return found


def test_every_line_of_a_worker_contains_its_number() -> None:
    stream = io.StringIO()
    configure("json", "info", stream, worker=3)
    log.info("serving", listen="127.0.0.1:8787")
    assert {"worker": 3, "listen": "127.0.0.1:8787"} == json.loads(stream.getvalue())["data"]


def test_a_line_has_the_specified_format(lines: Lines) -> None:
    log.info("serving", listen="127.0.0.1:8787", packs=["chatgenius"])
    (line,) = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("timestamp"))
    assert {
        "correlationId": RUN,
        "level": "info",
        "event": "serving",
        "data": {"listen": "127.0.0.1:8787", "packs": ["chatgenius"]},
    } == line


def test_levels_have_the_specified_names(lines: Lines) -> None:
    for write in (log.debug, log.info, log.warning, log.error, log.critical):
        write("serving")
    assert ["debug", "info", "warn", "error", "error"] == [line["level"] for line in lines()]


@pytest.mark.parametrize(("level", "logged"), [("debug", 4), ("info", 3), ("warn", 2), ("error", 1)])
def test_lines_below_the_level_are_not_logged(level: Any, logged: int) -> None:
    stream = io.StringIO()
    configure("json", level, stream)
    for write in (log.debug, log.info, log.warning, log.error):
        write("serving")
    assert logged == len(stream.getvalue().splitlines())


def test_debug_lines_are_known_to_be_dropped_unless_the_level_is_debug() -> None:
    known = []
    for level in ("debug", "info", "debug", "error"):
        configure("json", level, io.StringIO())
        known.append(is_debugging())
    assert [True, False, True, False] == known


def test_lines_of_a_session_and_of_its_tasks_have_its_correlation_id(lines: Lines) -> None:
    async def session() -> None:
        log.info("client_connected")

    async def serve() -> None:
        with correlate("01JSESSION"):
            task = asyncio.create_task(session())
        log.info("serving")
        await task

    asyncio.run(serve())
    assert {"serving": RUN, "client_connected": "01JSESSION"} == {
        line["event"]: line["correlationId"] for line in lines()
    }


@pytest.mark.parametrize(
    "name", ["password", "POSTGRES_PASSWORD", "token", "access_token", "secret", "dsn", "Authorization", "set-cookie"]
)
def test_a_value_with_a_secret_name_is_not_logged_at_any_depth(lines: Lines, name: str) -> None:
    log.info("serving", **{name: "canary"}, headers=[{name: "canary"}], nested={"a": {name: ["canary"]}})
    assert "canary" not in json.dumps(lines())
    assert "[redacted]" == data(lines)[name]


@pytest.mark.parametrize(
    "text",
    [
        "no route to postgresql://rowcast:canary@db/chat",
        "no route to postgresql://rowcast:c/anary:canary@db/chat",
        "bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkifQ.canary",
    ],
)
def test_a_secret_inside_a_text_is_redacted(lines: Lines, text: str) -> None:
    log.info("serving", reason=text)
    assert "canary" not in data(lines)["reason"]
    assert "[redacted]" in data(lines)["reason"]


def test_values_are_truncated_and_never_bytes(lines: Lines) -> None:
    log.info(
        "serving", text="x" * 10_000, many=list(range(10_000)), payload=b"canary", keys={n: n for n in range(99)}
    )
    found = data(lines)
    assert MAX_TEXT == len(found["text"])
    assert list(range(MAX_ITEMS)) == found["many"]
    assert "6 bytes" == found["payload"]
    assert MAX_ITEMS == len(found["keys"])


def test_a_value_that_json_cannot_represent_is_written_as_text(lines: Lines) -> None:
    log.info("serving", silence=float("inf"), error=ValueError("canary"), path=io.SEEK_SET, kind=Exception)
    assert {"silence": "inf", "error": "ValueError", "path": 0, "kind": "<class 'Exception'>"} == data(lines)


def refuse(row: str) -> None:
    raise ValueError(f"duplicate key\nDETAIL: Key (email)=({row}) exists.")


def fail(row: str = "canary", dsn: str = "postgresql://u:canary@h/d") -> None:
    try:
        refuse(row)
    except ValueError as error:
        raise ExceptionGroup("several", [RuntimeError(dsn)]) from error


def test_an_internal_error_has_a_traceback_without_error_details(lines: Lines) -> None:
    row, dsn = "row-canary", "postgresql://u:dsn-canary@h/d"
    try:
        fail(row, dsn)
    except ExceptionGroup:
        log.exception("internal_error", session="s")
    found = data(lines)
    assert "ExceptionGroup" == found["error"]
    for part in (
        "in fail",
        "ValueError: duplicate key",
        "ExceptionGroup: several",
        "RuntimeError: postgresql://[redacted]@h/d",
    ):
        assert part in found["traceback"]
    assert row not in found["traceback"]
    assert dsn not in found["traceback"]


def test_other_events_have_the_error_type_but_no_traceback(lines: Lines) -> None:
    try:
        fail()
    except ExceptionGroup as error:
        log.warning("listener_lost", exc_info=error)
    assert {"error": "ExceptionGroup"} == data(lines)


def test_libraries_are_logged_in_the_same_format_from_warnings_on(lines: Lines) -> None:
    library = logging.getLogger("some.library")
    library.info("not this")
    library.warning("careful with %s\nand more", "this")
    assert {"logger": "some.library", "message": "careful with this"} == data(lines)
    assert "warn" == lines()[0]["level"]
    assert lines()[0]["event"] in EVENTS


def test_an_error_that_a_library_caught_is_an_internal_one(lines: Lines) -> None:
    try:
        fail()
    except ExceptionGroup:
        logging.getLogger("asyncio").exception("Task exception was never retrieved\nfuture: canary")
    (line,) = lines()
    assert "internal_error" == line["event"]
    assert "Task exception was never retrieved" == line["data"]["message"]
    assert "in fail" in line["data"]["traceback"]


def test_a_python_warning_is_logged(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("careful", stacklevel=1)
    assert data(lines)["message"].endswith("UserWarning: careful")


def test_configuring_twice_does_not_duplicate_lines(lines: Lines) -> None:
    again = io.StringIO()
    configure("json", "info", again)
    logging.getLogger("some.library").warning("once")
    assert [] == lines()
    assert 1 == len(again.getvalue().splitlines())


def test_the_pretty_format_quotes_values_only_where_needed() -> None:
    stream = io.StringIO()
    configure("pretty", "info", stream)
    with correlate("01JSESSION"):
        log.warning("listener_lost", reason="cut off", backend_pid=7, channel="rowcast")
    assert re.fullmatch(
        r'\d\d:\d\d:\d\d\.\d{3} warn  listener_lost reason="cut off" backend_pid=7 channel=rowcast \(01JSESSION\)\n',
        stream.getvalue(),
    )


def test_logged_values_cannot_control_the_terminal() -> None:
    stream = io.StringIO()
    configure("pretty", "info", stream)
    log.info("client_connected", peer="\x1b[2J\x9b31m", reason="a\r\nserving")
    (line,) = stream.getvalue().splitlines()
    assert line.isprintable()


def test_a_log_that_cannot_be_written_raises_nothing() -> None:
    stream = io.StringIO()
    configure("json", "info", stream)
    stream.close()
    log.info("serving")


def small_pipe() -> tuple[int, io.TextIOWrapper]:
    """The reading end of a pipe that holds few lines, and its writing end."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    return reading, os.fdopen(writing, "w")


def small_socket() -> tuple[int, io.TextIOWrapper]:
    """The same with a pair of sockets, which is what systemd connects to stderr."""
    reading, writing = socket.socketpair()
    reading.setblocking(False)
    writing.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return reading.detach(), os.fdopen(writing.detach(), "w")


def read_now(reading: int) -> bytes:
    """Everything that can be read without waiting."""
    found = b""
    with suppress(BlockingIOError):
        while data := os.read(reading, 65536):
            found += data
    return found


@pytest.fixture(params=[small_pipe, small_socket])
def unread(request: pytest.FixtureRequest) -> Iterator[tuple[int, io.TextIOWrapper]]:
    reading, stream = request.param()
    yield reading, stream
    stream.close()
    os.close(reading)


def test_lines_for_a_full_disk_and_for_a_reader_that_has_gone_are_counted() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (Path("/dev/full").open("w"), os.fdopen(writing, "w")):  # noqa: SIM115
        dropped: list[None] = []
        count_dropped_lines(partial(dropped.append, None))
        configure("json", "info", stream)
        for _ in range(3):
            log.info("serving")
        assert 3 == len(dropped)
        with suppress(OSError):
            stream.close()


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_works_without_some_of_its_standard_streams_and_says_nothing_elsewhere(
    closed: str, tmp_path: Path
) -> None:
    """Else a connection could get the descriptor, and the log would go to its peer."""
    script = (
        "from daemon.cli.root import _occupy_standard_streams as occupy, get_logger\n"
        "import os, pathlib\n"
        "occupy()\n"
        "opened = os.open('opened', os.O_CREAT | os.O_WRONLY)\n"
        "get_logger().info('serving')\n"
        "pathlib.Path('fd').write_text(str(opened))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", script]
    found = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL, check=False)
    assert 0 == found.returncode
    assert int((tmp_path / "fd").read_text()) > 2
    assert "" == (tmp_path / "opened").read_text()


def test_lines_that_nobody_reads_are_dropped_counted_and_reported(unread: tuple[int, io.TextIOWrapper]) -> None:
    reading, stream = unread
    configure("json", "info", stream)
    dropped: list[None] = []
    count_dropped_lines(lambda: dropped.append(None))
    number = 0
    while len(dropped) < 10:
        log.info("serving", number=number, padding="x" * 400)
        number += 1
    text = b""
    while b"log_lines_dropped" not in text:
        text += read_now(reading)
        flush()
    found = [json.loads(line) for line in text.splitlines()]
    assert list(range(number - 10)) == [line["data"]["number"] for line in found[:-1]]
    assert ("log_lines_dropped", {"lines": 10}) == (found[-1]["event"], found[-1]["data"])
    log.info("serving", number=number)
    assert number == json.loads(read_now(reading))["data"]["number"]


async def test_queued_lines_are_written_as_soon_as_somebody_reads(unread: tuple[int, io.TextIOWrapper]) -> None:
    reading, stream = unread
    configure("json", "info", stream)
    for number in range(100):
        log.info("serving", number=number, padding="x" * 400)
    text = b""
    async with asyncio.timeout(30):
        while text.count(b"\n") < 100:
            await asyncio.sleep(0)
            text += read_now(reading)
    assert list(range(100)) == [json.loads(line)["data"]["number"] for line in text.splitlines()]


def test_lines_that_are_queued_at_exit_are_written_while_there_is_a_reader() -> None:
    code = """
from daemon.logs import configure, get_logger
configure()
for number in range(1000):
    get_logger().info("serving", number=number)
"""
    assert 1000 == run_python(code, stderr=subprocess.PIPE).stderr.count("\n")


def test_a_process_whose_log_nobody_reads_exits_all_the_same() -> None:
    reading, stream = small_pipe()
    code = f"{ONE_LINE}; [get_logger().info('serving') for _ in range(1000)]; print('done')"
    assert "done\n" == run_python(code, stdout=subprocess.PIPE, stderr=stream).stdout
    os.close(reading)
    stream.close()


def run_python(code: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], text=True, check=True, timeout=60, **streams)


ONE_LINE = "from daemon.logs import configure, get_logger; configure(); get_logger().info('serving')"


def test_a_file_gets_json_and_a_terminal_gets_colours() -> None:
    assert "serving" == json.loads(run_python(ONE_LINE, stderr=subprocess.PIPE).stderr)["event"]
    terminal, stderr = pty.openpty()
    with open(terminal, "rb", buffering=0) as shown, open(stderr, "wb", buffering=0) as written:  # noqa: PTH123
        run_python(ONE_LINE, stderr=written)
        assert b"\x1b[1mserving\x1b[0m" in shown.read(1000)


def test_a_line_before_configuring_shows_no_local_variables() -> None:
    code = """
from daemon.logs import get_logger
password = "can" + "ary"
try:
    1 / 0
except ArithmeticError:
    get_logger().exception("internal_error")
"""
    process = run_python(code, capture_output=True)
    assert "ZeroDivisionError" == json.loads(process.stderr)["data"]["error"]
    assert "canary" not in process.stdout + process.stderr
