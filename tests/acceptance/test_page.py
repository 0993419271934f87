"""The chat at `/` in real browsers: against a real daemon, and against a server that the test scripts."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from playwright.async_api import Browser, Locator, Page, expect

from daemon.files import folder
from daemon.postgres.connect import Connection, connect
from tests.acceptance.samples import Samples
from tests.support.browser import CUT, NOT_FOUND, Complaints, Frame, PageConnection, ScriptedSite, new_page
from tests.support.daemon import Daemon, daemon_process, free_port, post, token

expect.set_options(timeout=60_000)

ALICE, BOB, CAROL = "01JH000000VSER0000000A11CE", "01JH000000VSER000000000B0B", "01JH000000VSER0000000CAR01"
GENERAL, LEADS = "01JH000000CHAN00000GENERA1", "01JH000000CHAN00000001EADS"


@pytest.fixture
async def sql(samples: Samples) -> AsyncIterator[Connection]:
    connection = await connect(samples.dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
def dsn(samples: Samples) -> str:
    return samples.dsn


@pytest.fixture
def daemon(samples: Samples) -> Daemon:
    return samples.daemon


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


async def enter(page: Page, daemon: Daemon, name: str = "Alice Archer") -> None:
    """Open the chat as one of the sample users, who reads #general."""
    await page.goto(daemon.http)
    await page.get_by_label("Signed in as").select_option(label=name)
    await is_live(page)
    await expect(page.get_by_role("heading", level=1)).to_have_text("general")


def message(page: Page, text: str) -> Locator:
    return page.locator("#messages .message", has=page.locator(".text", has_text=text))


async def say(page: Page, text: str) -> None:
    await page.get_by_label("Message", exact=True).fill(text)
    await page.keyboard.press("Enter")


async def write(sql: Connection, content: str, channel: str = GENERAL, user: str = BOB) -> str:
    found: str = await sql.fetchval(
        "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id",
        channel,
        user,
        content,
    )
    return found


# Against a daemon


async def test_two_browsers_talk_edit_react_and_delete(browser: Browser, daemon: Daemon) -> None:
    async with AsyncExitStack() as stack:
        alice, alices = await stack.enter_async_context(new_page(browser))
        bob, bobs = await stack.enter_async_context(new_page(browser))
        await enter(alice, daemon)
        await enter(bob, daemon, "Bob Baker")

        await say(alice, "Is <b>anybody</b> there?")
        await expect(message(bob, "Is <b>anybody</b> there?")).to_have_count(1)
        await expect(message(alice, "Is <b>anybody</b> there?")).not_to_have_class("pending")
        await say(bob, "Yes, I am")
        await expect(message(alice, "Yes, I am")).to_be_visible()
        await expect(message(alice, "Yes, I am").get_by_role("button", name="Delete")).to_have_count(0)

        await bob.keyboard.press("ArrowUp")
        await expect(bob.get_by_label("Edit your message")).to_have_value("Yes, I am")
        await bob.get_by_label("Edit your message").fill("Yes, we are")
        await bob.keyboard.press("Enter")
        await expect(message(alice, "Yes, we are").locator(".text")).to_have_text("Yes, we are(edited)")

        await message(alice, "Yes, we are").focus()  # the bot may move it away from the mouse
        await message(alice, "Yes, we are").get_by_role("button", name="React with 🎉").click()
        await expect(message(bob, "Yes, we are").get_by_role("button", name="🎉 1")).to_have_attribute(
            "aria-pressed", "false"
        )
        await message(bob, "Yes, we are").get_by_role("button", name="🎉 1").click()
        await message(alice, "Yes, we are").get_by_role("button", name="🎉 2").click()
        await expect(message(bob, "Yes, we are").get_by_role("button", name="🎉 1")).to_have_attribute(
            "aria-pressed", "true"
        )

        await message(alice, "Is <b>anybody</b> there?").focus()
        await message(alice, "Is <b>anybody</b> there?").get_by_role("button", name="Delete").click()
        await expect(message(bob, "Is <b>anybody</b> there?")).to_have_count(0)
        assert [] == [*alices, *bobs]


