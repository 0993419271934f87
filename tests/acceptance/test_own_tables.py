"""Tables without a pack: watched from the command line, served by daemons that run."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, Frame, command, daemon_process, get
from tests.support.gateways import PLACES, node
from tests.support.postgres import Server, ignore

TABLES = """
create table public.orders (
    id bigint generated always as identity primary key,
    customer_id bigint not null, status text not null default 'new', total numeric(10, 2), note text,
    gone_at timestamptz
);
create index on public.orders (customer_id);
create table public.lines (id bigint primary key, customer_id bigint not null);
"""
WATCH = ("watch", "public.orders", "--topic", "'orders:' || r.customer_id")
BY_TOPIC = ("--read", "topic = 'orders:' || user_id")


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    """A database with Rowcast's own schema, and no pack."""
    template = await postgres.template("rowcast", partial(migrate.apply, packs=(), report=ignore))
    async with postgres.database(template) as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(database, environment={"ROWCAST_PACKS": "none"}) as process:
        yield process


@pytest.fixture
async def tables(database: str, sql: Connection) -> AsyncIterator[Connection]:
    await sql.execute(TABLES)
    yield sql
    await sql.execute("drop table public.orders, public.lines; select rowcast.unwatch_dropped()")


async def rowcast(database: str, *arguments: str, code: int = 0) -> str:
    """The output of a command that ends with this code; its one line of errors if that is not 0."""
    found, output, errors = await command(*arguments, DATABASE_URL=database, ROWCAST_PACKS="none")
    assert code == found, errors
    return errors if code else output


async def followed(client: Client, topic: str, **members: object) -> Frame:
    """The answer to a subscribe that succeeds, as soon as the daemon knows the table."""
    while (answer := await client.subscribe(topic, **members))["op"] == "error":
        assert "no_such_topic" == answer["code"]
        await asyncio.sleep(0.05)
    return answer


