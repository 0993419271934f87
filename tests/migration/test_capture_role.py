"""The role that capture functions run as, where the installing role may not make it."""

import re
from collections.abc import AsyncIterator

import asyncpg
import pytest

from daemon.commands.watch import watch
from daemon.core.errors import OperatorFault
from daemon.schema import migrate
from daemon.schema.health import SchemaNotCurrent
from daemon.schema.watches import Watch
from daemon.settings import Settings
from tests.packs.databases import session
from tests.support.postgres import CAPTURE_ROLE, ignore

OWNER = (
    "select proowner::regrole::text from pg_proc"
    " where pronamespace = 'rowcast'::regnamespace and proname ~ '^capture_1_'"
)


@pytest.fixture
async def plain(empty_database: str) -> AsyncIterator[str]:
    """The DSN of a role that owns the database and may not create roles."""
    async with session(empty_database) as admin:
        name = await admin.fetchval("select current_database()")
        superuser = await admin.fetchval("select current_user")
        await admin.execute(CAPTURE_ROLE)
        await admin.execute("create role capture_plain login password 'open sesame'")
        await admin.execute(f"alter database {name} owner to capture_plain")
        yield re.sub("//[^@]+@", "//capture_plain:open%20sesame@", empty_database)
        await admin.execute(f"alter database {name} owner to {superuser}")
        await admin.execute("drop owned by capture_plain cascade; drop role capture_plain")


async def test_capture_functions_with_the_rights_of_the_installing_role_are_refused(plain: str) -> None:
    with pytest.raises(OperatorFault) as caught:
        await migrate.apply(plain, (), report=ignore)
    assert 'as a superuser, run "grant rowcast_capture to capture_plain", or' in str(caught.value)
    assert "\n" not in str(caught.value)
    table = Watch("public.any", "'a'", "true")
    with pytest.raises(SchemaNotCurrent, match="apply-ddl"):
        await watch(Settings(DATABASE_URL=plain), table, ignore)


async def test_a_role_that_a_superuser_granted_owns_the_capture_functions(plain: str, empty_database: str) -> None:
    async with session(empty_database) as admin:
        await admin.execute("grant rowcast_capture to capture_plain")
    await migrate.apply(plain, ("chatgenius",), report=ignore)
    async with session(plain) as db:
        assert "rowcast_capture" == await db.fetchval(OWNER)


async def test_a_role_that_makes_the_capture_role_can_also_use_it(plain: str, empty_database: str) -> None:
    async with session(empty_database) as admin:
        await admin.execute("alter role capture_plain createrole; alter role rowcast_capture rename to capture_away")
        try:
            await migrate.apply(plain, ("chatgenius",), report=ignore)
            async with session(plain) as db:
                assert "rowcast_capture" == await db.fetchval(OWNER)
        finally:
            await admin.execute("drop owned by capture_plain, rowcast_capture cascade; drop role rowcast_capture")
            await admin.execute("alter role capture_away rename to rowcast_capture")


async def test_somebody_may_decide_that_capture_functions_run_as_the_installing_role(
    plain: str, empty_database: str
) -> None:
    async with session(empty_database) as admin:
        await admin.execute("alter role capture_plain set rowcast.capture_as_owner = on")
    await migrate.apply(plain, ("chatgenius",), report=ignore)
    async with session(plain) as db:
        assert "capture_plain" == await db.fetchval(OWNER)
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await db.execute("alter role rowcast_capture bypassrls")
