"""Rights are taken from the role of a daemon that serves."""

import asyncio
import json

import asyncpg
import pytest

from daemon.schema import migrate
from tests.support.daemon import Daemon, daemon_process, get
from tests.support.postgres import Server, ignore

FUNCTIONS = [f"chatgenius.{name}" for name in ("may_read", "acknowledged", "presence_changed")]


async def until_it_lacks_rights(daemon: Daemon) -> None:
    """Wait until /readyz says so; what the daemon cannot do without them may be a reason too."""
    while "the daemon's role lacks rights" not in str(reasons := await reasons_of(daemon)):
        await asyncio.sleep(0.1)
    print(*reasons, sep="\n")  # noqa: T201 pytest shows it with a failed test


async def until_ready(daemon: Daemon) -> None:
    while await reasons_of(daemon):
        await asyncio.sleep(0.1)


async def reasons_of(daemon: Daemon) -> list[str]:
    """Why the daemon is not ready, if it is not."""
    status, page = await get(f"{daemon.http}/readyz")
    reasons: list[str] = json.loads(page)["reasons"]
    assert (status == 200) == (reasons == [])
    return reasons


@pytest.mark.timeout(120)
async def test_a_daemon_whose_role_loses_a_right_says_so_before_anyone_needs_it(postgres: Server) -> None:
    async with postgres.database() as dsn:
        await migrate.apply(dsn, packs=("chatgenius",), report=ignore)
        owner = await asyncpg.connect(dsn)
        try:
            await owner.execute("create role served_by login password 'p'")
            await migrate.let_serve(dsn, "served_by", schemas=["chatgenius"], functions=FUNCTIONS, report=ignore)
            user = dsn.partition("//")[2].partition("@")[0]
            async with daemon_process(dsn.replace(user, "served_by:p", 1)) as daemon:
                for right in (
                    "usage on schema rowcast",
                    "select on rowcast.terms",
                    "execute on function chatgenius.may_read(text, text)",
                ):
                    await owner.execute(f"revoke {right} from public, served_by")
                    await until_it_lacks_rights(daemon)
                    await owner.execute(f"grant {right} to served_by")
                    await until_ready(daemon)
                events = [event["event"] for event in daemon.events()]
                assert (3, 3) == (events.count("rights_missing"), events.count("rights_restored"))
        finally:
            await owner.execute("drop owned by served_by; drop role served_by")
            await owner.close()