async def test_a_browser_shows_who_is_there_and_who_is_typing(
    browser: Browser, daemon: Daemon, sql: Connection
) -> None:
    await sql.execute("delete from chatgenius.user_status where user_id = $1", CAROL)
    async with AsyncExitStack() as stack:
        alice, complaints = await stack.enter_async_context(new_page(browser))
        await enter(alice, daemon)
        carols_dot = alice.locator("#people .person", has_text="Carol Carter").locator(".dot")
        async with new_page(browser) as (carol, _):
            await enter(carol, daemon, "Carol Carter")
            await expect(carols_dot).to_have_attribute("title", "online")
            await carol.get_by_label("Message", exact=True).press_sequentially("Hm")
            await expect(alice.locator("#typing")).to_have_text("Carol Carter is typing…")
            await expect(carol.locator("#typing")).to_have_text("")
            await carol.keyboard.press("Enter")
            await expect(message(alice, "Hm")).to_be_visible()
            await expect(alice.locator("#typing")).to_have_text("")
        await expect(carols_dot).to_have_attribute("title", "offline")
        assert [] == complaints


async def test_a_channel_counts_what_is_unread_until_it_is_opened_on_any_device(
    browser: Browser, daemon: Daemon, sql: Connection
) -> None:
    async with AsyncExitStack() as stack:
        laptop, _ = await stack.enter_async_context(new_page(browser))
        phone, _ = await stack.enter_async_context(new_page(browser))
        for page in (laptop, phone):
            await enter(page, daemon)
        leads = laptop.get_by_role("button", name="leads")
        await phone.get_by_role("button", name="leads").click()
        await expect(phone.get_by_role("heading", level=1)).to_have_text("leads")
        await expect(leads).to_have_accessible_name("leads")  # read on the phone
        await phone.get_by_role("button", name="general").click()
        await write(sql, "for the leads", LEADS)
        await expect(leads).to_have_accessible_name("leads, 1 new message")
        await write(sql, "again for the leads", LEADS)
        await expect(leads).to_have_accessible_name("leads, 2 new messages")
        await phone.get_by_role("button", name="leads").click()
        await expect(phone.locator(".separator.unread + .message")).to_contain_text("for the leads")
        await expect(leads).to_have_accessible_name("leads")
        async with new_page(browser) as (bob, _):
            await enter(bob, daemon, "Bob Baker")
            await bob.get_by_role("button", name="leads").click()
            await expect(message(bob, "again for the leads")).to_contain_text("Seen by Alice Archer")


async def test_the_page_shows_what_sql_does_to_a_message(
    page: Page, complaints: Complaints, daemon: Daemon, sql: Connection
) -> None:
    await enter(page, daemon)
    written = await write(sql, "Written in SQL")
    shown = page.locator(f'[data-id="{written}"] .text')
    await expect(shown).to_have_text("Written in SQL")
    await sql.execute("update chatgenius.messages set deleted_at = now() where id = $1", written)
    await expect(shown).to_have_count(0)
    await sql.execute("update chatgenius.messages set deleted_at = null where id = $1", written)
    await expect(shown).to_have_count(1)
    size = 2**53 + 1
    await sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'large', 't', $2, 'u')",
        written,
        size,
    )
    await expect(page.locator(f'[data-id="{written}"] .file')).to_have_text(f"large · {(size + 1023) // 1024:,} kB")
    await sql.execute("delete from chatgenius.messages where id = $1", written)
    await expect(shown).to_have_count(0)
    assert [] == complaints


