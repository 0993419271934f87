"""Dead letters as an operator handles them: the real command beside a real daemon."""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from daemon.postgres.connect import Connection, connect
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, clean_environment, command, daemon_process
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


@pytest.fixture
async def follower(daemon: Daemon, chat: Chat) -> AsyncIterator[Client]:
    async with following(daemon, chat) as client:
        yield client


@asynccontextmanager
async def following(daemon: Daemon, chat: Chat) -> AsyncIterator[Client]:
    """A client that follows the channel, with the check removed that would refuse what the row model refuses."""
    await chat.sql.execute("alter table chatgenius.files drop constraint if exists files_size_not_negative")
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        yield client


async def attach(chat: Chat, follower: Client, size: int = -1, *, actor: str = "") -> str:
    """Ada attaches a file to a new message; its id. With a negative size it becomes a dead letter."""
    await chat.sql.execute("select set_config('rowcast.actor', $1, false)", actor)
    message = await chat.say("a message with a file")
    file: str = await chat.sql.fetchval(
        """insert into chatgenius.files (message_id, name, type, size, url)
           values ($1, 'n', 't', $2, 'secret-url') returning id""",
        message,
        size,
    )
    await follower.changes(1 if size < 0 else 2)
    if size < 0:
        await is_reset(follower)
    await settled(chat, follower)
    while size < 0 and not await chat.sql.fetchval(
        "select exists (select from rowcast.dead_letters where key ->> 'id' = $1)", file
    ):
        await asyncio.sleep(0)  # storing is retried if it fails at first
    return file


async def is_reset(follower: Client) -> None:
    """The next frame is the reset that stands for an invalid change."""
    frame = await follower.next()
    assert ("reset", "invalid") == (frame["op"], frame.get("reason")), frame


async def settled(chat: Chat, follower: Client) -> None:
    """Wait until everything written so far has been read and its dead letters are stored."""
    for content in ("read after the dead letter", "read after the dead letter was stored"):
        await chat.say(content)
        while (frame := await follower.next())["op"] == "reset":
            assert (chat.topic, "limit") == (frame["topic"], frame["reason"])
        assert [content] == [change["record"]["content"] for change in frame["changes"]]


async def stored(chat: Chat) -> list[int]:
    """The numbers of all dead letters."""
    return [row["seq"] for row in await chat.sql.fetch("select seq from rowcast.dead_letters order by seq")]


async def repair(chat: Chat) -> None:
    """Make the records of all dead letters valid, as a newer row model would."""
    await chat.sql.execute(
        "update rowcast.dead_letters set record = jsonb_set(record::jsonb, '{size}', '1') where record is not null"
    )


async def store_dead_letter(chat: Chat, kind: str) -> int:
    """Store the channel's newest change of this kind as a dead letter; its number."""
    found: int = await chat.sql.fetchval(
        """insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
           select seq, 'chatgenius', schema_name, table_name, topic, kind::rowcast.kind, key::json, record::json, ''
           from rowcast.changes where kind = $1 and topic = $2 order by seq desc limit 1 returning seq""",
        kind,
        chat.topic,
    )
    return found


async def dead_letters(database: str, *arguments: object) -> tuple[int, str, str]:
    """Run `daemon dead-letters`; exit code, output and errors."""
    return await command("dead-letters", *map(str, arguments), DATABASE_URL=database)


def kinds(changes: list[Frame]) -> list[tuple[str, str]]:
    return [(change["table"], change["kind"]) for change in changes]


async def test_an_invalid_change_resets_its_topic_live_and_in_a_replay(
    follower: Client, daemon: Daemon, chat: Chat
) -> None:
    message = await chat.say("a message with a file")
    before = (await follower.next())["pos"]
    await chat.sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', -1, 'u')", message
    )
    live = await follower.next()
    assert ("reset", "invalid", chat.topic) == (live["op"], live["reason"], live["topic"])
    await settled(chat, follower)
    async with daemon.client(chat.ada, since=before) as returning:
        await returning.subscribe(chat.topic)
        assert [live] == [frame for frame in await returning.until("resumed") if frame["op"] == "reset"]


async def test_list_shows_one_line_for_each_dead_letter_and_never_its_record(
    follower: Client, chat: Chat, database: str
) -> None:
    first, second = await attach(chat, follower), await attach(chat, follower)
    code, output, errors = await dead_letters(database, "list")
    assert (0, "") == (code, errors)
    lines = output.splitlines()
    assert [first, second] == [re.findall(r'\{"id":"(\w+)"\}', line)[0] for line in lines]
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ +\d+ chatgenius\.files channel:\w+ insert \{.*\} "
        r"record: greater_than_equal size",
        lines[0],
    )
    assert "secret-url" not in output


