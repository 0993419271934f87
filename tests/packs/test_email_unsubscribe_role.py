"""The unsubscriber's application has access to its schema and to nothing else."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from daemon.packs import bundled
from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.packs.databases import session
from tests.packs.unsubscriber import APP, PASSWORD, as_app, give_password, sqlstate_of, unsubscriber
from tests.support.cases import for_each
from tests.support.postgres import CAPTURE_ROLE, Server

ROOT = Path(__file__).parents[2]
REFUSED = "42501"  # insufficient_privilege

# The role's rights on each table, and the columns that it may update where these are not all.
RIGHTS: dict[str, tuple[set[str], set[str]]] = {
    "users": ({"select", "insert", "delete"}, set()),
    "sessions": ({"select", "insert"}, {"ended_at", "end_reason"}),
    "oauth_tokens": ({"select", "insert", "update", "delete"}, set()),
    "allow_list": ({"select", "insert", "delete"}, set()),
    "senders": ({"select"}, set()),
    "sender_emails": ({"select", "insert"}, set()),
    "unsubscribe_history": ({"select", "insert"}, {"status", "failure_reason"}),
    "audit_log": ({"select"}, set()),
    "alembic_version": ({"select"}, set()),
}

EVERYTHING_ELSE = """
create table email_unsubscribe.mine (id int)
create view email_unsubscribe.mine as select 1
create function email_unsubscribe.mine() returns int language sql as 'select 1'
create type email_unsubscribe.mine as (a int)
create sequence email_unsubscribe.mine
create index on email_unsubscribe.users (created_at)
create trigger mine after insert on email_unsubscribe.users execute function email_unsubscribe.audit_session()
create rule mine as on insert to email_unsubscribe.users do instead nothing
create policy mine on email_unsubscribe.users
alter table email_unsubscribe.users add mine int
alter table email_unsubscribe.users disable trigger all
alter table email_unsubscribe.audit_log disable trigger audit_log_append_only
alter table email_unsubscribe.oauth_tokens drop constraint oauth_tokens_access_token_is_encrypted
alter table email_unsubscribe.users owner to email_unsubscribe_app
alter function email_unsubscribe.may_read(text, text) security invoker
alter schema email_unsubscribe rename to mine
comment on table email_unsubscribe.users is 'mine'
drop table email_unsubscribe.sender_emails
drop trigger audit_log_append_only on email_unsubscribe.audit_log
drop schema email_unsubscribe cascade
truncate email_unsubscribe.audit_log
truncate email_unsubscribe.users cascade
lock table email_unsubscribe.audit_log in access exclusive mode
select email_unsubscribe.may_read('x', 'senders')
select email_unsubscribe.refresh_senders('{}')
select email_unsubscribe.tally('{}')
create schema mine
create table public.mine (id int)
create temporary table mine (id int)
create temporary view mine as select 1
drop extension plpgsql
create role mine
create language mine handler plpgsql_call_handler
create foreign data wrapper mine
create publication mine for all tables
create subscription mine connection 'host=nowhere' publication mine with (connect = false)
create event trigger mine on ddl_command_start execute function email_unsubscribe.refuse_change()
alter role email_unsubscribe_app superuser
alter role rowcast in database template1 set search_path = mine
alter role rowcast password 'mine'
set role rowcast
set role rowcast_capture
set role pg_read_all_data
set session authorization rowcast
set session_replication_role = replica
set deadlock_timeout = 1
reset session authorization; set role pg_monitor
grant rowcast_capture to email_unsubscribe_app
copy email_unsubscribe.users to '/tmp/mine'
copy email_unsubscribe.users to program 'true'
copy email_unsubscribe.users (id) from program 'true'
select pg_read_file('PG_VERSION')
select pg_ls_dir('.')
select pg_reload_conf()
select pg_rotate_logfile()
select pg_switch_wal()
select pg_create_restore_point('mine')
select * from pg_authid
select * from pg_hba_file_rules
select * from pg_statistic
select * from pg_largeobject
select lo_create(0)
select lo_creat(-1)
select lo_from_bytea(0, 'mine')
select lo_import('/etc/hostname')
select lo_get(4711)
select lo_put(4711, 0, 'mine')
select lo_unlink(4711)
"""


@pytest.fixture
async def dsn(postgres: Server) -> AsyncIterator[str]:
    """Two packs, a table of another application and a large object, after isolation.sql."""
    async with unsubscriber(postgres) as found:
        async with session(found) as owner:
            await owner.execute((ROOT / "ddl/email_unsubscribe/isolation.sql").read_text())
            await owner.execute("create table public.others (id int primary key); select lo_create(4711)")
            await owner.execute("create schema others; create table others.others (id int primary key)")
        yield found


@pytest.fixture
async def app(dsn: str) -> AsyncIterator[Connection]:
    """The application's own session."""
    async with session(as_app(dsn)) as connection:
        yield connection


