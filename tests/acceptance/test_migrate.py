"""`daemon migrate`: what it prints, and that a migration which fails under load leaves nothing behind."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from daemon import files
from daemon.commands.migrate import migrate as migrate_command
from daemon.core.errors import OperatorFault
from daemon.schema import migrate
from daemon.schema.migrate import NotRestored
from daemon.settings import load
from tests.acceptance.chat import Chat
from tests.support.catalog import catalog, contents
from tests.support.daemon import Client, Daemon, command
from tests.support.folders import REVISION, execute, value
from tests.support.postgres import ignore

WRITERS = 3
NEW_COLUMN = "alter table chatgenius.messages add column mood text not null default 'calm';"
FAILURES = {
    "division by zero": """
        update chatgenius.messages set mood = 'loud';
        delete from chatgenius.channel_members;
        select 1 / 0;
    """,
    "rows refer to none": """
        alter table chatgenius.users disable trigger all;
        delete from chatgenius.users;
        alter table chatgenius.users enable trigger all;
    """,
}


class Load:
    """Messages that several writers insert until the end, and those that a client receives."""

    def __init__(self, database: str, chat: Chat, client: Client) -> None:
        self.committed: list[str] = []
        self.received: list[str] = []
        self.ended = False
        self._database, self._chat, self._client = database, chat, client
        self._written = asyncio.Condition()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._receive())
            writers = [group.create_task(self._write()) for _ in range(WRITERS)]
            await self.more()
            yield
            await self.more()
            self.ended = True
            await asyncio.wait(writers)
            await self._chat.say("the end")

    async def more(self) -> None:
        """Wait until every writer must have written again."""
        wanted = len(self.committed) + 10 * WRITERS
        async with self._written:
            await self._written.wait_for(lambda: len(self.committed) >= wanted)

    async def _write(self) -> None:
        connection = await asyncpg.connect(self._database)
        chat = Chat(connection, self._chat.ada, self._chat.bob, self._chat.channel, self._chat.other)
        while not self.ended:
            found = await chat.say("under load")
            async with self._written:
                self.committed.append(found)
                self._written.notify_all()
        await connection.close()

    async def _receive(self) -> None:
        while True:
            frame = await self._client.next()
            assert "changes" == frame["op"], frame
            for change in frame["changes"]:
                assert "insert" == change["kind"], change
                if change["record"]["content"] == "the end":
                    return
                self.received.append(change["key"]["id"])


def with_revisions(folder: Path, *ups: str) -> Path:
    """A copy of ddl/ with more revisions of ChatGenius."""
    shutil.copytree(files.folder("ddl"), folder, ignore=shutil.ignore_patterns("__pycache__"))
    number = int(migrate.heads(["chatgenius"])["chatgenius"][-4:])
    for up in ups:
        path = folder / "chatgenius" / f"{number + 1:04}_more.py"
        path.write_text(
            REVISION.format(revision=f"chatgenius_{number + 1:04}", down_revision=f'"chatgenius_{number:04}"')
        )
        path.with_suffix(".up.sql").write_text(up)
        number += 1
    return folder


async def test_a_migration_that_fails_half_way_under_load_restores_itself_and_clients_miss_nothing(
    database: str, chat: Chat, daemon: Daemon, tmp_path: Path
) -> None:
    before = await catalog(database, ("chatgenius",))
    rows = await contents(database, "chatgenius")
    async with daemon.client(chat.ada) as client:
        assert "subscribed" == (await client.subscribe(chat.topic))["op"]
        load = Load(database, chat, client)
        async with load.running():
            for number, (reason, up) in enumerate(FAILURES.items()):
                ddl = with_revisions(tmp_path / str(number), NEW_COLUMN, "select 1;")
                lines: list[str] = []

                def report(line: str, ddl: Path = ddl, up: str = up, lines: list[str] = lines) -> None:
                    lines.append(line)
                    if line == "dry run: passed":  # what it cannot foresee
                        max((ddl / "chatgenius").glob("*.up.sql")).write_text(up)

                with pytest.raises(OperatorFault, match=reason):
                    await migrate.upgrade(database, ["chatgenius"], report=report, ddl_folder=ddl)
                assert "dry run: passed" in lines
                await load.more()
    assert before == await catalog(database, ("chatgenius",))
    written = {
        row["id"] for row in await chat.sql.fetch("select id from chatgenius.messages where content = 'under load'")
    }
    assert set(load.committed) == written
    assert sorted(load.committed) == sorted(load.received)
    assert rows | {"chatgenius.messages": len(written) + 1} == await contents(database, "chatgenius")


async def test_a_migration_that_succeeds_under_load_loses_no_write_and_clients_miss_nothing(
    database: str, chat: Chat, daemon: Daemon, tmp_path: Path
) -> None:
    ddl = with_revisions(tmp_path / "ddl", NEW_COLUMN, "create index messages_mood on chatgenius.messages (mood);")
    async with daemon.client(chat.ada) as client:
        assert "subscribed" == (await client.subscribe(chat.topic))["op"]
        load = Load(database, chat, client)
        async with load.running():
            await migrate.upgrade(database, ["chatgenius"], report=ignore, ddl_folder=ddl)
    assert len(load.committed) == await value(database, "select count(mood) from chatgenius.messages") - 1
    assert sorted(load.committed) == sorted(load.received)


async def test_migrate_backs_up_applies_and_says_so_and_then_finds_nothing_pending(
    empty_database: str, tmp_path: Path
) -> None:
    await migrate.apply(empty_database, ["chatgenius"], report=ignore)
    await migrate.rollback(empty_database, "chatgenius", to="chatgenius_0003", report=ignore)
    code, output, _ = await command("migrate", "--backup-dir", str(tmp_path), DATABASE_URL=empty_database)
    [backup] = tmp_path.iterdir()
    newest = migrate.heads(["chatgenius"])["chatgenius"]
    lines = output.splitlines()
    assert (0, f"pending: chatgenius: chatgenius_0003 -> {newest}", f"backing up to {backup}") == (code, *lines[:2])
    assert lines[-1] == f"chatgenius: chatgenius_0003 -> {newest}"
    code, output, _ = await command("migrate", "--backup", str(tmp_path / "other"), DATABASE_URL=empty_database)
    assert (0, "nothing is pending: every schema is at its newest revision") == (code, output.splitlines()[0])
    assert [backup] == list(tmp_path.iterdir())
    assert 0 == (await command("check", DATABASE_URL=empty_database))[0]


async def test_migrate_without_a_writable_backup_changes_nothing_and_contradictory_options_are_refused(
    empty_database: str, tmp_path: Path
) -> None:
    (tmp_path / "there").touch()
    code, _, errors = await command("migrate", "--backup", str(tmp_path / "there"), DATABASE_URL=empty_database)
    assert (73, True) == (code, "(it is there already): choose another file" in errors.splitlines()[-1])
    assert await value(empty_database, "select to_regnamespace('rowcast') is null")
    for options in (("--no-backup", "--backup-dir", "."), ("--no-backup", "--restore-on-failure")):
        assert 2 == (await command("migrate", *options, DATABASE_URL=empty_database))[0]


async def test_the_backup_is_restored_if_a_step_cannot_be_undone_and_that_was_asked_for(
    database: str, chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await chat.say("before")
    newest = migrate.heads(["chatgenius"])["chatgenius"]
    before = await catalog(database, ("chatgenius",)), await contents(database, "chatgenius")
    concurrently = (
        "-- no-transaction\ncreate unique index concurrently one_mood on chatgenius.channel_members (mood);"
    )
    ddl = with_revisions(tmp_path / "ddl", NEW_COLUMN.replace("messages", "channel_members"), concurrently)
    folder = files.folder
    monkeypatch.setattr(files, "folder", lambda name: ddl if name == "ddl" else folder(name))
    settings = load(database_url=database, packs=("chatgenius",))
    lines: list[str] = []
    with pytest.raises(NotRestored):
        await migrate_command(settings, None, report=lines.append)
    assert await value(database, "select mood from chatgenius.channel_members limit 1")
    await execute(
        database,
        "drop index chatgenius.one_mood; alter table chatgenius.channel_members drop column mood;"
        f"update chatgenius.alembic_version set version_num = '{newest}'",
    )
    file = tmp_path / "backup"
    with pytest.raises(OperatorFault, match="could not create unique index"):
        await migrate_command(settings, file, restore_on_failure=True, report=lines.append)
    assert f"restoring {file}" in lines
    assert f"{file}: restored " in lines[-1]
    after = await catalog(database, ("chatgenius",)), await contents(database, "chatgenius")
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys()
