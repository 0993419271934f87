"""What a log line contains, and what it must not contain."""

import asyncio
import io
import json
import logging
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structlog

from daemon.logs import EVENTS, MAX_ITEMS, MAX_TEXT, RUN, configure, correlate, get_logger

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