async def test_messages_are_in_order_although_no_date_holds_their_times(
    page: Page, complaints: Complaints, daemon: Daemon, sql: Connection
) -> None:
    await enter(page, daemon)
    times = ("-infinity", "0044-03-15T12:00:00+00:00 BC", "12026-01-10T12:00:00+00:00", "infinity")
    for time in reversed(times):
        await sql.execute(
            "insert into chatgenius.messages (channel_id, user_id, content, created_at, updated_at)"
            " values ($1, $2, $3, $4::text::timestamptz, $4::text::timestamptz)",
            GENERAL,
            BOB,
            f"sent {time}",
            time,
        )
    await expect(page.locator("#messages .text", has_text="sent ")).to_have_text([f"sent {time}" for time in times])
    await sql.execute("delete from chatgenius.messages where content like 'sent %'")
    assert [] == complaints


async def test_a_user_who_joins_a_channel_sees_its_past_and_nothing_after_leaving(
    page: Page, complaints: Complaints, daemon: Daemon, sql: Connection
) -> None:
    await enter(page, daemon, "Carol Carter")
    channels = page.locator("#channels .name")
    await expect(channels).to_have_text(["general", "random"])
    key = (LEADS, CAROL)
    await sql.execute("insert into chatgenius.channel_members (channel_id, user_id) values ($1, $2)", *key)
    await expect(channels).to_have_text(["general", "leads", "random"])
    await page.get_by_role("button", name="leads").click()
    await expect(message(page, "Friday it is.")).to_be_visible()
    await sql.execute("delete from chatgenius.channel_members where channel_id = $1 and user_id = $2", *key)
    await expect(channels).to_have_text(["general", "random"])
    await expect(message(page, "Friday it is.")).to_have_count(0)
    await expect(page.get_by_role("heading", level=1)).to_have_text("general")
    assert [] == complaints


async def test_what_is_said_offline_is_sent_when_the_daemon_is_back(
    page: Page, complaints: Complaints, dsn: str, sql: Connection, tmp_path_factory: pytest.TempPathFactory
) -> None:
    port, data_dir = free_port(), str(tmp_path_factory.mktemp("restarted"))
    async with daemon_process(dsn, "up", "--data-dir", data_dir, port=port) as daemon:
        await enter(page, daemon)
    await expect(page.locator("#state-text")).to_have_text("Offline, reconnecting")
    await say(page, "Said offline")
    await expect(message(page, "Said offline")).to_contain_text("Not sent: The server cannot be reached.")
    await write(sql, "Written meanwhile")
    async with daemon_process(dsn, "up", "--data-dir", data_dir, port=port):
        await is_live(page)
        await expect(message(page, "Written meanwhile")).to_have_count(1)
        await expect(page.locator(".message.pending")).to_have_count(0)
        await expect(message(page, "Said offline")).to_have_count(1)
    assert [] == complaints.but_for(CUT, "Failed to load resource: net::ERR_CONNECTION_REFUSED")


async def test_without_sample_users_the_page_asks_for_a_token_and_only_listens(
    page: Page, complaints: Complaints, dsn: str, daemon: Daemon, sql: Connection
) -> None:
    async with daemon_process(dsn) as plain:
        await page.goto(plain.http)
        field = page.get_by_label("Token")
        await field.fill("not a token")
        await field.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("The token is invalid or has expired.")
        await field.fill(token(ALICE))
        await field.press("Enter")
        await is_live(page)
        await write(sql, "heard")
        await expect(message(page, "heard")).to_be_visible()
        await expect(page.get_by_label("A statement to try")).to_contain_text("insert into chatgenius.messages")
        await expect(page.get_by_label("Message", exact=True)).to_be_hidden()
        refused = await post(f"{plain.http}/demo/say", {}, Authorization=f"Bearer {token(ALICE)}")
        assert (404, "Not found.\n") == refused
    assert [] == complaints.but_for(CUT, NOT_FOUND)