async def test_the_application_logs_in_as_a_role_without_any_attribute_or_membership(app: Connection) -> None:
    row = await app.fetchrow("select * from pg_roles where rolname = session_user")
    assert row is not None
    assert (APP, True) == (row["rolname"], row["rolcanlogin"])
    flags = ("rolsuper", "rolcreaterole", "rolcreatedb", "rolreplication", "rolbypassrls")
    assert not any(row[flag] for flag in flags)
    assert 0 == await app.fetchval("select count(*) from pg_auth_members where member = $1::oid", row["oid"])


async def test_the_role_cannot_log_in_until_the_operator_lets_it_with_a_password(
    postgres: Server, empty_database: str
) -> None:
    async with session(empty_database) as owner:
        await migrate.apply(
            empty_database, ["email_unsubscribe"], schemas={"email_unsubscribe": "fresh"}, report=print
        )
        role = "fresh_app"
        assert await owner.fetchval("select rolpassword is null from pg_authid where rolname = $1", role) is True
        await owner.execute(f"alter role {role} password '{PASSWORD}'")
        assert "28000" == await refusal(as_app(empty_database, role))  # it is not permitted to log in
        await give_password(owner, role)
        async with session(as_app(empty_database, role)) as connection:
            assert 0 == await connection.fetchval("select count(*) from fresh.users")
            assert REFUSED == await sqlstate_of(connection, "select * from rowcast.events")


async def test_applying_again_leaves_the_password_alone(dsn: str) -> None:
    async with session(dsn) as owner:
        before = await owner.fetchval("select rolpassword from pg_authid where rolname = $1", APP)
        await migrate.apply(dsn, ["email_unsubscribe"], report=lambda _: None)
        assert before == await owner.fetchval("select rolpassword from pg_authid where rolname = $1", APP)
        assert before.startswith("SCRAM-SHA-256$")


async def test_no_file_of_the_pack_holds_a_password() -> None:
    for path in [*(ROOT / "ddl/email_unsubscribe").iterdir(), ROOT / "triggers/email_unsubscribe.sql"]:
        if path.is_file():
            assert not re.search(r"password\s+'", path.read_text(), re.IGNORECASE), path.name


async def test_the_role_has_exactly_the_rights_that_its_work_needs(dsn: str) -> None:
    async with session(dsn) as owner:
        tables = await owner.fetch(
            "select c.relname, array(select p from unnest('{select,insert,update,delete,truncate,references,trigger}'"
            "::text[]) p where has_table_privilege($1::name, c.oid, p)) as rights,"
            " array(select a.attname::text from pg_attribute a where a.attrelid = c.oid and a.attnum > 0"
            " and has_column_privilege($1::name, c.oid, a.attnum, 'update')) as changed"
            " from pg_class c where c.relnamespace = 'email_unsubscribe'::regnamespace and c.relkind in"
            " ('r', 'v', 'S')",
            APP,
        )
    found = {t["relname"]: (set(t["rights"]), set(t["changed"])) for t in tables}
    found["oauth_tokens"] = (found["oauth_tokens"][0], set())  # all columns, by the right on the table
    assert RIGHTS == found


