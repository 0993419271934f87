"""Rights are taken from the role of a daemon that serves."""

import asyncio
import json

import asyncpg
import pytest

from daemon.schema import migrate
from tests.support.daemon import Daemon, daemon_process, get
from tests.support.postgres import Server, ignore

FUNCTIONS = [f"chatgenius.{name}" for name in ("may_read", "acknowledged", "presence_changed")]


async def answer(daemon: Daemon, status: int) -> list[str]:
    """The reasons of /readyz, once it answers with this status."""
    while (page := await get(f"{daemon.http}/readyz"))[0] != status:
        await asyncio.sleep(0.1)
    reasons: list[str] = json.loads(page[1])["reasons"]
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
                    [reason] = await answer(daemon, 503)
                    assert "the daemon's role lacks rights" in reason
                    await owner.execute(f"grant {right} to served_by")
                    await answer(daemon, 200)
                events = [event["event"] for event in daemon.events()]
                assert (3, 3) == (events.count("rights_missing"), events.count("rights_restored"))
        finally:
            await owner.execute("drop owned by served_by; drop role served_by")
            await owner.close()