async def test_list_filters_by_pack_table_and_limit_and_prints_json(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    newest = await attach(chat, follower)
    for filter_, count in (
        (("--pack", "chatgenius"), 2),
        (("--pack", "other"), 0),
        (("--table", "files"), 2),
        (("--table", "messages"), 0),
    ):
        assert count == len((await dead_letters(database, "list", *filter_))[1].splitlines())
    _, output, _ = await dead_letters(database, "list", "--limit", 1, "--json")
    dead_letter = json.loads(output)
    assert ({"id": newest}, "files", (await stored(chat))[-1]) == (
        dead_letter["key"],
        dead_letter["table_name"],
        dead_letter["seq"],
    )
    assert "record" not in dead_letter


async def test_control_characters_in_a_dead_letter_are_escaped(follower: Client, chat: Chat, database: str) -> None:
    await attach(chat, follower)
    await chat.sql.execute(
        """update rowcast.dead_letters set topic = e'\x1b[2J\nsecond line', record = '{"name": "\u009b2J"}'"""
    )
    _, listed, _ = await dead_letters(database, "list")
    _, shown, _ = await dead_letters(database, "show", *await stored(chat))
    assert r"\u001b[2J\u000asecond line" in listed
    assert not set(map(chr, [*range(0x0A), *range(0x0B, 0x20), *range(0x7F, 0xA0)])) & set(listed + shown)
    assert "\x9b2J" == json.loads(shown)["record"]["name"]


async def test_show_prints_the_whole_dead_letter_with_every_digit(
    follower: Client, chat: Chat, database: str
) -> None:
    file = await attach(chat, follower)
    [seq] = await stored(chat)
    code, output, _ = await dead_letters(database, "show", seq)
    dead_letter = json.loads(output)
    assert (0, seq, file, -1, "secret-url") == (
        code,
        dead_letter["seq"],
        dead_letter["record"]["id"],
        dead_letter["record"]["size"],
        dead_letter["record"]["url"],
    )
    assert len(output.splitlines()) > 10
    await chat.sql.execute("""update rowcast.dead_letters set record = '{"size": 1.00000000000000000000001}'""")
    assert '"size": 1.00000000000000000000001\n' in (await dead_letters(database, "show", seq))[1]


async def test_a_replayed_dead_letter_reaches_followers_of_its_topic_under_a_new_number(
    follower: Client, chat: Chat, database: str
) -> None:
    file = await attach(chat, follower, actor="the uploader")
    await attach(chat, follower, size=1)
    [seq] = await stored(chat)
    newest = await chat.sql.fetchval("select max(seq) from rowcast.log")
    await repair(chat)
    assert (0, "replayed 1 dead letter\n", "") == await dead_letters(database, "replay", seq)
    [change] = await follower.changes()
    assert ("files", "insert", {"id": file}, 1) == (
        change["table"],
        change["kind"],
        change["key"],
        change["record"]["size"],
    )
    assert newest + 1 == change["seq"]
    assert "the uploader" == await chat.sql.fetchval("select actor from rowcast.changes where seq = $1", newest + 1)
    assert [] == await stored(chat)


async def test_a_replayed_dead_letter_that_is_still_invalid_is_stored_again_under_its_new_number(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    [old] = await stored(chat)
    assert 0 == (await dead_letters(database, "replay", "--all"))[0]
    await is_reset(follower)
    await settled(chat, follower)
    [new] = await stored(chat)
    assert new > old


async def test_all_dead_letters_of_a_row_are_replayed_in_order(follower: Client, chat: Chat, database: str) -> None:
    await attach(chat, follower)
    await chat.sql.execute("update chatgenius.files set name = 'newer'")
    await is_reset(follower)
    await settled(chat, follower)
    await repair(chat)
    assert (0, "replayed 2 dead letters\n", "") == await dead_letters(database, "replay", "--all", "--table", "files")
    changes = await follower.changes(2)
    assert [("insert", "n", None), ("update", "newer", ["name"])] == [
        (change["kind"], change["record"]["name"], change.get("changed")) for change in changes
    ]


async def test_the_older_of_two_dead_letters_of_a_row_is_not_replayed_alone(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await chat.sql.execute("update chatgenius.files set name = 'newer'")
    await is_reset(follower)
    await settled(chat, follower)
    await repair(chat)
    older, newer = await stored(chat)
    code, _, errors = await dead_letters(database, "replay", older)
    assert 38 == code
    assert f"{older} of chatgenius.files is not replayed: its row has changed since" == errors.splitlines()[0]
    assert 0 == (await dead_letters(database, "replay", newer))[0]
    assert "newer" == (await follower.changes())[0]["record"]["name"]


async def test_storing_a_dead_letter_is_retried_without_delaying_the_stream(
    daemon: Daemon, follower: Client, chat: Chat
) -> None:
    await chat.sql.execute("alter table rowcast.dead_letters rename to elsewhere")
    await chat.sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', -1, 'u')",
        await chat.say("a message with a file"),
    )
    await follower.changes()
    await is_reset(follower)
    await settled(chat, follower)
    [failed, *_] = [event for event in daemon.events() if event["event"] == "dead_letter_failed"]
    await chat.sql.execute("alter table rowcast.elsewhere rename to dead_letters")
    while not (found := await stored(chat)):
        await asyncio.sleep(0)
    assert [failed["data"]["first"]] == found


async def test_a_dead_letter_whose_row_was_deleted_since_is_not_replayed(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await chat.sql.execute("delete from chatgenius.files")
    assert [("files", "delete")] == kinds(await follower.changes())
    await attach(chat, follower)
    dead, living = await stored(chat)
    await repair(chat)
    code, output, errors = await dead_letters(database, "replay", "--all")
    assert (38, "replayed 1 dead letter\n") == (code, output)
    assert [
        f"{dead} of chatgenius.files is not replayed: its row has been deleted since",
        "daemon: Not replayed because they are out of date: 1 (see above). Drop them.",
    ] == errors.splitlines()
    assert [("files", "insert")] == kinds(await follower.changes())
    assert [dead] == await stored(chat)
    assert living != dead


async def test_a_dead_letter_whose_row_was_soft_deleted_since_is_not_replayed(
    follower: Client, chat: Chat, database: str
) -> None:
    await chat.say("to be deleted")
    await follower.changes()
    seq = await store_dead_letter(chat, "insert")
    await chat.sql.execute("update chatgenius.messages set deleted_at = now()")
    await follower.changes()
    code, output, errors = await dead_letters(database, "replay", seq)
    assert (38, "replayed 0 dead letters\n") == (code, output)
    assert "its row has been deleted since" in errors


async def test_a_dead_letter_whose_row_was_fixed_since_is_not_replayed(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await chat.sql.execute("update chatgenius.files set size = 5")
    assert 5 == (await follower.changes())[0]["record"]["size"]
    await repair(chat)
    code, _, errors = await dead_letters(database, "replay", "--all")
    assert 38 == code
    assert "its row has changed since" in errors


async def test_for_a_row_that_left_the_topic_only_the_leave_is_replayed(
    follower: Client, chat: Chat, database: str
) -> None:
    await chat.say("to be moved")
    await chat.sql.execute("update chatgenius.messages set channel_id = $1", chat.other)
    await follower.changes(2)
    entered, left = await store_dead_letter(chat, "insert"), await store_dead_letter(chat, "leave")
    code, output, errors = await dead_letters(database, "replay", entered, left)
    assert (38, "replayed 1 dead letter\n") == (code, output)
    assert f"{entered} of chatgenius.messages is not replayed: its row has changed since" in errors
    assert [True] == [change["left"] for change in await follower.changes()]


async def test_a_change_that_no_daemon_has_read_yet_outdates_a_dead_letter_too(postgres: Server) -> None:
    async with postgres.chatgenius() as database:
        sql = await connect(database, application_name="test")
        chat = await Chat.begin(sql)
        async with daemon_process(database) as daemon, following(daemon, chat) as follower:
            await attach(chat, follower)
        await sql.execute("update chatgenius.files set size = 5")
        code, _, errors = await dead_letters(database, "replay", "--all")
        await sql.close()
    assert 38 == code
    assert "its row has changed since" in errors


async def test_a_dead_letter_is_not_replayed_after_changes_of_its_table_were_lost(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await chat.sql.execute(
        """insert into rowcast.events (watch, topic, kind, key)
           select id, '*chatgenius', 'lost', '{}' from rowcast.watched where table_name = 'files'"""
    )
    code, _, errors = await dead_letters(database, "replay", "--all")
    assert 38 == code
    assert "its row has changed since" in errors


async def test_a_replay_waits_for_a_transaction_that_is_deleting_the_row(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await repair(chat)
    other = await connect(database, application_name="the application")
    async with other.transaction():  # other transactions still see the row
        await other.execute("delete from chatgenius.files")
        replaying = asyncio.create_task(dead_letters(database, "replay", "--all"))
        while not await chat.sql.fetchval(
            "select count(*) from pg_stat_activity where pg_blocking_pids(pid) <> '{}'"
        ):
            assert not replaying.done(), replaying.result()
    await other.close()
    code, output, errors = await replaying
    assert (38, "replayed 0 dead letters\n") == (code, output)
    assert "its row has been deleted since" in errors
    assert [("files", "delete")] == kinds(await follower.changes())


async def test_a_dead_letter_for_a_delete_is_replayed(follower: Client, chat: Chat, database: str) -> None:
    await attach(chat, follower, size=1)
    await chat.sql.execute("delete from chatgenius.files")
    await follower.changes()
    seq = await store_dead_letter(chat, "delete")
    assert (0, "replayed 1 dead letter\n", "") == await dead_letters(database, "replay", seq)
    assert [("files", "delete")] == kinds(await follower.changes())


async def test_a_dead_letter_for_a_delete_is_not_replayed_after_the_row_was_restored(
    follower: Client, chat: Chat, database: str
) -> None:
    message = await chat.say("here")
    await follower.changes()
    for deleted_at in ("now()", "null"):
        await chat.sql.execute(f"update chatgenius.messages set deleted_at = {deleted_at} where id = $1", message)
        await follower.changes()
    code, _, errors = await dead_letters(database, "replay", await store_dead_letter(chat, "delete"))
    assert 38 == code
    assert "its row has changed since" in errors


async def test_a_dead_letter_whose_event_is_no_longer_in_the_log_is_not_replayed(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    await chat.sql.execute("update rowcast.dead_letters set seq = seq + 1000000000")
    code, _, errors = await dead_letters(database, "replay", "--all")
    assert 38 == code
    assert "its event is no longer in the log" in errors


async def test_drop_deletes_only_the_named_dead_letters(follower: Client, chat: Chat, database: str) -> None:
    for _ in range(3):
        await attach(chat, follower)
    first, second, third = await stored(chat)
    assert (0, "dropped 2 dead letters\n", "") == await dead_letters(database, "drop", first, third)
    assert [second] == await stored(chat)


async def test_dropping_all_dead_letters_without_a_prompt_requires_yes(
    follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    code, _, errors = await dead_letters(database, "drop", "--all")
    assert (2, 1) == (code, len(await stored(chat)))
    assert "--yes" in errors
    assert (0, "dropped 0 dead letters\n", "") == await dead_letters(
        database, "drop", "--all", "--yes", "--table", "messages"
    )
    assert (0, "dropped 1 dead letter\n", "") == await dead_letters(database, "drop", "--all", "--yes")
    assert [] == await stored(chat)


@asynccontextmanager
async def terminal(answer: str) -> AsyncIterator[int]:
    """The terminal's end for a process to read; this line has been typed on it."""
    keyboard, screen = os.openpty()
    try:
        os.write(keyboard, f"{answer}\n".encode())
        yield screen
    finally:
        os.close(screen)
        os.close(keyboard)


@pytest.mark.parametrize(("answer", "code", "left"), [("n", 1, 1), ("y", 0, 0)])
async def test_drop_asks_for_confirmation_on_a_terminal(
    answer: str, code: int, left: int, follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    async with terminal(answer) as stdin:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "daemon", "dead-letters", "drop", "--all"),
            env=clean_environment(DATABASE_URL=database),
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
    assert b"permanently?" in output
    assert (code, left) == (process.returncode, len(await stored(chat)))


@pytest.mark.parametrize("verb", ["show", "replay", "drop"])
async def test_an_unknown_dead_letter_has_its_own_exit_code(
    verb: str, follower: Client, chat: Chat, database: str
) -> None:
    await attach(chat, follower)
    known = () if verb == "show" else await stored(chat)
    assert (
        37,
        "",
        "daemon: There is no dead letter 77: run `daemon dead-letters list` to see which exist.\n",
    ) == await dead_letters(database, verb, *known, 77)
    assert 1 == len(await stored(chat))


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay",),
        ("drop",),
        ("replay", 1, "--all"),
        ("replay", 1, "--table", "files"),
        ("show", -1),
        ("drop", 2**63),
    ],
)
async def test_a_usage_error_is_reported_before_any_connection_to_the_database(arguments: tuple[object, ...]) -> None:
    code, output, errors = await dead_letters("postgresql://127.0.0.1:9/x", *arguments)
    assert (2, "") == (code, output)
    assert "Traceback" not in errors


@pytest.mark.parametrize("arguments", [("list",), ("show", 1), ("replay", "--all"), ("drop", "--all", "--yes")])
async def test_a_database_without_the_rowcast_schema_is_reported_in_one_line(
    arguments: tuple[object, ...], empty_database: str
) -> None:
    assert (
        32,
        "",
        "daemon: The schema is not current (there are no dead letters in this database): "
        "run `daemon --apply-ddl` first.\n",
    ) == await dead_letters(empty_database, *arguments)
