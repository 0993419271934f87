"""What the check of the rights of a daemon finds, and what it reads for that."""

from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import SESSION, Connection
from daemon.schema.queries import query
from daemon.schema.rights_check import lacking_rights

FUNCTIONS = [f"chatgenius.{name}" for name in ("may_read", "acknowledged", "presence_changed")]

FUNCTIONS_READ = """
    select sum(pg_stat_get_xact_tuples_returned(c.oid))::int from pg_class as c
    where c.oid = 'pg_proc'::regclass
    or c.oid in (select i.indexrelid from pg_index as i where i.indrelid = 'pg_proc'::regclass)
"""


@pytest.fixture
async def as_daemon(sql: Connection) -> AsyncIterator[Connection]:
    """A transaction in a session of a role that may run daemons and nothing else, with the settings of a daemon's."""
    async with sql.transaction():
        for name, value in SESSION.items():  # without them, plans depend on statistics
            await sql.execute("select set_config($1, $2, true)", name, value)
        await sql.execute("create role checked_here")
        await sql.execute(query("let_serve"), "checked_here", ["chatgenius"], FUNCTIONS)
        await sql.execute("set local session authorization checked_here")
        yield sql
        await sql.execute("reset session authorization; drop owned by checked_here; drop role checked_here")


async def _lacking(connection: Connection) -> str:
    return await lacking_rights(connection, ["chatgenius"], FUNCTIONS)


async def test_a_role_that_was_let_serve_lacks_nothing(as_daemon: Connection) -> None:
    assert await _lacking(as_daemon) == ""


@pytest.mark.parametrize("name", FUNCTIONS)
async def test_every_function_of_a_pack_that_the_role_may_not_call_is_named(as_daemon: Connection, name: str) -> None:
    await as_daemon.execute("reset session authorization")
    signature = await as_daemon.fetchval("select $1::text::regproc::regprocedure::text", name)
    await as_daemon.execute(f"create function {name}(int) returns int language sql as 'select 1'")
    await as_daemon.execute(f"revoke all on function {signature}, {name}(int) from public, checked_here")
    await as_daemon.execute("set local session authorization checked_here")
    assert await _lacking(as_daemon) == f"execute on {name}(integer), execute on {signature}"


async def test_the_check_reads_only_the_functions_that_it_is_about(as_daemon: Connection) -> None:
    count = await as_daemon.fetchval("select count(*)::int from pg_proc")
    before = await as_daemon.fetchval(FUNCTIONS_READ)
    await _lacking(as_daemon)
    read = await as_daemon.fetchval(FUNCTIONS_READ) - before
    assert 0 < read < count // 4, f"{read} of {count} functions were read"
