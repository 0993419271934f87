"""The command line: real processes, their output and exit codes."""

import asyncio
import json
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import jwt
import pytest

from daemon.schema import migrate
from tests.acceptance.chat import Chat
from tests.support.catalog import catalog
from tests.support.daemon import SECRET, Daemon, clean_environment, command, start

NEWEST = migrate.heads(("chatgenius",))


async def test_apply_ddl_reports_what_it_did_and_is_idempotent(empty_database: str) -> None:
    code, first, _ = await command("--apply-ddl", DATABASE_URL=empty_database)
    assert 0 == code
    assert [f"{schema}: nothing -> {newest}" for schema, newest in NEWEST.items()] == [
        line for line in first.splitlines() if "->" in line
    ]
    code, second, _ = await command("--apply-ddl", DATABASE_URL=empty_database)
    assert 0 == code
    assert [f"{schema}: already at {newest}" for schema, newest in NEWEST.items()] == second.splitlines()


async def test_four_concurrent_runs_apply_once(empty_database: str) -> None:
    runs = await asyncio.gather(*(command("--apply-ddl", DATABASE_URL=empty_database) for _ in range(4)))
    assert [0] * 4 == [code for code, _, _ in runs]
    assert 1 == sum(f"chatgenius: nothing -> {NEWEST['chatgenius']}" in output for _, output, _ in runs)


async def test_applying_after_a_rollback_restores_the_same_schema(empty_database: str) -> None:
    await command("--apply-ddl", DATABASE_URL=empty_database)
    before = await catalog(empty_database, ["rowcast", "chatgenius"])
    code, output, _ = await command("rollback", "chatgenius", "--to", "chatgenius_0004", DATABASE_URL=empty_database)
    assert (0, f"chatgenius: {NEWEST['chatgenius']} -> chatgenius_0004\n") == (code, output)
    code, output, _ = await command("rollback", "chatgenius", DATABASE_URL=empty_database)
    assert (0, "chatgenius: chatgenius_0004 -> nothing\n") == (code, output)
    await command("--apply-ddl", DATABASE_URL=empty_database)
    assert before == await catalog(empty_database, ["rowcast", "chatgenius"])


async def test_a_pack_can_be_applied_to_another_schema(empty_database: str) -> None:
    code, output, _ = await command("--apply-ddl", "--schema", "test", DATABASE_URL=empty_database)
    assert 0 == code
    assert f"chatgenius in schema test: nothing -> {NEWEST['chatgenius']}" in output


async def test_the_help_describes_each_command_in_a_whole_sentence() -> None:
    code, output, errors = await command("--help")
    assert (0, "") == (code, errors)
    commands = output.partition("Commands:\n")[2].splitlines()
    assert commands
    assert [] == [line for line in commands if line.endswith("...") or not line.endswith(".")]