async def test_no_relation_outside_the_schema_is_accessible(dsn: str, app: Connection) -> None:
    async with session(dsn) as owner:
        relations = await owner.fetch(
            "select c.oid::regclass::text as name, c.relkind::text as kind,"
            "       (select quote_ident(a.attname) from pg_attribute a where (a.attrelid, a.attnum) = (c.oid, 1))"
            " from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'p', 'v', 'S')"
            " and n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'email_unsubscribe')"
        )
    names = {relation["name"] for relation in relations}
    assert {"rowcast.events", "rowcast.changes", "chatgenius.users", "others.others", "public.others"} < names
    for name, kind, column in relations:
        statements = [f"select * from {name}"]
        if kind == "S":
            statements.append(f"select nextval('{name}')")
        elif kind in ("r", "p"):
            statements += [f"delete from {name}", f"update {name} set {column} = default"]
            statements += [f"insert into {name} ({column}) values (default)", f"truncate {name}"]
            statements += [f"lock table {name} in share mode", f"alter table {name} add x int", f"drop table {name}"]
        for statement in statements:
            assert REFUSED == await sqlstate_of(app, statement), statement


async def test_no_function_outside_the_schema_can_be_called_but_the_one_that_generates_ids(
    dsn: str, app: Connection
) -> None:
    async with session(dsn) as owner:
        functions = await owner.fetch(
            "select p.oid::regprocedure::text as name, p.pronargs, p.oid::regproc::text as bare,"
            " array(select t::regtype::text from unnest(p.proargtypes) t) as types from pg_proc p"
            " join pg_namespace n on n.oid = p.pronamespace"
            " where n.nspname in ('rowcast', 'chatgenius') and p.prorettype <> 'trigger'::regtype"
        )
    assert {"rowcast.ulid()", "rowcast.ring()", "chatgenius.may_read(text,text)"} < {f["name"] for f in functions}
    for function in functions:
        arguments = ", ".join(f"null::{type_}" for type_ in function["types"])
        answer = await sqlstate_of(app, f"select {function['bare']}({arguments})")
        assert (None if function["name"] == "rowcast.ulid()" else REFUSED) == answer, function["name"]


async def test_as_installed_the_role_reaches_nothing_of_others_but_the_function_that_makes_ids(
    empty_database: str,
) -> None:
    """With every pack, and without isolation.sql."""
    await migrate.apply(empty_database, list(bundled()), report=lambda _: None)
    others = """
        where n.nspname not in ('pg_catalog', 'information_schema', 'pg_toast', 'email_unsubscribe')
        and has_schema_privilege($1::name, n.oid, 'usage')
        and not exists (select from pg_depend as d where d.objid = o.oid and d.deptype = 'e')
    """
    async with session(empty_database) as owner:
        relations = await owner.fetch(
            "select o.oid::regclass::text as name from pg_class as o join pg_namespace as n on n.oid = o.relnamespace"
            f" {others} and case when o.relkind = 'S' then has_sequence_privilege($1::name, o.oid, 'usage, select')"
            "  when o.relkind in ('r', 'p', 'v', 'm', 'f') then has_any_column_privilege($1::name, o.oid, 'select')"
            "   or has_table_privilege($1::name, o.oid, 'insert, update, delete, truncate') end",
            APP,
        )
        functions = await owner.fetch(
            "select o.oid::regprocedure::text as name"
            " from pg_proc as o join pg_namespace as n on n.oid = o.pronamespace"
            f" {others} and has_function_privilege($1::name, o.oid, 'execute')",
            APP,
        )
        schemas = await owner.fetch(
            "select nspname as name from pg_namespace where has_schema_privilege($1::name, oid, 'create')", APP
        )
        is_old = owner.get_server_version().major < 15  # where PUBLIC has that right, until somebody revokes it
    assert [] == [row["name"] for row in relations]
    assert ["rowcast.ulid()"] == [row["name"] for row in functions]
    assert (["public"] if is_old else []) == [row["name"] for row in schemas]