async def test_a_running_daemon_serves_a_table_once_it_is_watched(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    async with daemon.client("7") as reader, daemon.client("8") as stranger:
        assert "no_such_topic" == (await reader.subscribe("orders:7"))["code"]
        output = await rowcast(database, *WATCH, *BY_TOPIC, "--columns", "id,status,total")
        assert "left out    customer_id, note, gone_at" in output
        await followed(reader, "orders:7")
        assert "no_such_topic" == (await stranger.subscribe("orders:7"))["code"]
        await tables.execute("insert into public.orders (customer_id, total) values (7, 1.50), (8, 2)")
        [change] = await reader.changes()
        assert ("insert", "orders", "orders:7") == (change["kind"], change["table"], change.get("topic", "orders:7"))
        assert {"status": "new", "total": 1.5} == {name: change["record"][name] for name in ("status", "total")}
        assert 3 == len(change["record"])
    assert [] == daemon.warnings()


@pytest.mark.parametrize("place", PLACES)
async def test_a_client_need_not_wait_between_topics_of_a_table(
    database: str, tables: Connection, place: str
) -> None:
    await rowcast(database, *WATCH, "--read", "true")
    async with node(place, database, environment={"ROWCAST_PACKS": "none"}) as one, one.client("7") as client:
        for customer in range(3):
            await client.say(op="subscribe", topic=f"orders:{customer}")
        async with asyncio.timeout(20):
            assert ["subscribed"] * 3 == [(await client.next())["op"] for _ in range(3)]


async def test_a_snapshot_and_changes_of_several_tables_share_a_topic(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    await rowcast(database, *WATCH, *BY_TOPIC)
    await rowcast(database, "watch", "public.lines", "--topic", "'orders:' || r.customer_id", *BY_TOPIC)
    await tables.execute(
        "insert into public.orders (customer_id) values (7), (8); insert into public.lines values (1, 7)"
    )
    async with daemon.client("7") as client:
        await followed(client, "orders:7", snapshot=True)
        *frames, _ = await client.until("resumed")
        assert {"orders": 1, "lines": 1} == {frame["table"]: len(frame["rows"]) for frame in frames}
        await tables.execute("update public.lines set id = 2; delete from public.orders")
        assert ["delete", "insert", "delete"] == [change["kind"] for change in await client.changes(3)]


async def test_a_filter_holds_for_a_table_without_a_pack(database: str, daemon: Daemon, tables: Connection) -> None:
    await rowcast(database, *WATCH, *BY_TOPIC)
    await tables.execute("insert into public.orders (customer_id, total) values (7, 5), (7, 15), (8, 20)")
    async with daemon.client("7") as client:
        asked = {"where": {"orders": {"total": {"gte": 10}}}, "columns": {"orders": ["total"]}}
        await followed(client, "orders:7", snapshot=True, **asked)
        [frame, _] = await client.until("resumed")
        assert [{"total": 15}] == [row["record"] for row in frame["rows"]]
        await tables.execute("update public.orders set total = total - 6")
        assert [("delete", True)] * 2 == [(each["kind"], each["left"]) for each in await client.changes(2)]
        await client.say(op="unsubscribe", topic="orders:7")
        await client.until("unsubscribed")
        refused = await client.subscribe("orders:7", where={"lines": {"id": {"eq": 1}}})
        assert "bad_filter" == refused["code"]


async def test_followers_learn_that_a_table_is_watched_otherwise(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    await rowcast(database, *WATCH, *BY_TOPIC, "--columns", "id,status")
    async with daemon.client("7") as client:
        await followed(client, "orders:7")
        await rowcast(database, *WATCH, *BY_TOPIC, "--columns", "id,status,note")
        assert ("reset", "lost") == tuple(map((await client.next()).get, ("op", "reason")))
        await tables.execute("insert into public.orders (customer_id, note) values (7, 'n')")
        assert {"id": 1, "status": "new", "note": "n"} == (await client.changes())[0]["record"]
        # Nothing of this command is new, so nobody hears of it.
        await rowcast(database, *WATCH, *BY_TOPIC, "--columns", "id,status,note")
        await rowcast(database, "--apply-ddl")
        await tables.execute("alter table public.orders alter status drop not null")
        await tables.execute("update public.orders set status = null")
        assert None is (await client.changes())[0]["record"]["status"]
        await rowcast(database, *WATCH, "--read", "user_id = 'boss'", "--columns", "id,status,note")
        assert "revoked" == (await client.next())["op"]
        assert "no_such_topic" == (await client.subscribe("orders:7"))["code"]
    async with daemon.client("boss") as client:
        await followed(client, "orders:7")
        await rowcast(database, "unwatch", "public.orders")
        assert "revoked" == (await client.next())["op"]
        assert "no_such_topic" == (await client.subscribe("orders:7"))["code"]
    assert [] == daemon.warnings()


async def test_a_change_that_names_no_topic_of_its_table_reaches_nobody(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    await rowcast(
        database,
        "watch",
        "public.orders",
        "--topic",
        "r.status",
        "--topics",
        "open,late:*",
        "--read",
        "user_id = '7'",
    )
    await tables.execute("insert into public.orders (customer_id, status) values (1, 'secret'), (2, 'late:x')")
    async with daemon.client("7") as client:
        await followed(client, "open")
        await followed(client, "late:y")
        assert "no_such_topic" == (await client.subscribe("secret"))["code"]
        assert "late:y is reset\n" == await rowcast(database, "reset", "late:y")
        assert ("reset", "late:y") == tuple(map((await client.next()).get, ("op", "topic")))
        await rowcast(database, "reset", "secret", code=64)


async def test_the_types_of_own_tables_are_those_of_welcome(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    await rowcast(database, *WATCH, *BY_TOPIC)
    async with daemon.client("7") as client:
        await followed(client, "orders:7")
    printed = await rowcast(database, "types", "--typescript")
    async with daemon.client("7") as client:
        assert f'export const SCHEMA = "{client.welcome["schema"]}";' in printed
    assert "  | `orders:${string}`;" in printed
    for line in ("id: number;", "note: string | null;", "gone_at: string | null;"):
        assert line in printed
    schema = json.loads(await rowcast(database, "types", "--json-schema"))
    assert schema == json.loads((await get(f"{daemon.http}/schema.json"))[1])
    assert ["id"] == schema["$defs"]["public.orders.orders"]["required"][:1]


async def test_a_function_may_say_who_may_read(database: str, tables: Connection) -> None:
    await tables.execute(
        "create function public.may_follow(user_id text, topic text) returns boolean language sql as "
        "$$ select topic = 'orders:' || user_id or user_id = 'boss' $$"
    )
    await rowcast(database, *WATCH, "--read-function", "public.may_follow")
    readers = "select u.name from unnest('{7,8,boss}'::text[]) as u (name) where rowcast.may_read(u.name, 'orders:7')"
    assert ["7", "boss"] == [row["name"] for row in await tables.fetch(readers)]


async def test_watching_says_who_may_read_and_how_snapshots_are_read(database: str, tables: Connection) -> None:
    said = await rowcast(database, *WATCH, "--public")
    assert "  readers     everybody with a token\n" in said
    assert "  snapshots   by r.customer_id, which has an index\n" in said
    said = await rowcast(database, "watch", "public.orders", "--topic", "'a'", "--read", "r.customer_id = 7")
    assert "  readers     r.customer_id = 7 (the same for every user: it does not name user_id)\n" in said
    assert "  snapshots   of all rows\n" in said


async def test_watches_are_listed_checked_and_survive_a_restore(
    database: str, tables: Connection, postgres: Server, tmp_path: Path
) -> None:
    await rowcast(database, *WATCH, *BY_TOPIC, "--soft-delete", "gone_at")
    await tables.execute("select rowcast.watch('public.lines', $$'lines'$$, '{id}')")
    listed = await rowcast(database, "watches")
    assert "readers     topic = 'orders:' || user_id" in listed
    assert "readers     nobody" in listed
    [lines, orders] = [json.loads(line) for line in (await rowcast(database, "watches", "--json")).splitlines()]
    assert (["orders:*"], None) == (orders["topics"], lines["topics"])
    await tables.execute("alter table public.lines disable trigger rowcast_insert")
    assert "problems    its capture trigger on public.lines for insert is disabled" in await rowcast(
        database, "watches"
    )
    await tables.execute("alter table public.orders rename note to remark")
    code, output, _ = await command("check", DATABASE_URL=database, ROWCAST_PACKS="none")
    assert (1, True) == (code, "or run `daemon watch` for it without that column" in output), output
    await tables.execute("alter table public.orders rename remark to note")
    await tables.execute("alter table public.lines enable trigger rowcast_insert")
    assert "2 tables are watched" in await rowcast(database, "check")
    await rowcast(database, "backup", str(tmp_path / "backup"))
    watch = await tables.fetchval("select watch from rowcast.own_tables")
    await tables.execute(f"alter function rowcast.may_read_{watch}(text, text) rename to other")
    code, output, _ = await command("check", DATABASE_URL=database, ROWCAST_PACKS="none")
    assert (1, True) == (code, "which says who may read its topics, is missing" in output)
    await rowcast(database, "--apply-ddl")
    await tables.execute("drop function rowcast.other")
    await tables.execute(f"alter function rowcast.may_read_{watch}(text, text) security invoker")
    code, output, _ = await command("check", DATABASE_URL=database, ROWCAST_PACKS="none")
    assert (1, True) == (code, "differs from what rowcast.serve() created: run `daemon --apply-ddl`" in output), (
        output
    )
    await rowcast(database, "unwatch", "public.orders")
    await rowcast(database, *WATCH, *BY_TOPIC, "--soft-delete", "gone_at")
    assert "2 tables are watched" in await rowcast(database, "check")
    async with postgres.database() as copy:
        await rowcast(copy, "restore", str(tmp_path / "backup"))
        assert "2 tables are watched" in await rowcast(copy, "check")
        async with daemon_process(copy, environment={"ROWCAST_PACKS": "none"}) as restored:
            assert 200 == (await get(f"{restored.http}/readyz"))[0]
            async with restored.client("7") as client:
                assert "subscribed" == (await client.subscribe("orders:7"))["op"]
            await restored.stop()
        assert "table public.lines, table public.orders" in await rowcast(copy, "rollback", "rowcast", code=24)
        await rowcast(copy, "rollback", "rowcast", "--to", "rowcast_0011")
        await rowcast(copy, "--apply-ddl")
        assert "2 tables are watched" in await rowcast(copy, "check")
        assert [None, None] == [
            json.loads(line)["topics"] for line in (await rowcast(copy, "watches", "--json")).splitlines()
        ]


async def test_a_table_that_was_dropped_or_renamed_can_be_unwatched(database: str, tables: Connection) -> None:
    await rowcast(database, *WATCH, "--public")
    await rowcast(database, "watch", "public.lines", "--topic", "'lines'", "--public")
    await tables.execute("drop table public.orders; alter table public.lines rename to renamed")
    await rowcast(database, "unwatch", "public.orders")
    left = await rowcast(database, "watches")
    assert ("public.orders" not in left, "public.lines" in left) == (True, True)
    await tables.execute("insert into public.renamed values (1, 1)")
    await rowcast(database, "unwatch", "public.lines")
    assert "no table is watched\n" == await rowcast(database, "watches")
    await tables.execute("insert into public.renamed values (2, 2)")
    await rowcast(database, "unwatch", "public.lines", code=64)
    await tables.execute("alter table public.renamed rename to lines; create table public.orders ()")


async def test_tables_are_watched_one_after_the_other(database: str, tables: Connection) -> None:
    async with tables.transaction():
        await tables.execute("select rowcast.serve('public.lines', $$'orders:' || r.customer_id$$, 'true')")
        watching = asyncio.create_task(rowcast(database, *WATCH, *BY_TOPIC, code=48))
        waits = "select exists (select from pg_locks where not granted and relation = 'rowcast.own_tables'::regclass)"
        while not watching.done() and not await tables.fetchval(waits):
            await asyncio.sleep(0.01)
    assert "where another right decides who may read them (true)" in await watching
    await rowcast(database, "unwatch", "public.lines")
    await asyncio.gather(*(rowcast(database, *WATCH, "--read", f"user_id = '{n}'") for n in range(3)))


async def test_tables_and_columns_have_any_names(database: str, daemon: Daemon, sql: Connection) -> None:
    names = ("$capture$", "a,b", "a\nb", "\\", 'a"b', "€" * 21, "%s")  # the key is the first; the last is not told
    quoted = ['"{}"'.format(name.replace('"', '""')) for name in names]
    table = f"public.{quoted[2]}"
    try:
        await sql.execute(f"create table {table} ({' text, '.join(quoted)} text, primary key ({quoted[0]}))")
        arguments = ("--topic", f"'odd:' || r.{quoted[0]}", "--read", f"r.{quoted[1]} <> $capture$ $_$ $capture$")
        output = await rowcast(database, "watch", table, *arguments, "--columns", ",".join(quoted[:-1]))
        assert "left out    %s" in output
        insert = f"insert into {table} values ('7'{', $1' * 6})"
        await sql.execute(insert, "first")
        async with daemon.client("7") as client:
            await followed(client, "odd:7", snapshot=True)
            [row] = (await client.until("snapshot"))[-1]["rows"]
            assert dict.fromkeys(names[:-1], "first") | {names[0]: "7"} == row["record"]
            for statement in (f"update {table} set {quoted[4]} = $1", f"delete from {table} where $1 <> ''", insert):
                await sql.execute(statement, "second")
                await client.until("changes")
        assert "nothing has drifted" in await rowcast(database, "check")
    finally:
        await sql.execute(f"drop table if exists {table}; select rowcast.unwatch_dropped()")


REFUSED: dict[str, tuple[tuple[str, ...], int, str]] = {
    "no such table": (("watch", "public.nothing", "--topic", "'a'", "--public"), 64, "There is no table"),
    "no schema": (("watch", "orders", "--topic", "'a'", "--public"), 64, "write SCHEMA.TABLE"),
    "no name": (("watch", "a b.c", "--topic", "'a'", "--public"), 64, "There is no table"),
    "a view": (("watch", "pg_catalog.pg_views", "--topic", "'a'", "--public"), 48, "this: it is not an ordinary"),
    "no rights": (WATCH, 2, "--read-function"),
    "two rights": ((*WATCH, "--public", "--read", "true"), 2, "give one of"),
    "no quotes": (("watch", "public.orders", "--topic", "orders", "--public"), 48, "a text needs quotes of its own"),
    "no column": (("watch", "public.orders", "--topic", "'a' || 'b'", "--public"), 48, "names no column"),
    "unknown column": ((*WATCH, "--public", "--columns", "id,nothing"), 48, "has no column nothing"),
    "no key": ((*WATCH, "--public", "--key", "note"), 48, "(note) is no key"),
    "no such right": ((*WATCH, "--read", "r.nothing"), 48, "cannot be worked out (r.nothing)"),
    "no such function": ((*WATCH, "--read-function", "public.may"), 64, "There is no function"),
    "unwatched": (("unwatch", "public.lines"), 64, "is not watched"),
}


async def test_what_cannot_be_watched_is_refused_in_one_line_and_nothing_changes(
    database: str, tables: Connection
) -> None:
    for name, (arguments, code, message) in REFUSED.items():
        error = await rowcast(database, *arguments, code=code)
        assert message in error, name
        assert code == 2 or 1 == error.count("\n"), name
    assert "no table is watched\n" == await rowcast(database, "watches")


async def test_own_tables_stand_beside_those_of_a_pack(postgres: Server) -> None:
    async with postgres.chatgenius() as dsn:
        sql = await connect(dsn, application_name="test")
        await sql.execute(TABLES)
        for arguments, code, message in (
            (("watch", "chatgenius.messages", "--topic", "'m'", "--public"), 64, "belongs to the pack chatgenius"),
            (("unwatch", "chatgenius.messages"), 64, "belongs to the pack chatgenius"),
            (
                ("watch", "public.orders", "--topic", "'users'", "--public"),
                48,
                "the pack chatgenius has topics like users",
            ),
            (("watch", "public.orders", "--topic", "'channel:' || r.id", "--public"), 48, "topics like channel:"),
            ((*WATCH, "--public"), 0, ""),
        ):
            found, _, errors = await command(*arguments, DATABASE_URL=dsn)
            assert (code, True) == (found, message in errors), errors
        async with daemon_process(dsn) as daemon:
            chat = await Chat.begin_again(sql, daemon)
            async with daemon.client(chat.ada) as client:
                for topic in (chat.topic, "orders:7"):
                    assert "subscribed" == (await client.subscribe(topic))["op"]
                await chat.say("hello")
                await sql.execute("insert into public.orders (customer_id) values (7)")
                assert ["messages", "orders"] == [change["table"] for change in await client.changes(2)]
                await sql.execute("truncate public.orders")
                frame = await client.next()
                assert ("reset", "orders:7", "truncate") == (frame["op"], frame["topic"], frame["reason"])
                await chat.say("nobody else is reset")
                await client.changes()
        await sql.close()


async def test_a_check_names_rights_that_daemons_or_conditions_lack(database: str, tables: Connection) -> None:
    await tables.execute("create table public.members (user_id text); create role own_tables_daemon")
    try:
        await rowcast(database, "--apply-ddl", "--grant-to", "own_tables_daemon")
        await tables.execute("grant select on public.members to rowcast_capture")
        condition = "exists (select from public.members as m where m.user_id = given.user_id)"
        await rowcast(database, *WATCH, "--read", condition)
        assert "nothing has drifted: 1 table is watched" in await rowcast(database, "check")
        right = await tables.fetchval(
            "select p.oid::regprocedure::text from pg_proc as p where p.proname ~ '^may_read_[0-9]'"
        )
        await tables.execute(
            f"revoke select on public.members, public.orders from rowcast_capture;"
            f"revoke execute on function {right} from own_tables_daemon"
        )
        grant = "grant that to rowcast_capture, or run `daemon --apply-ddl`"
        assert [
            "public.orders: rowcast_capture may not read its captured column "
            "id, customer_id, status, total, note, gone_at: snapshots fail, and so may writes, "
            "or the column is another one of that name: run `daemon --apply-ddl`",
            f"role own_tables_daemon: it lacks execute on {right}: run `daemon --apply-ddl`",
            "public.orders: the function that says who may read its topics fails, so nobody may "
            f"(permission denied for table members): {grant}",
            "public.orders: the function that reads it for snapshots fails, and so may writes "
            f"(permission denied for table orders): {grant}",
        ] == await checked(database)
        await tables.execute("grant select on public.members to rowcast_capture")
        await rowcast(database, "--apply-ddl")
        assert "nothing has drifted: 1 table is watched" in await rowcast(database, "check")
    finally:
        await tables.execute(
            "drop table public.members; drop owned by own_tables_daemon; drop role own_tables_daemon"
        )


async def checked(database: str) -> list[str]:
    """The problems that `daemon check` prints."""
    code, output, errors = await command("check", DATABASE_URL=database, ROWCAST_PACKS="none")
    assert (1, "") == (code, errors)
    return output.splitlines()
