"""`daemon backup` and `daemon restore`: a backup brings a database back anywhere, or one line says why it cannot."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from daemon.commands.backup_file import last_line
from daemon.commands.postgres_programs import Program, without_password
from daemon.commands.seed import seed
from daemon.schema import migrate
from daemon.settings import load
from tests.packs.databases import session as connected
from tests.support.catalog import catalog, contents
from tests.support.daemon import clean_environment, command, daemon_process, start
from tests.support.postgres import FAST, Server, running_server


async def run_script(dsn: str, path: Path) -> None:
    """Run the file as psql does; lines that begin with a backslash are psql's own commands."""
    text = "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("\\"))
    connection = await asyncpg.connect(dsn)
    async with connection.transaction():
        await connection.execute(text)
    await connection.close()


def meaning(catalog: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A catalog without what a dump spells differently: redundant casts, and privileges that are the default."""
    found = {}
    for name, facts in catalog.items():
        kept = dict(facts)
        if name.startswith("constraint "):
            kept["definition"] = re.sub(r"::(character varying|text)(\[\])?|[()]", "", facts["definition"])
        if "acl" in facts and facts.get("owner"):
            owner = facts["owner"]
            default = [f"=X/{owner}"] if name.startswith("function ") else []
            granted = facts["acl"] if facts["acl"] is not None else default
            kept["acl"] = [right for right in granted if not right.startswith(f"{owner}=")]
        found[name] = kept
    return found


async def test_a_backup_restores_schema_and_rows_in_an_empty_database(
    empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    packs = ("antone", "chatgenius")
    await migrate.apply(empty_database, packs, report=lambda _: None)
    await seed(load(database_url=empty_database, packs=packs))
    file = tmp_path / "before.sql"
    code, output, errors = await command("backup", str(file), DATABASE_URL=empty_database)
    assert (0, f"{file}: {file.stat().st_size} bytes\n", "") == (code, output, errors)
    assert 0o600 == file.stat().st_mode & 0o777
    assert [file] == list(tmp_path.iterdir())
    schemas = ("rowcast", *packs)
    before = await catalog(empty_database, schemas)
    rows = [await contents(empty_database, schema) for schema in schemas]
    async with postgres.database() as restored:
        await run_script(restored, file)
        after = await catalog(restored, schemas)
        assert rows == [await contents(restored, schema) for schema in schemas]
        checked = await command("--pack", "antone", "--pack", "chatgenius", "check", DATABASE_URL=restored)
    assert meaning(before) == meaning(after)
    assert 0 == checked[0], checked


async def test_a_backup_before_a_bad_change_brings_back_what_it_destroyed(
    empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    await seed(load(database_url=empty_database, packs=("antone",)))
    before = await contents(empty_database, "antone")
    assert 0 == (await command("backup", str(tmp_path / "b.sql"), DATABASE_URL=empty_database))[0]
    connection = await asyncpg.connect(empty_database)
    await connection.execute("truncate antone.authors cascade; drop table antone.learning_events")
    await connection.close()
    code, output, _ = await command("--pack", "antone", "check", DATABASE_URL=empty_database)
    assert 1 == code
    assert "antone.learning_events: it is missing" in output
    async with postgres.database() as restored:
        await run_script(restored, tmp_path / "b.sql")
        assert before == await contents(restored, "antone")


PACKS = ("chatgenius", "antone", "email_unsubscribe")


@asynccontextmanager
async def bare_server() -> AsyncIterator[tuple[str, str]]:
    """The DSNs of two empty databases on a server of its own, which has no roles but its superuser."""
    async with running_server(FAST) as server, server.database() as first, server.database() as second:
        yield first, second


async def renamed_owner(dsn: str, name: str) -> str:
    """Give the superuser that initdb has made another name; the DSN with that name."""
    async with connected(dsn) as sql:
        await sql.execute("create role helper superuser login password 'helper'")
    helper = await asyncpg.connect(dsn, user="helper", password="helper")
    old = urlsplit(dsn).username
    await helper.execute(f'alter role "{old}" rename to "{name}"')
    await helper.close()
    renamed = dsn.replace(f"//{old}:", f"//{name}:")
    async with connected(renamed) as sql:
        await sql.execute("drop role helper")
    return renamed


async def test_a_backup_restores_anywhere_with_its_roles_and_is_served(
    empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    await migrate.apply(empty_database, PACKS, report=lambda _: None)
    await seed(load(database_url=empty_database, packs=PACKS))
    async with connected(empty_database) as sql:
        # An owner and a group of the application's own, with names that need quotes, and a role that nothing needs.
        await sql.execute(OF_THE_APPLICATION)
        await sql.execute(SOMEBODY_PRESENT)
    file = tmp_path / "all.backup"
    assert 0 == (await command("backup", str(file), DATABASE_URL=empty_database))[0]
    rows = [await contents(empty_database, schema) for schema in PACKS]
    async with bare_server() as (bare, _):
        dsn = await renamed_owner(bare, "landlord")
        done = await command("restore", str(file), DATABASE_URL=dsn)
        assert (0, "") == (done[0], done[2]), done
        assert re.fullmatch(rf"{file}: restored \d+ bytes", done[1].splitlines()[-1])  # after lines of progress
        assert rows == [await contents(dsn, schema) for schema in PACKS]
        checked = await command(*(word for pack in PACKS for word in ("--pack", pack)), "check", DATABASE_URL=dsn)
        assert (0, True) == (checked[0], checked[1].startswith("nothing has drifted")), checked
        async with connected(dsn) as sql:
            roles = await sql.fetch("select rolname, rolcanlogin, rolinherit from pg_roles where rolname !~ '^pg_'")
            expected = {
                "landlord": (True, True),
                "rowcast": (True, True),
                "rowcast_capture": (False, True),
                "antone_app": (False, True),
                "email_unsubscribe_app": (False, True),
                'the "owner\'s" $role$': (False, False),
                "its group": (False, True),
            }
            assert expected == {row["rolname"]: (row["rolcanlogin"], row["rolinherit"]) for row in roles}
            assert await sql.fetchval("select pg_has_role($1, 'its group', 'member')", 'the "owner\'s" $role$')
            assert 0 == await sql.fetchval("select count(*) from rowcast.people")
            assert 1 == await sql.fetchval("select count(*) from rowcast.acks")
            assert 0 == await sql.fetchval("select count(*) from pg_authid where rolname <> 'landlord' and rolsuper")
            channel = "01JH000000CHAN00000GENERA1"
            alice = "01JH000000VSER0000000A11CE"
            async with daemon_process(dsn, "--pack", "chatgenius") as daemon, daemon.client(alice) as client:
                answer = await client.subscribe(f"channel:{channel}")
                assert "subscribed" == answer["op"], answer
                await sql.execute(
                    "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, 'after')",
                    channel,
                    alice,
                )
                [change] = await client.changes()
                assert ("insert", "after") == (change["kind"], change["record"]["content"])
    async with connected(empty_database) as sql:
        await sql.execute("drop table app.things; drop schema app")
        await sql.execute('drop role "the ""owner\'s"" $role$", "its group", "not needed"')


# Through a daemon whose lease holds for long; and a device that has acknowledged something.
SOMEBODY_PRESENT = """
insert into rowcast.presence_leases values ('daemon', 'infinity');
insert into rowcast.people values ('daemon', 'users', 'ada', 'desk', 'chatgenius', '{}', now(), now(), false);
insert into rowcast.acks values ('ada', 'desk', 'e:1', now());
"""

OF_THE_APPLICATION = """
create role "the ""owner's"" $role$" noinherit;
create role "its group";
create role "not needed" superuser;
grant "its group" to "the ""owner's"" $role$";
create schema app;
create table app.things (id integer primary key);
alter table app.things owner to "the ""owner's"" $role$";
grant select on app.things to "its group";
"""


async def test_a_restore_leaves_existing_roles_alone_and_never_alters_them(
    database: str, postgres: Server, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    async with bare_server() as (dsn, other):
        async with connected(dsn) as sql:
            await sql.execute("create role rowcast_capture login noinherit connection limit 3")
        for target in (dsn, other):
            done = await command("restore", str(file), DATABASE_URL=target)
            assert 0 == done[0], done
        async with connected(dsn) as sql:
            row = await sql.fetchrow("select * from pg_roles where rolname = 'rowcast_capture'")
            assert row is not None
            assert (True, False, 3) == (row["rolcanlogin"], row["rolinherit"], row["rolconnlimit"])


async def test_a_database_with_anything_in_it_is_not_restored_to_unless_it_is_replaced(
    database: str, empty_database: str, postgres: Server, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    before = await contents(database, "chatgenius")
    for number, (make, shown) in enumerate(
        {
            "create table public.precious (id integer)": "table public.precious",
            "create function public.precious() returns int return 1": "function public.precious()",
            "create schema precious": "schema precious",
            "create extension citext schema public": "citext",
            "create publication precious for all tables": "publication precious",
            "select lo_create(4711)": "large objects",
        }.items()
    ):
        async with postgres.database() as full:
            async with connected(full) as sql:
                await sql.execute(make)
            code, output, errors = await command("restore", str(file), DATABASE_URL=full)
            assert (30, "", 1) == (code, output, len(errors.splitlines())), make
            assert shown in errors
            assert "--replace" in errors
            if number == 0:
                done = await command("restore", "--replace", str(file), DATABASE_URL=full)
                assert 0 == done[0], done
                assert before == await contents(full, "chatgenius")
                async with connected(full) as sql:
                    assert await sql.fetchval("select to_regclass('public.precious') is null")
                    assert await sql.fetchval("select has_schema_privilege('public', 'public', 'usage')")
    # A backup of the restored state can replace itself, rights and captures included.
    done = await command("restore", "--replace", str(file), DATABASE_URL=database)
    assert 0 == done[0], done
    assert before == await contents(database, "chatgenius")
    assert 0 == (await command("check", DATABASE_URL=database))[0]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "it was not written by this or a newer `daemon backup`"),
        (lambda data: b"select 1;\n", "it was not written by this or a newer `daemon backup`"),
        (lambda data: data.split(b"\n", 1)[1], "it was not written by this or a newer `daemon backup`"),
        (lambda data: data[: len(data) // 2], "its end is missing"),
        (lambda data: data[:-1], "its end is missing"),
        (lambda data: data + b"\n", "its end is missing"),
        (lambda data: data.replace(b"create table", b"create  table", 1).replace(b"CREATE TABLE", b"CREATE tABLE", 1),
         "it is damaged: its checksum is wrong"),
        (lambda data: data.replace(b'"format": 1', b'"format": 2', 1), "a newer version of Rowcast wrote it"),
        (lambda data: data.replace(b'"format": 1', b'"format": x', 1), "it is damaged: its first line"),
    ],
)  # fmt: skip
async def test_a_file_that_is_no_whole_backup_is_refused_in_one_line(
    database: str, empty_database: str, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    file.write_bytes(damage(file.read_bytes()))
    code, output, errors = await command("restore", str(file), DATABASE_URL=empty_database)
    assert (65, "", 1) == (code, output, len(errors.splitlines()))
    assert f"daemon: {file} cannot be restored ({reason}" in errors
    assert "Nothing was changed." in errors
    async with connected(empty_database) as sql:
        assert await sql.fetchval("select to_regnamespace('rowcast') is null")


def resigned(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Change the backup, and make its checksum fit."""
    body = change(file.read_bytes().rsplit(b"\n-- End of", 1)[0] + b"\n")
    file.write_bytes(body + last_line(sha256(body).hexdigest()))


async def test_a_backup_from_a_newer_postgres_or_rowcast_is_refused(
    database: str, empty_database: str, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    resigned(file, lambda data: re.sub(rb'"postgres": \d+', b'"postgres": 99', data, count=1))
    code, _, errors = await command("restore", str(file), DATABASE_URL=empty_database)
    assert (65, True) == (code, "it comes from PostgreSQL 99, and this server is" in errors)
    resigned(file, lambda data: data.replace(b'"postgres": 99', b'"postgres": 14').replace(b"genius_0", b"genius_9"))
    code, _, errors = await command("restore", str(file), DATABASE_URL=empty_database)
    assert (21, True) == (code, "upgrade Rowcast" in errors)


async def test_a_restore_that_fails_half_way_changes_nothing(
    database: str, empty_database: str, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    resigned(file, lambda data: data + b"create role half_a_restore; select * from nowhere;\n")
    code, output, errors = await command("restore", str(file), DATABASE_URL=empty_database)
    assert (74, "") == (code, output)
    assert 1 == len(errors.splitlines())
    assert 'daemon: The restore failed, and nothing was changed: relation "nowhere" does not exist' in errors
    async with connected(empty_database) as sql:
        assert await sql.fetchval("select to_regnamespace('rowcast') is null")
        assert await sql.fetchval("select to_regrole('half_a_restore') is null")


async def test_a_restore_whose_process_is_killed_changes_nothing(
    database: str, empty_database: str, tmp_path: Path
) -> None:
    file = tmp_path / "b"
    await command("backup", str(file), DATABASE_URL=database)
    # The pause lies in the middle: what follows fills the pipe, so the process is alive and waits.
    resigned(file, lambda data: data + b"select pg_sleep(60);\n" + b"select 1;\n" * 200_000)
    with (tmp_path / "errors").open("wb") as errors:
        process = await start(
            "restore", str(file), environment=clean_environment(DATABASE_URL=empty_database),
            directory=tmp_path, errors=errors.fileno(),
        )  # fmt: skip
        async with connected(empty_database) as sql:
            sleeping = (
                "select pid from pg_stat_activity"
                " where query like 'select pg_sleep(60)%' and datname = current_database()"
            )
            while (backend := await sql.fetchval(sleeping)) is None:
                pass
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await sql.execute("select pg_cancel_backend($1)", backend)
            while await sql.fetchval("select exists (select from pg_stat_activity where pid = $1)", backend):
                pass
            assert await sql.fetchval("select to_regnamespace('rowcast') is null")


async def test_a_missing_file_is_reported_in_one_line(empty_database: str, tmp_path: Path) -> None:
    code, _, errors = await command("restore", str(tmp_path / "no"), DATABASE_URL=empty_database)
    assert (65, 1) == (code, len(errors.splitlines()))
    assert "(No such file or directory)" in errors


@pytest.mark.parametrize(
    "arguments",
    [("backup", "f"), ("restore", "f"), ("dead-letters", "list"), ("tail", "users"), ("token", "--user", "u")],
)
async def test_a_command_for_every_schema_refuses_the_name_of_one(database: str, arguments: tuple[str, ...]) -> None:
    code, _, errors = await command("--schema", "elsewhere", *arguments, DATABASE_URL=database)
    assert (2, True) == (code, f"--schema cannot be combined with {arguments[0]}" in errors)


async def test_an_existing_file_is_not_overwritten(database: str, tmp_path: Path) -> None:
    file = tmp_path / "before.sql"
    file.write_text("precious")
    code, output, errors = await command("backup", str(file), DATABASE_URL=database)
    assert (73, "") == (code, output)
    assert f"daemon: {file} cannot be written (it is there already): choose another file.\n" == errors
    assert "precious" == file.read_text()


async def test_a_backup_that_fails_leaves_no_file_and_names_no_password(database: str, tmp_path: Path) -> None:
    url = f"{database}&no_such_option=1"
    code, output, errors = await command("backup", str(tmp_path / "b.sql"), DATABASE_URL=url)
    assert 0 != code
    assert ("", 1) == (output, len(errors.splitlines()))
    password = without_password(database)[1]
    assert password
    assert password not in errors
    assert [] == list(tmp_path.iterdir())
    code, _, errors = await command("backup", str(tmp_path / "no" / "b.sql"), DATABASE_URL=database)
    assert 73 == code
    assert "cannot be written (No such file or directory)" in errors


@pytest.mark.parametrize(
    ("dsn", "shown", "password"),
    [
        ("postgresql://u:p%40ss@h:1/d?sslmode=require", "postgresql://u@h:1/d?sslmode=require", "p@ss"),
        ("postgresql://u@h/d?password=hunter2&port=1", "postgresql://u@h/d?port=1", "hunter2"),
        ("postgresql://h/d", "postgresql://h/d", None),
        ("postgresql://u:p@/d?host=%2Frun%2Fpg", "postgresql://u@/d?host=%2Frun%2Fpg", "p"),
        ("postgresql://u:p@a:1,b:2/d", "postgresql://u@a:1,b:2/d", "p"),
    ],
)
def test_the_password_is_kept_out_of_the_command_line(dsn: str, shown: str, password: str | None) -> None:
    assert (shown, password) == without_password(dsn)


async def test_a_program_that_is_given_up_ends_though_nobody_reads_the_rest_of_its_output() -> None:
    program = Program(Path(sys.executable), os.environ)
    async with asyncio.timeout(30):
        with pytest.raises(ZeroDivisionError):
            async with program.running("-c", "while True: print('x' * 65536)") as process:
                assert process.stdout is not None
                await process.stdout.read(1)
                while process.stdout._transport.is_reading():  # type: ignore[attr-defined]
                    await asyncio.sleep(0)  # until no more fits in memory
                raise ZeroDivisionError