async def test_where_every_role_may_create_in_public_a_warning_says_what_to_revoke(empty_database: str) -> None:
    """As in PostgreSQL 14."""
    output: list[str] = []
    async with session(empty_database) as owner:
        await owner.execute("grant create on schema public to public")
        await migrate.apply(empty_database, ["email_unsubscribe"], report=output.append)
    [warning] = [line for line in output if line.startswith("warning")]
    assert warning.endswith("in the schema public: revoke create on schema public from public")


async def test_everything_else_is_refused(app: Connection) -> None:
    statements = EVERYTHING_ELSE.strip().splitlines()
    answers = {statement: await sqlstate_of(app, statement) for statement in statements}
    for statement in ("create database mine", "create tablespace mine location '/mine'", "alter system reset all"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):  # not possible in the transaction of sqlstate_of
            await app.execute(statement)
    assert {} == {statement: answer for statement, answer in answers.items() if answer != REFUSED}


async def test_the_role_cannot_grant_its_rights(dsn: str, app: Connection) -> None:
    await app.execute("grant select on email_unsubscribe.oauth_tokens to public")  # a warning: nothing was granted
    async with session(dsn) as owner:
        acl = await owner.fetchval(
            "select relacl::text from pg_class where oid = 'email_unsubscribe.oauth_tokens'::regclass"
        )
    assert not re.search("[{,]=", acl)


async def test_a_superusers_session_cannot_be_ended_or_inspected(dsn: str, app: Connection) -> None:
    async with session(dsn) as owner:
        pid = owner.get_server_pid()
        assert REFUSED == await sqlstate_of(app, f"select pg_terminate_backend({pid})")
        assert "<insufficient privilege>" == await app.fetchval(
            "select query from pg_stat_activity where pid = $1", pid
        )


async def test_a_line_of_pg_hba_keeps_the_role_out_of_other_databases(
    postgres: Server, dsn: str, empty_database: str
) -> None:
    """The lines are those of the pack's guide, for this database."""
    page = (ROOT / "docs/packs/email_unsubscribe/README.md").read_text()
    [shown] = re.findall(r"```\n((?:(?:local|host) .*\n)+)```", page)
    here = dsn.rpartition("/")[2].partition("?")[0]
    lines = shown.replace(" chat ", f" {here} ")
    assert here in lines
    async with session(dsn) as owner:
        file = Path(await owner.fetchval("select current_setting('hba_file')"))
        before = file.read_text()
        try:
            file.write_text(lines + before)
            await owner.execute("select pg_reload_conf()")
            while (refused := await refusal(as_app(empty_database))) is None:
                await asyncio.sleep(0)
            assert "28000" == refused
            assert None is await refusal(as_app(dsn))
        finally:
            file.write_text(before)
            await owner.execute("select pg_reload_conf()")
        while await refusal(as_app(empty_database)) is not None:
            await asyncio.sleep(0)


async def refusal(dsn: str) -> str | None:
    """Why connecting fails; None if it succeeds."""
    try:
        connection = await asyncpg.connect(dsn)
    except asyncpg.PostgresError as error:
        return error.sqlstate
    await connection.close()
    return None