async def test_a_sample_user_writes_only_what_it_may(daemon: Daemon, sql: Connection) -> None:
    async def attempt(action: str, user: str = CAROL, **members: object) -> tuple[int, str]:
        return await post(f"{daemon.http}/demo/{action}", members, Authorization=f"Bearer {token(user)}")

    bobs = await write(sql, "Bob's own")
    ours = await write(sql, "among leads", LEADS)
    forbidden = (403, "You may not do that.\n")
    said = {"id": "01M8CX53HP11F6D6TXE2SMG5XF", "channel": LEADS, "content": "let me in"}
    assert forbidden == await attempt("say", **said)
    assert forbidden == await attempt("edit", message=bobs, content="forged")
    assert forbidden == await attempt("delete", message=bobs)
    assert forbidden == await attempt("react", message=ours, emoji="+1")
    assert forbidden == await attempt("read", message=ours)
    assert (200, '{"done":true}') == await attempt("say", BOB, **said)
    assert (200, '{"done":true}') == await attempt("say", BOB, **said), "saying it twice is saying it once"
    assert (400, "This cannot be stored.\n") == await attempt("say", BOB, **said | {"id": "not a ULID"})
    assert 401 == (await post(f"{daemon.http}/demo/say", said, Authorization="Bearer forged"))[0]
    other_site = {"Origin": "http://elsewhere.example", "Authorization": f"Bearer {token(BOB)}"}
    assert 403 == (await post(f"{daemon.http}/demo/say", said, **other_site))[0]


# Against a server that the test scripts

TOPICS = ("user:ada", "users")


@pytest.fixture
def site(page: Page) -> ScriptedSite:
    return ScriptedSite(page, folder("web"), {"users": [{"id": "ada", "name": "Ada", "token": "a token"}]})


def user(name: str) -> Frame:
    return {"key": {"id": name}, "record": {"id": name, "username": name, "full_name": name}}


async def settled(site: ScriptedSite, page: Page) -> PageConnection:
    """The page is live at e:10, as Ada, who is in no channel."""
    connection = await site.open()
    hello = await connection.welcome("e:10")
    assert "a token" == hello["token"]
    for asked in await connection.subscribes(*TOPICS):
        connection.send("subscribed", id=asked["id"], topic=asked["topic"], pos="e:10", snapshot=True)
        connection.send("snapshot", topic=asked["topic"], table="users", rows=[user("Ada")], more=False)
    connection.send("resumed", pos="e:10", replayed=0)
    await is_live(page)
    return connection


async def test_a_user_without_channels_sees_why_the_page_is_empty(
    page: Page, site: ScriptedSite, complaints: Complaints
) -> None:
    await settled(site, page)
    await expect(page.locator("#channel-about")).to_have_text("You are in no channel.")
    await expect(page.locator("#people .person")).to_have_text(["AofflineAda"])
    assert [] == complaints


async def test_a_refused_token_is_renewed_once(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site, page)
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
    connection = await settled(site, page)
    connection.send("head", pos="e:10", stale=True)
    await expect(page.locator("#state-text")).to_have_text("The database does not answer")
    connection.send("head", pos="e:10")
    await expect(page.locator("#state-text")).to_have_text("Live")


async def test_a_close_code_that_forbids_reconnecting_is_obeyed(page: Page, site: ScriptedSite) -> None:
    connection = await settled(site, page)
    await connection.close(4403, "forbidden")
    await expect(page.locator("#state-text")).to_have_text("Disconnected")
    await expect(page.get_by_role("alert")).to_contain_text("forbidden")


async def test_a_daemon_without_a_chat_is_said_to_have_none(page: Page, site: ScriptedSite) -> None:
    connection = await site.open()
    await connection.welcome("e:10")
    for asked in await connection.subscribes(*TOPICS):
        connection.send("error", id=asked["id"], code="no_such_topic", message="", retry=False)
    await expect(page.locator("#channel-about")).to_have_text(
        "This page shows ChatGenius, which this daemon does not serve."
    )
