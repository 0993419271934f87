"""Both clients see who is present, and send signals, on the real daemon."""

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.clients.drivers import driven, until
from tests.faults.proxy import Proxy
from tests.support.daemon import Daemon, token


async def test_two_clients_see_each_other_and_the_one_who_reconnects_never_left(
    chat: Chat, daemon: Daemon, sql: Connection
) -> None:
    await sql.execute(
        "insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", chat.channel, chat.bob
    )
    await chat.settled(daemon)
    both = sorted([chat.ada, chat.bob])
    async with (
        Proxy(daemon.address).serving() as proxy,
        driven("python", f"ws://127.0.0.1:{proxy.port}/v1", [token(chat.ada)]) as python,
        driven("javascript", daemon.url, [token(chat.bob)]) as javascript,
    ):
        await javascript.say("channel", chat.topic, {"from": "javascript"})
        await until(javascript, "present", [chat.bob])
        await python.say("channel", chat.topic, {"from": "python"})
        await until(python, "present", both)
        await until(javascript, "present", both)
        proxy.reset()
        await until(python, "status", "waiting")
        await until(python, "status", "live")
        await until(python, "present", both)
        await python.say("signal", chat.topic, "typing", {"on": True})
        # No news of those who are present came before the signal.
        received = await until(javascript, "signal", "typing", {"on": True})
        assert [] == [report for report in received if report[0] == "present" and report[1] != both]
        await javascript.say("signal", chat.topic, "typing", None)
        await until(python, "signal", "typing", None)
