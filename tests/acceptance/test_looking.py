"""What an operator looks at: doctor, config, status and explain, beside a real daemon."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from daemon.commands.config import effective
from daemon.commands.doctor import SKEW, _connections, examine
from daemon.commands.findings import Finding, State, level
from daemon.commands.status import Report
from daemon.postgres.connect import Connection
from daemon.settings import Settings, load_with_sources
from tests.acceptance.chat import Chat
from tests.support.daemon import SECRET, Daemon, command, daemon_process
from tests.support.postgres import Server


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(database) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


def states(output: str) -> dict[str, set[str]]:
    """The states of each check that `daemon doctor` printed."""
    found: dict[str, set[str]] = {}
    for line in output.splitlines():
        state, check = line[:4].strip(), line[6:17].strip()
        found.setdefault(check, set()).add(state)
    return found


async def examined(dsn: str, **more: Any) -> list[Finding]:
    """The findings of a doctor with these settings."""
    settings = Settings(DATABASE_URL=dsn, ROWCAST_SECRET=SECRET, **more)
    return [finding async for finding in examine(settings)]


async def test_the_doctor_finds_everything_in_order_beside_a_daemon_that_serves(
    daemon: Daemon, database: str
) -> None:
    code, output, errors = await command("doctor", DATABASE_URL=database)
    assert (0, "") == (code, errors)
    found = states(output)
    assert {"warn"} == found.pop("role") == found.pop("rights"), "the tests' role is a superuser"
    assert {"ok"} == set.union(*found.values()), output
    door = {"certificate", "origins", "hosts", "proxies", "operators", "files"}
    checks = door | {"settings", "database", "pooler", "tls", "connections", "capture", "clock"}
    assert checks | {"notify", "leader", "retention", "schemas"} == found.keys()


async def test_the_doctor_names_what_is_broken_with_its_remedy_and_exits_with_1(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    await chat.sql.execute("alter table chatgenius.messages disable trigger rowcast_update")
    try:
        code, output, errors = await command("doctor", "--json", DATABASE_URL=database)
    finally:
        await chat.sql.execute("alter table chatgenius.messages enable trigger rowcast_update")
    assert (1, "") == (code, errors)
    found = [json.loads(line) for line in output.splitlines()]
    [broken] = [finding for finding in found if finding["state"] == "fail"]
    assert "schemas" == broken["check"]
    assert "chatgenius.messages" in broken["text"]
    assert "daemon --apply-ddl" in broken["text"]
    assert all({"check", "state", "text", "remedy"} == finding.keys() for finding in found)


async def test_the_doctor_reports_faults_of_the_settings_and_the_database_as_findings(
    empty_database: str, tmp_path: Path
) -> None:
    nowhere = "postgresql://nobody:hunter2@127.0.0.1:1/none"  # pragma: allowlist secret
    for environment, line in (
        ({"DATABASE_URL": nowhere}, "fail  database     Nothing answers at 127.0.0.1:1 (ECONNREFUSED)"),
        ({"ROWCAST_WORKERS": "many"}, "fail  settings     ROWCAST_WORKERS: "),
        ({}, "fail  database     No database is configured"),
        ({"DATABASE_URL": empty_database}, "fail  schemas      The schema is not current"),
    ):
        code, output, errors = await command("doctor", ROWCAST_DATA_DIR=str(tmp_path), **environment)
        assert (1, "") == (code, errors)
        assert any(found.startswith(line) for found in output.splitlines()), output
        assert "hunter2" not in output


async def test_the_doctor_names_the_rights_that_a_role_lacks(daemon: Daemon, sql: Connection, database: str) -> None:
    await sql.execute(
        "create role doctor_lacks login createrole bypassrls password 'p';"
        "grant usage on schema rowcast to doctor_lacks"
    )
    try:
        account, _, rest = database.partition("@")
        scheme = account.partition("://")[0]
        found = await examined(f"{scheme}://doctor_lacks:p@{rest}")
    finally:
        await sql.execute("drop owned by doctor_lacks; drop role doctor_lacks")
    failures = [finding.text for finding in found if finding.state is State.FAIL and finding.check == "rights"]
    assert "this role lacks everything that a daemon needs" in failures
    assert "this role may not call chatgenius.may_read" in failures
    [role] = [finding for finding in found if finding.check == "role"]
    assert (State.WARN, "alter role doctor_lacks with NOCREATEROLE NOBYPASSRLS") == (role.state, role.remedy)


SESSION = {
    "role_limit": -1, "database_limit": -1, "max_connections": 100, "reserved": 3, "used": 10,
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "workers", "state", "text"),
    [
        ({}, 1, State.OK, "needs up to 17; max_connections allows 97"),
        ({}, 6, State.FAIL, "needs up to 102; max_connections allows 97"),
        ({"used": 85}, 1, State.WARN, "85 are in use"),
        ({"role_limit": 10}, 1, State.FAIL, "the connection limit of the role allows 10"),
        ({"database_limit": 16}, 1, State.FAIL, "the connection limit of the database allows 16"),
    ],
)
def test_the_doctor_compares_connections_with_every_limit(
    more: dict[str, Any], workers: int, state: State, text: str
) -> None:
    session: Any = SESSION | more
    found = _connections(Settings(ROWCAST_WORKERS=workers), session)
    assert state is found.state
    assert text in found.text


def test_a_level_becomes_a_warning_and_then_a_failure() -> None:
    assert [State.OK, State.WARN, State.WARN, State.FAIL] == [level(skew, SKEW) for skew in (0.9, 1.0, 29.9, 30.0)]


def test_config_shows_values_with_their_sources_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    canary = "canary-" * 6
    url = f"postgresql://rowcast:{canary}@db/chat?sslmode=require&sslpassword={canary}&pass%77ord={canary}"
    monkeypatch.setenv("DATABASE_URL", url)
    monkeypatch.setenv("POSTGRES_PASSWORD", canary)
    (tmp_path / ".env").write_text("ROWCAST_RETENTION=12h\nROWCAST_LOG_LEVEL=warn\n")
    (tmp_path / "secret").write_text(canary)
    (tmp_path / "rowcast.toml").write_text(f'secret_file = "{tmp_path}/secret"\nworkers = 2\n')
    settings, sources = load_with_sources(tmp_path / "rowcast.toml", log_level="debug")
    found = {setting.variable: (setting.value, setting.source) for setting in effective(settings, sources)}
    assert ("12h", ".env") == found["ROWCAST_RETENTION"]
    assert ("debug", "option") == found["ROWCAST_LOG_LEVEL"]
    assert ("2", f"{tmp_path}/rowcast.toml") == found["ROWCAST_WORKERS"]
    assert ("(set, not shown)", f"{tmp_path}/secret") == found["ROWCAST_SECRET"]
    assert ("(ignored: DATABASE_URL is set)", "environment") == found["POSTGRES_PASSWORD"]
    assert ("5", "default") == found["ROWCAST_DRAIN_SECONDS"]
    assert (
        "postgresql://rowcast:***@db/chat?sslmode=require&sslpassword=***&pass%77ord=***" == found["DATABASE_URL"][0]
    )
    assert "canary-" not in str(found)


async def test_config_prints_a_line_for_every_setting(tmp_path: Path) -> None:
    code, output, errors = await command("config", "--json", ROWCAST_RETENTION="90m")
    assert (0, "") == (code, errors)
    found = [json.loads(line) for line in output.splitlines()]
    assert len(Settings.model_fields) == len(found)
    assert {"variable": "ROWCAST_RETENTION", "value": "90m", "source": "environment"} in found
    assert SECRET not in (await command("config"))[1]


async def test_status_shows_whether_a_daemon_is_ready_and_its_exit_code_says_so(daemon: Daemon, chat: Chat) -> None:
    listen = f"{daemon.address[0]}:{daemon.address[1]}"
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say("hello")
        await client.changes()
        code, output, errors = await command("status", ROWCAST_LISTEN=listen)
    assert (0, "") == (code, errors)
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in output.splitlines() if "  " in line)
    assert "yes" == shown["ready"]
    assert shown["leader"].startswith("this process, ")
    assert re.match(r"changes \d+\.\d ms when sent", shown["age"])
    assert re.match(r"1 of \d+, .*, 1 subscriptions", shown["clients"])
    [report] = [
        json.loads(line) for line in (await command("status", "--json", ROWCAST_LISTEN=listen))[1].splitlines()
    ]
    assert (True, [], True) == (report["ready"], report["reasons"], report["leader"])


async def answering(status: int, page: str) -> asyncio.Server:
    """A server that answers every request with this page."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(page)}\r\n\r\n{page}".encode())
        await writer.drain()
        writer.close()

    return await asyncio.start_server(answer, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("status", "page", "reason"),
    [
        (200, "<html>", "the pages there are not those of a daemon"),
        (200, "[]", "the pages there are not those of a daemon"),
        (404, "", "/readyz answers 404"),
    ],
)
async def test_status_says_in_one_line_that_something_else_answers(status: int, page: str, reason: str) -> None:
    async with await answering(status, page) as server:
        port = server.sockets[0].getsockname()[1]
        code, output, errors = await command("status", ROWCAST_LISTEN=f"127.0.0.1:{port}")
    assert (69, "") == (code, output)
    assert errors.startswith(f"daemon: No daemon answers at 127.0.0.1:{port} ({reason}): start it, ")
    assert 1 == errors.count("\n")