async def test_the_application_does_all_of_its_work_with_these_rights_and_is_captured(
    dsn: str, app: Connection
) -> None:
    await app.execute("""
        insert into email_unsubscribe.users (id, subject) values ('01JH000000VSER00000000WNER', 'provider|1');
        insert into email_unsubscribe.sessions (user_id) values ('01JH000000VSER00000000WNER');
        insert into email_unsubscribe.allow_list (entry_type, value) values ('domain', 'bank.example');
        insert into email_unsubscribe.sender_emails values ('m', 'news@shop.example', now());
        insert into email_unsubscribe.unsubscribe_history (sender, unsubscribe_url, method)
        values ('news@shop.example', 'https://shop.example/u?t', 'link');
        update email_unsubscribe.unsubscribe_history set status = 'succeeded';
        delete from email_unsubscribe.allow_list;
        update email_unsubscribe.sessions set ended_at = now() + interval '1 s', end_reason = 'logout';
        delete from email_unsubscribe.users;
    """)
    async with session(dsn) as owner:
        events = await owner.fetch(
            "select w.table_name, e.kind from rowcast.events e join rowcast.watched w on w.id = e.watch order by e.id"
        )
        roles = await owner.fetchval("select array_agg(distinct db_role) from email_unsubscribe.audit_log")
    assert {
        *(("users", kind) for kind in ("insert", "delete")),
        *(("sessions", kind) for kind in ("insert", "update", "delete")),
        *(("allow_list", kind) for kind in ("insert", "delete")),
        *(("senders", kind) for kind in ("insert", "update")),
        *(("unsubscribe_history", kind) for kind in ("insert", "update")),
        ("audit_log", "insert"),
    } == {tuple(row) for row in events}
    assert [APP] == roles


@for_each(
    "statement",
    [
        "insert into email_unsubscribe.audit_log (action, user_id, session_id) values ('login', 'x', 'y')",
        "update email_unsubscribe.audit_log set occurred_at = now()",
        "delete from email_unsubscribe.audit_log",
        "truncate email_unsubscribe.audit_log",
        "delete from email_unsubscribe.unsubscribe_history",
        "update email_unsubscribe.unsubscribe_history set attempted_at = now()",
        "update email_unsubscribe.senders set emails_after_unsubscribe = 0",
        "insert into email_unsubscribe.senders values ('x', 'a@b')",
        "delete from email_unsubscribe.sender_emails",
        "update email_unsubscribe.allow_list set value = 'x'",
        "update email_unsubscribe.sessions set started_at = now()",
    ],
)
async def test_the_application_can_neither_forge_nor_rewrite_what_happened(app: Connection, statement: str) -> None:
    assert REFUSED == await sqlstate_of(app, statement)


async def test_without_the_right_to_create_roles_a_warning_names_the_role(
    postgres: Server, empty_database: str
) -> None:
    async with session(empty_database) as owner:
        await owner.execute("drop role if exists modest_owner")
        await owner.execute(f"create role modest_owner login password '{PASSWORD}'")
        name = empty_database.rpartition("/")[2].partition("?")[0]
        await owner.execute(CAPTURE_ROLE)
        await owner.execute(f"grant create on database {name} to modest_owner; grant rowcast_capture to modest_owner")
        output: list[str] = []
        modest = as_app(empty_database, "modest_owner")
        await migrate.apply(
            modest, ["email_unsubscribe"], schemas={"email_unsubscribe": "modest"}, report=output.append
        )
        assert [line for line in output if "Create it (create role modest_app nologin), then apply again" in line]
        await owner.execute("create role modest_app nologin")
        output.clear()
        await migrate.apply(
            modest, ["email_unsubscribe"], schemas={"email_unsubscribe": "modest"}, report=output.append
        )
        assert not [line for line in output if "warning" in line]
        assert await owner.fetchval("select has_table_privilege('modest_app', 'modest.users', 'insert')") is True


async def test_a_role_with_more_rights_than_needed_causes_a_warning(empty_database: str) -> None:
    async with session(empty_database) as owner:
        await owner.execute("drop role if exists mighty_app")
        await owner.execute("create role mighty_app login superuser")
        output: list[str] = []
        await migrate.apply(
            empty_database, ["email_unsubscribe"], schemas={"email_unsubscribe": "mighty"}, report=output.append
        )
        await owner.execute("alter role mighty_app nosuperuser")
    assert [line for line in output if "the role mighty_app has more rights than the application needs" in line]
