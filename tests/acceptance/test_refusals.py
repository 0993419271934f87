"""Clients are refused since the database does not answer their questions, while all else works."""

import json
import time
from contextlib import AsyncExitStack

from daemon.health import REFUSAL_DELAY
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, get

BROKEN = """
create or replace function chatgenius.may_read(user_id text, topic text) returns boolean
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
as $$ begin raise exception using errcode = '55000'; end $$
"""


async def test_a_crowd_that_is_refused_is_one_line_of_the_log_and_a_warning(daemon: Daemon, chat: Chat) -> None:
    await chat.sql.execute(BROKEN)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(daemon.client(chat.ada)) for _ in range(20)]
        began = time.monotonic()
        for client in clients:
            await client.say(op="subscribe", topic=chat.topic)
        for client in clients:
            error = (await client.until("error"))[-1]
            assert ("unavailable", True) == (error["code"], error["retry"])
        delays = (time.monotonic() - began) / REFUSAL_DELAY
        status, text = await get(f"{daemon.http}/readyz")
    assert 200 == status
    [warning] = json.loads(text)["warnings"]
    assert "clients were refused" in warning
    assert "55000" in warning
    lines = [event for event in daemon.events() if event["event"] == "log_unavailable"]
    assert 1 <= len(lines) <= 1 + delays
    assert ("warn", 1) == (lines[0]["level"], lines[0]["data"]["refused"])