async def test_status_of_a_daemon_at_a_unix_socket_that_is_not_ready_names_the_reason(
    postgres: Server, tmp_path: Path
) -> None:
    listen = f"unix:{tmp_path}/s"
    async with postgres.chatgenius() as dsn:
        await command("rollback", "chatgenius", DATABASE_URL=dsn)
        await command("--apply-ddl", DATABASE_URL=dsn, ROWCAST_NOTIFICATIONS="false")
        async with daemon_process(dsn, "--listen", listen):
            code, output, errors = await command("status", ROWCAST_LISTEN=listen)
    assert (1, "") == (code, errors)
    assert re.search(r"^ready +no$", output, re.MULTILINE)
    assert "chatgenius" in output


def test_a_report_leaves_out_the_number_of_the_worker() -> None:
    report = Report.__new__(Report)
    report._samples = {("a_total", frozenset({("table", "x")})): 2.0, ("a_total", frozenset({("table", "y")})): 0.0}
    assert {"x": 2.0} == report.by_label("a_total", "table")
    assert (2.0, 0.0) == (report.value("a_total", table="x"), report.value("b"))


async def explained(database: str, topic: str, user: str, seq: int | None = None) -> tuple[int, list[str]]:
    """Run `daemon explain`; its exit code and its lines."""
    number = () if seq is None else ("--seq", str(seq))
    code, output, errors = await command("explain", "--topic", topic, "--user", user, *number, DATABASE_URL=database)
    assert "" == errors
    return code, output.splitlines()


