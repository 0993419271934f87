"""What an operator relies on: readiness, the format of the log, signals, crashes and restarts."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path

from structlog.testing import capture_logs

from daemon.metrics import REGISTRY
from daemon.postgres.connect import Connection, connect, open_pool
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings
from tests.acceptance.chat import Chat
from tests.support.daemon import (
    SECRET,
    Daemon,
    Notices,
    clean_environment,
    command,
    daemon_process,
    free_port,
    get,
    start,
)


async def test_a_daemon_that_serves_is_alive_and_ready(daemon: Daemon) -> None:
    assert 200 == (await get(f"{daemon.http}/healthz"))[0]
    assert (200, {"ready": True, "reasons": []}) == _parsed(await get(f"{daemon.http}/readyz"))


def _parsed(answer: tuple[int, str]) -> tuple[int, object]:
    return answer[0], json.loads(answer[1])


async def test_a_schema_that_is_not_current_is_refused_at_the_start(empty_database: str) -> None:
    code, _, errors = await command(DATABASE_URL=empty_database)
    assert 32 == code
    assert re.fullmatch(r"daemon: The schema is not current \(.*\): run `daemon --apply-ddl` first\.\n", errors)


async def test_a_terminated_listener_reconnects_and_nothing_is_missed(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        for number in range(5):
            await chat.sql.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'rowcast listener' "
                "and datname = current_database()"
            )
            await chat.say(str(number))
            assert str(number) == (await client.changes())[0]["record"]["content"]


async def test_a_terminated_leader_is_followed_by_a_new_term_and_nothing_is_missed(
    daemon: Daemon, chat: Chat
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        for number in range(3):
            await chat.sql.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'rowcast sequencer' "
                "and datname = current_database()"
            )
            await chat.say(str(number))
            assert str(number) == (await client.changes())[0]["record"]["content"]


async def test_a_second_daemon_on_the_same_database_sends_the_same_and_takes_over(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    async with daemon_process(database) as second, second.client(chat.ada) as there:
        async with daemon.client(chat.ada) as here:
            await here.subscribe(chat.topic)
            await there.subscribe(chat.topic)
            await chat.say("to both")
            one, two = await here.next(), await there.next()
            assert one["changes"] == two["changes"]
            assert one["pos"] == two["pos"]
        await daemon.stop(signal.SIGKILL)
        await chat.say("after the leader was killed")
        assert "after the leader was killed" == (await there.changes())[0]["record"]["content"]
        async with second.client(chat.ada, since=one["pos"]) as resumed:
            await resumed.subscribe(chat.topic)
            [frame, end] = await resumed.until("resumed")
            assert ["after the leader was killed"] == [change["record"]["content"] for change in frame["changes"]]
            assert 1 == end["replayed"]


async def test_sigterm_says_bye_closes_with_1012_and_ends_at_once(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        ended = asyncio.create_task(daemon.stop())
        bye = await client.next()
        assert ("bye", "restart") == (bye["op"], bye["reason"])
        assert 0 <= bye["retry_ms"] <= 5000
        assert (1012, "restart") == await client.closed()
        assert 0 == await ended
    assert ["stopping", "stopped"] == [line["event"] for line in daemon.events() if line["event"].startswith("stop")]
    await daemon.notices.wait_for("STOPPING=1")


async def test_a_daemon_whose_terminal_is_closed_says_bye_and_ends(chat: Chat, database: str) -> None:
    ours, theirs = os.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WITH_TERMINAL, "-m", "daemon"),
        env=clean_environment(DATABASE_URL=database, ROWCAST_SECRET=SECRET, ROWCAST_LISTEN="127.0.0.1:0"),
        stdin=theirs,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    os.close(theirs)
    assert process.stderr
    events = []
    async for line in process.stderr:
        events.append(json.loads(line)["event"])
        if events[-1] == "serving":
            os.close(ours)
    assert 0 == await process.wait()
    assert ["stopping", "stopped"] == events[-2:]


WITH_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


async def test_a_daemon_that_the_watchdog_kills_says_where_it_hung(chat: Chat, database: str) -> None:
    with tempfile.TemporaryFile() as errors:
        process = await start(
            environment=clean_environment(
                DATABASE_URL=database, ROWCAST_SECRET=SECRET, ROWCAST_LISTEN="127.0.0.1:0", ROWCAST_LOG_FORMAT="json"
            ),
            directory=tempfile.gettempdir(),
            errors=errors.fileno(),
        )
        while b'"serving"' not in os.pread(errors.fileno(), 10**6, 0):
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGABRT)  # what systemd sends
        assert -signal.SIGABRT == await process.wait()
        said = os.pread(errors.fileno(), 10**6, 0).decode()
    assert "Fatal Python error: Aborted" in said
    assert "in run_forever\n" in said


async def test_clients_of_a_killed_and_restarted_daemon_miss_nothing(chat: Chat, database: str) -> None:
    async with daemon_process(database) as daemon, daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say("before")
        since = (await client.until("changes"))[-1]["pos"]
        await daemon.stop(signal.SIGKILL)
    await chat.say("meanwhile")
    async with daemon_process(database) as daemon, daemon.client(chat.ada, since=since) as client:
        await client.subscribe(chat.topic)
        [frame, _] = await client.until("resumed")
        assert ["meanwhile"] == [change["record"]["content"] for change in frame["changes"]]


PASS_SOCKET = """
import os, sys
os.dup2(int(sys.argv.pop(1)), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
from daemon.__main__ import main
main()
"""


async def started_with(listening: socket.socket, database: str, home: Path) -> asyncio.subprocess.Process:
    """A daemon that is ready and serves at this socket, which it was passed as by systemd."""
    with Notices(home / "notify") as notices:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PASS_SOCKET, str(listening.fileno())),
            env=clean_environment(DATABASE_URL=database, ROWCAST_SECRET=SECRET, NOTIFY_SOCKET=str(notices.path)),
            pass_fds=(listening.fileno(),),
            stderr=asyncio.subprocess.DEVNULL,
        )
        await notices.wait_for("READY=1")
    notices.path.unlink()
    return process


async def test_no_connection_is_refused_while_a_daemon_with_a_passed_socket_restarts(
    chat: Chat, database: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/healthz"
        first = await started_with(listening, database, tmp_path)
        assert 200 == (await get(url))[0]
        first.terminate()
        assert 0 == await first.wait()
        waiting = [asyncio.create_task(get(url)) for _ in range(3)]  # nobody accepts, and the kernel keeps them
        second = await started_with(listening, database, tmp_path)
        assert [200] * 3 == [status for status, _ in await asyncio.gather(*waiting)]
        second.terminate()
        assert 0 == await second.wait()


# What systemd-socket-activate does, where it is not installed.
ACTIVATE = """
import os, select, socket, sys
host, _, port = sys.argv[1].partition(":")
listening = socket.create_server((host, int(port)))
print("listening", file=sys.stderr, flush=True)
select.select([listening], [], [])
rest = sys.argv[2:]
while rest[0].startswith("-E"):
    name, _, value = rest.pop(0)[2:].partition("=")
    os.environ[name] = value
os.dup2(listening.fileno(), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(rest[0], rest)
"""


async def test_the_first_connection_to_a_port_of_systemd_starts_the_daemon(chat: Chat, database: str) -> None:
    program = shutil.which("systemd-socket-activate")
    command_line = [program, "-l"] if program else [sys.executable, "-c", ACTIVATE]
    address = f"127.0.0.1:{free_port()}"
    environment = {"DATABASE_URL": database, "ROWCAST_SECRET": SECRET, "ROWCAST_LISTEN": "127.0.0.1:1"}
    process = await asyncio.create_subprocess_exec(
        *(*command_line, address, *(f"-E{name}={value}" for name, value in environment.items())),
        *(sys.executable, "-m", "daemon"),
        env=clean_environment(),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr
    await process.stderr.readline()  # it listens
    assert 200 == (await get(f"http://{address}/healthz"))[0]
    process.terminate()
    await process.stderr.read()
    assert 0 == await process.wait()


async def test_the_watchdog_is_fed_by_the_event_loop(database: str, chat: Chat) -> None:
    async with daemon_process(database, environment={"WATCHDOG_USEC": "200000"}) as daemon:
        for _ in range(3):
            await daemon.notices.wait_for("WATCHDOG=1")


async def test_every_log_line_has_the_form_of_the_specification(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        session = client.welcome["session"]
    await daemon.stop()
    lines = daemon.events()
    assert {"serving", "listener_connected", "leader_elected", "client_connected", "stopped"} <= {
        line["event"] for line in lines
    }
    for line in lines:
        assert ["timestamp", "correlationId", "level", "event", "data"] == list(line)
        assert line["level"] in {"debug", "info", "warn", "error"}
    assert session in {line["correlationId"] for line in lines if line["event"] == "client_connected"}


async def test_a_daemon_that_lost_its_database_says_why_it_is_not_ready(
    chat: Chat, database: str, empty_database: str
) -> None:
    quick = {"ROWCAST_BEAT_EVERY": "0.1", "ROWCAST_BEAT_LIMIT": "0.3", "ROWCAST_POLL_EVERY": "0.1"}
    name = await chat.sql.fetchval("select current_database()")
    elsewhere = await connect(empty_database, application_name="test")
    async with daemon_process(database, environment=quick) as daemon:
        await elsewhere.execute(f"alter database {name} allow_connections false")
        await elsewhere.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = $1", name)
        status, page = await get(f"{daemon.http}/readyz")
        while status == 200:
            status, page = await get(f"{daemon.http}/readyz")
        assert 503 == status
        assert "the listener has no heartbeat" in json.loads(page)["reasons"]
        assert 200 == (await get(f"{daemon.http}/healthz"))[0]
        await elsewhere.execute(f"alter database {name} allow_connections true")
        while status == 503:
            status, _ = await get(f"{daemon.http}/readyz")
    await elsewhere.close()


DISABLED = (
    "chatgenius.messages: its capture trigger on chatgenius.messages for update is disabled: run `daemon --apply-ddl`"
)


async def test_a_daemon_that_starts_with_a_disabled_trigger_serves_and_says_why_it_is_not_ready(
    chat: Chat, database: str
) -> None:
    await chat.sql.execute("alter table chatgenius.messages disable trigger rowcast_update")
    async with daemon_process(database) as daemon:
        assert (503, {"ready": False, "reasons": [DISABLED]}) == _parsed(await get(f"{daemon.http}/readyz"))
        assert "\nrowcast_capture_drift 1.0\n" in (await get(f"{daemon.http}/metrics"))[1]
        [error] = [line for line in daemon.events() if line["event"] == "trigger_error"]
        assert ("error", "chatgenius.messages") == (error["level"], error["data"]["table"])
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            await chat.say("what is captured is delivered")
            assert "what is captured is delivered" == (await client.changes())[0]["record"]["content"]


async def test_a_column_that_was_renamed_makes_the_daemon_unready_and_names_table_column_and_remedy(
    chat: Chat, database: str
) -> None:
    await chat.sql.execute("alter table chatgenius.users rename column avatar_url to picture_url")
    async with daemon_process(database) as daemon:
        reason = (
            "chatgenius.users: its captured column avatar_url was dropped or renamed: rename it back or add it "
            "again, or call rowcast.watch() for it without that column"
        )
        assert (503, {"ready": False, "reasons": [reason]}) == _parsed(await get(f"{daemon.http}/readyz"))


async def test_a_missing_index_or_an_unlogged_table_leaves_the_daemon_ready(chat: Chat, database: str) -> None:
    await chat.sql.execute(
        "drop index chatgenius.messages_channel_id; alter table chatgenius.sync_state set unlogged"
    )
    async with daemon_process(database) as daemon:
        assert (200, {"ready": True, "reasons": []}) == _parsed(await get(f"{daemon.http}/readyz"))


async def test_a_daemon_serves_on_a_newer_schema_that_says_it_is_compatible(chat: Chat, database: str) -> None:
    await chat.sql.execute(
        "update chatgenius.alembic_version set version_num = 'chatgenius_0099';"
        "insert into rowcast.compatibility select 'chatgenius', format('chatgenius_%s', to_char(n, 'FM0000')),"
        " 'chatgenius_0001' from generate_series(2, 99) as n"
        " on conflict (schema_name, revision) do nothing"
    )
    async with daemon_process(database) as daemon:
        assert (200, {"ready": True, "reasons": []}) == _parsed(await get(f"{daemon.http}/readyz"))
        [newer] = [line for line in daemon.events() if line["event"] == "schema_newer"]
        assert {"schema": "chatgenius", "revision": "chatgenius_0099"} == newer["data"]
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            await chat.say("hello")
            assert "hello" == (await client.changes())[0]["record"]["content"]
        assert (0, "") == (await command("check", DATABASE_URL=database))[::2]
    await chat.sql.execute("delete from rowcast.compatibility where revision = 'chatgenius_0050'")
    code, _, errors = await command(DATABASE_URL=database)
    assert 32 == code
    assert "schema chatgenius is at chatgenius_0099, not at chatgenius_" in errors


async def test_drift_is_logged_once_while_it_lasts_and_once_when_it_is_over(database: str, sql: Connection) -> None:
    pool = await open_pool(database, application_name="test")
    schema = SchemaHealth(pool, Settings())
    events, problems, drifted = [], [], []
    for change in (
        "alter table chatgenius.messages disable trigger rowcast_update",
        "select",
        "alter table chatgenius.messages enable trigger rowcast_update",
        "select",
    ):
        await sql.execute(change)
        with capture_logs() as logged:
            await schema.refresh()
        events.append([line["event"] for line in logged])
        problems.append(schema.problems)
        drifted.append(REGISTRY.get_sample_value("rowcast_capture_drift"))
    await pool.close()
    assert [["trigger_error"], [], ["rows_vanished", "capture_restored"], []] == events
    assert [[DISABLED], [DISABLED], [], []] == problems
    assert [1, 1, 0, 0] == drifted


async def test_check_prints_a_line_for_each_problem_until_apply_ddl_fixes_it(
    database: str, sql: Connection, empty_database: str
) -> None:
    watched = await sql.fetchval("select count(*) from rowcast.watched")
    fine = (0, f"nothing has drifted: {watched} tables are watched\n", "")
    assert fine == await command("check", DATABASE_URL=database)
    await sql.execute("alter table chatgenius.messages disable trigger rowcast_update")
    assert (1, f"{DISABLED}\n", "") == await command("check", DATABASE_URL=database)
    await command("--apply-ddl", DATABASE_URL=database)
    assert fine == await command("check", DATABASE_URL=database)
    code, output, errors = await command("check", DATABASE_URL=empty_database)
    assert (1, "") == (code, errors)
    assert re.fullmatch(r"The schema is not current \(.*\): run `daemon --apply-ddl` first\.\n", output)
