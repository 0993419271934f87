"""The live page in a real browser: against a real daemon, and against a server that the test scripts."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from daemon.files import folder
from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.browser import Complaints, Frame, PageConnection, ScriptedSite, new_page, running_browser
from tests.support.daemon import daemon_process, free_port, token

expect.set_options(timeout=60_000)

ALICE, BOB = "01JH000000VSER0000000A11CE", "01JH000000VSER000000000B0B"
GENERAL, LEADS = "01JH000000CHAN00000GENERA1", "01JH000000CHAN00000001EADS"
CUT = "WebSocket connection to"  # how Chromium reports a connection that it cannot open


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


@pytest.fixture
async def opened(browser: Browser) -> AsyncIterator[tuple[Page, Complaints]]:
    async with new_page(browser) as found:
        yield found


@pytest.fixture
def page(opened: tuple[Page, Complaints]) -> Page:
    return opened[0]


@pytest.fixture
def complaints(opened: tuple[Page, Complaints]) -> Complaints:
    return opened[1]


async def is_live(page: Page) -> None:
    await expect(page.locator("#state")).to_have_attribute("data-state", "live")


def message(page: Page, text: str) -> Locator:
    return page.locator("#messages .text", has_text=text)


async def say(sql: Connection, content: str, channel: str = GENERAL, user: str = BOB) -> str:
    found: str = await sql.fetchval(
        "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id",
        channel,
        user,
        content,
    )
    return found


# Against a daemon


async def test_the_page_shows_what_sql_does_to_a_message(
    page: Page, complaints: Complaints, database: str, sql: Connection, tmp_path: Path
) -> None:
    async with daemon_process(database, "up", "--data-dir", str(tmp_path)) as daemon:
        await page.goto(daemon.http)
        await is_live(page)
        await expect(page.locator("#who option:checked")).to_have_text("Alice Archer")
        await expect(page.locator("#channels button span")).to_have_text(["general", "leads", "random"])
        await expect(message(page, "Good morning! The new build is out.")).to_be_visible()

        written = await say(sql, "Written in <b>SQL</b>")
        await expect(message(page, "Written in <b>SQL</b>")).to_be_visible()

        await sql.execute("update chatgenius.messages set content = 'Edited in SQL' where id = $1", written)
        await expect(message(page, "Edited in SQL")).to_have_text("Edited in SQL(edited)")

        await sql.execute(
            "insert into chatgenius.reactions (message_id, user_id, emoji) values ($1, $2, '+1'), ($1, $3, '+1')",
            written,
            ALICE,
            BOB,
        )
        await expect(page.locator(f'[data-id="{written}"] .reactions li', has_text="+1")).to_have_text("+1 2")

        await sql.execute("update chatgenius.messages set deleted_at = now() where id = $1", written)
        await expect(message(page, "Edited in SQL")).to_have_count(0)

        await sql.execute("update chatgenius.messages set deleted_at = null where id = $1", written)
        await expect(message(page, "Edited in SQL")).to_have_text("Edited in SQL(restored)")
        await sql.execute("delete from chatgenius.messages where id = $1", written)
        await expect(message(page, "Edited in SQL")).to_have_count(0)
    assert [] == complaints.but_for(CUT)


async def test_the_page_shows_every_digit_of_a_bigint_and_times_that_no_date_holds(
    page: Page, complaints: Complaints, database: str, sql: Connection, tmp_path: Path
) -> None:
    async with daemon_process(database, "up", "--data-dir", str(tmp_path)) as daemon:
        await page.goto(daemon.http)
        await is_live(page)
        written = await say(sql, "with a large file")
        size = 2**53 + 1
        await sql.execute(
            "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'large', 't', $2, 'u')",
            written,
            size,
        )
        shown = page.locator(f'[data-id="{written}"] .file')
        await expect(shown).to_have_text(f"large · {(size + 1023) // 1024:,} kB")
        entry = page.locator("#lines details", has_text="files large")
        await entry.locator("summary").click()
        await expect(entry.locator("pre")).to_contain_text(f'"size": "{size}"')
        times = ("-infinity", "0044-03-15T12:00:00+00:00 BC", "12026-01-10T12:00:00+00:00", "infinity")
        for time in times:
            await sql.execute(
                "insert into chatgenius.messages (channel_id, user_id, content, created_at)"
                " values ($1, $2, $3, $4::text::timestamptz)",
                GENERAL,
                BOB,
                f"written {time}",
                time,
            )
        await expect(message(page, "written ")).to_have_text([f"written {time}" for time in times])
    assert [] == complaints.but_for(CUT)


async def test_a_user_who_joins_and_leaves_a_channel_sees_it_appear_and_disappear(
    page: Page, complaints: Complaints, database: str, sql: Connection, tmp_path: Path
) -> None:
    async with daemon_process(database, "up", "--data-dir", str(tmp_path)) as daemon:
        await page.goto(daemon.http)
        await page.locator("#who").select_option(label="Carol Carter")
        channels = page.locator("#channels button span")
        await expect(channels).to_have_text(["general", "random"])
        carol = await page.locator("#who").input_value()
        key = (LEADS, carol)
        async with (
            sql.transaction()
        ):  # she may read all of the transaction that adds her, including the channel's name
            await sql.execute("insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", *key)
            await sql.execute("update chatgenius.channels set description = 'Carol too' where id = $1", LEADS)
        await expect(channels).to_have_text(["general", "leads", "random"])
        await page.locator("#channels button", has_text="leads").click()
        await say(sql, "Welcome, Carol.", LEADS)
        await expect(message(page, "Welcome, Carol.")).to_be_visible()
        await expect(message(page, "Friday it is.")).to_have_count(0)  # written before she joined
        await sql.execute("delete from chatgenius.channel_members where channel_id = $1 and user_id = $2", *key)
        await expect(channels).to_have_text(["general", "random"])
        await expect(message(page, "Welcome, Carol.")).to_have_count(0)
    assert [] == complaints.but_for(CUT)


async def test_the_page_reconnects_by_itself_and_shows_writes_made_meanwhile_once(
    page: Page, complaints: Complaints, database: str, sql: Connection, tmp_path: Path
) -> None:
    port = free_port()
    async with daemon_process(database, "up", "--data-dir", str(tmp_path), port=port) as daemon:
        await page.goto(daemon.http)
        await is_live(page)
        await say(sql, "before the restart")
        await expect(message(page, "before the restart")).to_be_visible()
    await expect(page.locator("#state")).to_have_attribute("data-state", "waiting")
    for number in range(3):
        await say(sql, f"meanwhile {number}")
    async with daemon_process(database, "up", "--data-dir", str(tmp_path), port=port):
        await is_live(page)
        await say(sql, "after the restart")
        await expect(message(page, "after the restart")).to_be_visible()
        for text in ("before the restart", "meanwhile 0", "meanwhile 1", "meanwhile 2", "after the restart"):
            await expect(message(page, text)).to_have_count(1)
        await expect(page.locator("#count-reconnects")).to_have_text("1")
        for nothing in ("#count-resets", "#count-gaps"):
            await expect(page.locator(nothing)).to_have_text("0")
    assert [] == complaints.but_for(CUT)


async def test_without_sample_users_the_page_asks_for_a_token(
    page: Page, complaints: Complaints, database: str, chat: Chat
) -> None:
    await chat.say("hello")
    async with daemon_process(database) as daemon:
        await page.goto(daemon.http)
        field = page.get_by_label("Token")
        await field.fill("not a token")
        await field.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("The token is invalid or has expired.")
        await field.fill(token(chat.ada))
        await field.press("Enter")
        await expect(message(page, "hello")).to_be_visible()
        await is_live(page)
    assert [] == complaints.but_for(CUT, "Failed to load resource: the server responded with a status of 404")


# Against a server that the test scripts

TOPICS = ("users", "user:ada")


def user(seq: int, name: str) -> Frame:
    return {"seq": seq, "table": "users", "key": {"id": name}, "record": {"id": name, "full_name": name}}


@pytest.fixture
def site(page: Page) -> ScriptedSite:
    return ScriptedSite(page, folder("web"), {"users": [{"id": "ada", "name": "Ada", "token": "a token"}]})


async def settled(site: ScriptedSite) -> PageConnection:
    """The page is live and has read the log up to e:10, which contains Ada."""
    connection = await site.open()
    hello = await connection.welcome("e:10")
    assert ("a token", False) == (hello["token"], "since" in hello)
    requests = await connection.subscribes(*TOPICS)
    assert ["e:0", "e:0"] == [frame["since"] for frame in requests]
    connection.subscribed(requests, "e:0")
    connection.change("users", user(5, "Ada"), prev="e:0")
    connection.send("resumed", pos="e:10", replayed=1)
    return connection


async def resume(site: ScriptedSite, since: str) -> tuple[PageConnection, list[Frame]]:
    """The page opens its next connection and resumes all topics from `since`."""
    connection = await site.connection()
    assert since == (await connection.welcome("e:100"))["since"]
    requests = await connection.subscribes(*TOPICS)
    assert [False, False] == ["since" in frame for frame in requests]
    connection.subscribed(requests, since)
    return connection, requests


def people(page: Page) -> Locator:
    return page.locator("#people .person")


async def test_a_silent_connection_is_dropped_and_resumed(page: Page, site: ScriptedSite) -> None:
    await page.clock.install()
    connection = await settled(site)
    await is_live(page)
    connection.send("head", pos="e:17")
    await expect(page.locator("#position")).to_have_text("17")
    await page.clock.fast_forward("00:33")  # more than one and a half heartbeats
    await expect(page.locator("#state")).not_to_have_attribute("data-state", "live")
    await page.clock.fast_forward("00:02")
    connection, _ = await resume(site, since="e:17")
    connection.send("resumed", pos="e:100", replayed=0)
    await is_live(page)
    await expect(page.locator("#position")).to_have_text("100")


async def test_the_position_does_not_advance_until_the_replay_is_complete(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    await connection.close(1012)
    connection, _ = await resume(site, since="e:10")
    connection.send("head", pos="e:90")
    connection.change("users", user(20, "Bob"), prev="e:10")
    await expect(people(page)).to_have_text(["offlineAda", "offlineBob"])
    await connection.close(1012)  # before the replay of the other topic
    connection, _ = await resume(site, since="e:10")
    connection.change("users", user(20, "Bob"), user(21, "Cleo"), prev="e:10")
    connection.send("resumed", pos="e:100", replayed=2)
    await is_live(page)
    await expect(people(page)).to_have_text(["offlineAda", "offlineBob", "offlineCleo"])
    await expect(page.locator("#count-repeats")).to_have_text("1")
    await expect(page.locator("#position")).to_have_text("100")


async def test_a_gap_is_detected_and_the_page_resumes_from_before_it(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    connection.change("users", user(11, "Bob"), prev="e:5")
    connection.change("users", user(14, "Dora"), prev="e:12")
    connection, _ = await resume(site, since="e:11")
    connection.change("users", user(12, "Cleo"), user(14, "Dora"), prev="e:11")
    connection.send("resumed", pos="e:100", replayed=2)
    await expect(people(page)).to_have_text(["offlineAda", "offlineBob", "offlineCleo", "offlineDora"])
    await expect(page.locator("#count-gaps")).to_have_text("1")


async def test_after_a_crash_the_topic_is_read_again(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    connection.change("users", user(11, "Bob"), prev="e:5")
    await expect(people(page)).to_have_text(["offlineAda", "offlineBob"])
    connection.send("reset", topic="users", reason="crash", pos="e:1000")
    await connection.receive("unsubscribe")
    requests = await connection.subscribes("users")
    assert "e:0" == requests[0]["since"]
    connection.send("unsubscribed", topic="users")
    connection.subscribed(requests, "e:0")
    connection.change("users", user(5, "Ada"), user(1001, "Cleo"), prev="e:0")
    connection.send("resumed", pos="e:1001", replayed=2)
    await expect(people(page)).to_have_text(["offlineAda", "offlineCleo"])
    await expect(page.locator("#position")).to_have_text("1001")


async def test_a_new_epoch_discards_the_old_state(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    await connection.close(1001)
    connection = await site.connection()
    await connection.welcome("f:3")
    requests = await connection.subscribes(*TOPICS)
    assert ["f:0", "f:0"] == [frame["since"] for frame in requests]
    connection.subscribed(requests, "f:0")
    connection.change("users", user(2, "Zoe"), prev="f:0")
    connection.send("resumed", pos="f:3", replayed=1)
    await expect(people(page)).to_have_text(["offlineZoe"])


async def test_if_the_log_begins_too_late_the_page_continues_from_now(page: Page, site: ScriptedSite) -> None:
    connection = await site.open()
    await connection.welcome("e:50")
    requests = await connection.subscribes(*TOPICS)
    connection.subscribed(requests, "e:50")
    for topic in TOPICS:
        connection.send("reset", topic=topic, reason="retention", pos="e:50")
    await is_live(page)
    connection.change("users", user(51, "Ada"), prev="e:50")
    await expect(people(page)).to_have_text(["offlineAda"])
    await connection.close(1012)
    await resume(site, since="e:51")


async def test_a_planned_close_says_when_to_reconnect(page: Page, site: ScriptedSite) -> None:
    await page.clock.install()
    connection = await settled(site)
    await is_live(page)
    connection.send("bye", reason="restart", retry_ms=7_000_000)
    await connection.close(1012)
    await expect(page.locator("#state")).to_have_attribute("data-state", "waiting")
    await page.clock.fast_forward("01:56:00")
    await expect(page.locator("#state-text")).to_contain_text("Offline, retrying in")
    await page.clock.fast_forward("00:41")
    await resume(site, since="e:10")


async def test_a_refused_token_is_renewed_once(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    await connection.close(4401, "token")
    connection = await site.connection()
    await connection.receive("hello")
    assert 2 == site.tokens_fetched
    await connection.close(4401, "token")
    await expect(page.get_by_role("alert")).to_have_text("The token is invalid or has expired.")
    assert 2 == site.tokens_fetched


async def test_the_page_shows_when_the_database_stops_answering_and_when_it_recovers(
    page: Page, site: ScriptedSite
) -> None:
    connection = await settled(site)
    await is_live(page)
    connection.send("head", pos="e:10", stale=True)
    await expect(page.locator("#state-text")).to_have_text("Live, but the database does not answer")
    connection.send("head", pos="e:10")
    await expect(page.locator("#state-text")).to_have_text("Live")
    connection.send("head", pos="e:10", stale=True)
    await connection.close(1012)
    connection, _ = await resume(site, since="e:10")
    connection.send("resumed", pos="e:100", replayed=0)
    await expect(page.locator("#state-text")).to_have_text("Live")


async def test_the_page_asks_why_it_was_disconnected_and_shows_it(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    await connection.close(1006)
    connection = await site.connection()
    hello = await connection.receive("hello")
    connection.send(
        "welcome",
        session="another",
        user="ada",
        pos="e:10",
        heartbeat=20,
        last_close={"code": 4408, "reason": "too_slow"},
    )
    assert "01J00000000000000000000000" == hello["session"]
    await expect(page.locator("#lines")).to_contain_text("cut before: too_slow (4408)")


async def test_a_client_that_fell_behind_is_not_counted_as_a_gap(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    connection.change("users", user(11, "Bob"), prev="e:5")
    connection.send("head", stale=True)  # without a position: more is still to come
    await expect(page.locator("#position")).to_have_text("11")
    connection.send("resumed", pos="e:20", replayed=0)
    connection.change("users", user(21, "Cleo"), prev="e:20")
    await expect(people(page)).to_have_text(["offlineAda", "offlineBob", "offlineCleo"])
    await expect(page.locator("#count-gaps")).to_have_text("0")
    await expect(page.locator("#position")).to_have_text("21")


async def test_a_close_code_that_forbids_reconnecting_is_obeyed(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    await connection.close(4403, "forbidden")
    await expect(page.locator("#state-text")).to_have_text("Stopped: forbidden (4403)")
    again = asyncio.create_task(site.connection())
    await page.get_by_role("button", name="Try again").click()
    await (await again).welcome("e:10")


async def test_the_page_keeps_only_the_newest_lines_and_messages(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site)
    await is_live(page)
    joined = {"seq": 11, "table": "channel_members", "key": {"channel_id": "c", "user_id": "ada"}, "record": {}}
    connection.change("user:ada", joined, prev="e:0")
    requests = await connection.subscribes("channel:c")
    connection.subscribed(requests, "e:0")
    channel = {"seq": 1, "table": "channels", "key": {"id": "c"}, "record": {"id": "c", "name": "general"}}
    connection.change("channel:c", channel, prev="e:0")
    for start in range(20, 2020, 100):
        connection.change(
            "channel:c",
            *(
                {
                    "seq": seq,
                    "table": "messages",
                    "key": {"id": str(seq)},
                    "record": {
                        "id": str(seq),
                        "user_id": "Ada",
                        "content": f"message {seq}",
                        "created_at": f"2026-01-10T12:00:{seq % 60:02}Z",
                    },
                }
                for seq in range(start, start + 100)
            ),
            prev=f"e:{start}",
        )
    connection.send("resumed", pos="e:2020", replayed=2001)
    await is_live(page)
    await expect(message(page, "message 2019")).to_be_attached()
    await expect(message(page, "message 1500")).to_have_count(0)
    await expect(page.locator("#messages .message")).to_have_count(500)
    await expect(page.locator("#lines li")).to_have_count(500)