async def test_explain_says_who_may_read_a_topic_and_from_where(daemon: Daemon, chat: Chat, database: str) -> None:
    code, lines = await explained(database, chat.topic, chat.ada)
    assert (0, f"{chat.ada} gets {chat.topic} from now on.") == (code, lines[-1])
    assert re.search(rf"^yes  right    {chat.ada} may read {chat.topic} since \w+:\d+", lines[1])
    code, lines = await explained(database, chat.topic, chat.bob)
    assert (1, f"{chat.bob} does not get {chat.topic} from now on.") == (code, lines[-1])
    assert lines[1].startswith("no   right    may_read says that ")
    for topic, why in (
        ("nothing:1", "no configured pack or watched table has such a topic"),
        ("a b", "no client can name such a topic"),
    ):
        code, lines = await explained(database, topic, chat.ada)
        assert 1 == code
        assert lines[0].startswith(f"no   topic    {why}")


async def test_explain_says_why_a_change_is_sent_or_not(daemon: Daemon, chat: Chat, database: str) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        message = await chat.say("hello")
        sent = int((await client.next())["pos"].rpartition(":")[2])
        code, lines = await explained(database, chat.topic, chat.ada, sent)
        assert (0, f"{chat.ada} gets the change {sent}.") == (code, lines[-1])
        assert any(line.startswith(f"yes  log      {sent} is an insert of chatgenius.messages") for line in lines)

        await chat.sql.execute(
            "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", chat.channel, chat.bob
        )
        joined = int((await client.next())["pos"].rpartition(":")[2])
        await chat.sql.execute("delete from chatgenius.messages where id = $1", message)
        await client.next()

    later = {
        (chat.topic, chat.bob, sent): "gets a `reset` with the reason `rights`",
        ("users", chat.ada, sent): f"it is in the topic {chat.topic}, not in users",
        (chat.topic, chat.ada, sent): "its row was deleted since",
        (chat.topic, chat.ada, 2**60): "no change has the number",
    }
    for (topic, user, seq), why in later.items():
        code, lines = await explained(database, topic, user, seq)
        assert 1 == code, lines
        assert any(line.startswith("no ") and why in line for line in lines), lines
    assert 0 == (await explained(database, chat.topic, chat.bob, joined))[0]


async def test_explain_names_the_dead_letter_that_a_change_became(daemon: Daemon, chat: Chat, database: str) -> None:
    await chat.sql.execute("alter table chatgenius.files drop constraint if exists files_size_not_negative")
    message = await chat.say("a message with a file")
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.sql.execute(
            "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', -1, 'u')", message
        )
        seq = int((await client.next())["pos"].rpartition(":")[2])
    while not await chat.sql.fetchval("select exists (select from rowcast.dead_letters where seq = $1)", seq):
        await asyncio.sleep(0)
    code, lines = await explained(database, chat.topic, chat.ada, seq)
    assert 1 == code
    assert any("record: greater_than_equal size" in line and f"dead-letters show {seq}" in line for line in lines)


async def test_explain_knows_tables_without_a_pack(daemon: Daemon, chat: Chat, database: str) -> None:
    await chat.sql.execute("create table public.orders (id bigint primary key, status text not null)")
    watch = ("watch", "public.orders", "--topic", "'orders'", "--public")
    try:
        assert 0 == (await command(*watch, DATABASE_URL=database))[0]
        code, lines = await explained(database, "orders", chat.bob)
    finally:
        await chat.sql.execute("drop table public.orders; select rowcast.unwatch_dropped()")
    assert (0, "yes  topic    a table without a pack serves orders") == (code, lines[0])


async def test_explain_needs_a_database_with_a_log(empty_database: str) -> None:
    arguments = ("explain", "--topic", "users", "--user", "ada")
    code, _, errors = await command(*arguments, DATABASE_URL=empty_database)
    assert 36 == code
    assert errors.startswith("daemon: Cannot read the log (")