@pytest.mark.parametrize("arguments", [("config",), ("--help",), ("--apply-ddl", "--sql")])
async def test_output_that_nothing_has_room_for_is_one_line_with_a_code(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full, tempfile.TemporaryFile() as errors:
        process = await start(
            *arguments,
            environment=clean_environment(ROWCAST_SECRET=SECRET),
            directory=tempfile.gettempdir(),
            output=full.fileno(),
            errors=errors.fileno(),
        )
        assert 74 == await process.wait()
        errors.seek(0)
        said = errors.read().decode()
    line = "daemon: Nothing more can be written (No space left on device): make room where the output goes.\n"
    assert line == said


async def test_the_ddl_can_be_printed_without_a_database() -> None:
    code, output, errors = await command("--apply-ddl", "--sql")
    assert (0, "") == (code, errors)
    assert "create table chatgenius.messages" in output


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "words"),
    [
        (("--apply-ddl",), {}, 78, "No database is configured"),
        (
            ("--apply-ddl",),
            {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:9/x"},
            10,
            "Nothing answers at 127.0.0.1:9",
        ),
        (("--apply-ddl", "--pack", "nothing"), {"DATABASE_URL": "postgresql:///x"}, 64, 'There is no pack "nothing"'),
        (("--apply-ddl",), {"ROWCAST_BEAT_EVRY": "3"}, 78, "ROWCAST_BEAT_EVERY"),
        (("--apply-ddl",), {"POSTGRES_PORT": "tcp://10.0.0.1:5432"}, 78, "POSTGRES_PORT"),
        ((), {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:9/x"}, 10, "Nothing answers at 127.0.0.1:9"),
        (("tail", "users"), {}, 78, "No database is configured"),
        (("tail", "*"), {}, 2, "no topic can have this name"),
        (("tail", "two words"), {}, 2, "no topic can have this name"),
        (("token", "--user", "ada"), {"ROWCAST_SECRET": "short"}, 78, "ROWCAST_SECRET"),
        (("token", "--user", "ada", "--ttl", "soon"), {}, 2, "--ttl"),
        (("token", "--user", ""), {}, 2, "--user"),
    ],
)
async def test_a_user_error_has_its_own_exit_code_and_one_line(
    arguments: tuple[str, ...], environment: dict[str, str], code: int, words: str
) -> None:
    with tempfile.TemporaryDirectory() as home:
        ended, output, errors = await command(
            *arguments, ROWCAST_DATA_DIR=home, ROWCAST_CONNECT_ATTEMPTS="1", **environment
        )
    messages = [line for line in errors.splitlines() if not line.startswith(("Usage:", "Try ", "{")) and line]
    assert (code, "") == (ended, output)
    assert 1 == len(messages)
    assert words in messages[0]
    assert "hunter2" not in errors
    assert "Traceback" not in errors


async def test_a_token_names_its_user_and_expires_after_its_ttl() -> None:
    code, output, _ = await command("token", "--user", "ada", "--ttl", "15m")
    claims = jwt.decode(output.strip(), SECRET, ["HS256"], audience="rowcast")
    assert (0, "ada", 900) == (code, claims["sub"], claims["exp"] - claims["iat"])


@asynccontextmanager
async def tail(database: str, *arguments: str, **environment: str) -> AsyncIterator[asyncio.StreamReader]:
    """The output of `daemon tail`, which is already following when the block is entered."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "daemon",
        "tail",
        *arguments,
        env=clean_environment(
            DATABASE_URL=database,
            ROWCAST_LOG_FORMAT="json",
            ROWCAST_LOG_LEVEL="info",
            PYTHONUNBUFFERED="1",
            **environment,
        ),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        while b"listener_connected" not in await process.stderr.readline():
            pass
        yield process.stdout
    finally:
        process.terminate()
        await process.communicate()


async def test_tail_prints_one_readable_line_for_each_change(daemon: Daemon, chat: Chat, database: str) -> None:
    async with tail(database, chat.topic) as lines:
        message = await chat.say("hello\nworld " + "x" * 1000)
        line = (await lines.readline()).decode()
    assert re.match(r"\d\d:\d\d:\d\d\.\d{3} +\d+ insert   messages ", line)
    assert message in line
    assert r"hello\nworld" in line
    assert line.endswith(" characters)\n")


async def test_tail_prints_json_and_can_start_from_an_earlier_position(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    async with daemon.client(chat.ada) as client:
        start = client.welcome["pos"]
        await client.subscribe(chat.topic)
        await chat.say("before")
        await client.changes()
    async with tail(database, chat.topic, "--json", "--since", start) as lines:
        await chat.say("after")
        changes = [json.loads(await lines.readline()) for _ in range(2)]
    assert ["before", "after"] == [change["record"]["content"] for change in changes]


@pytest.mark.parametrize("setting", ["true", "false"])
async def test_tail_names_transactions_if_clients_learn_them(
    daemon: Daemon, chat: Chat, database: str, setting: str
) -> None:
    arguments = chat.topic, "--json"
    async with tail(database, *arguments, ROWCAST_TRANSACTION_IDS=setting) as lines:
        await chat.say("hello")
        change = json.loads(await lines.readline())
    assert ("hello", setting == "true") == (change["record"]["content"], "tx" in change)


async def test_tail_hides_the_content_of_a_deleted_row(daemon: Daemon, chat: Chat, database: str) -> None:
    async with daemon.client(chat.ada) as client:
        start = client.welcome["pos"]
        await client.subscribe(chat.topic)
        message = await chat.say("secret")
        await client.changes()
        await chat.sql.execute("delete from chatgenius.messages where id = $1", message)
        await client.changes()
    async with tail(database, chat.topic, "--json", "--since", start) as lines:
        change = json.loads(await lines.readline())
    assert ("delete", {"id": message}) == (change["kind"], change["key"])


async def test_tail_refuses_a_position_it_cannot_continue_from(daemon: Daemon, database: str) -> None:
    code, _, errors = await command("tail", "users", "--since", "elsewhere:1", DATABASE_URL=database)
    assert (43, "daemon: Cannot continue from that position (epoch): omit --since.\n") == (code, errors)


async def test_reset_makes_followers_of_a_topic_or_of_a_tables_pack_read_it_anew(
    daemon: Daemon, chat: Chat, database: str
) -> None:
    async with daemon.client(chat.ada) as ada:
        await ada.subscribe(chat.topic)
        assert (0, f"{chat.topic} is reset\n", "") == await command("reset", chat.topic, DATABASE_URL=database)
        assert "lost" == (await ada.next())["reason"]
        assert (0, "every topic of chatgenius is reset\n", "") == (
            await command("reset", "chatgenius.messages", DATABASE_URL=database)
        )
        assert "lost" == (await ada.next())["reason"]
    code, _, error = await command("reset", "nowhere", DATABASE_URL=database)
    assert 64 == code
    assert error.startswith("daemon: 'nowhere' is neither a captured table (write SCHEMA.TABLE) nor a topic")
