"""The console in a real browser, and who may see it."""

import re
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, expect

from daemon.gateway.auth import Authenticator
from daemon.postgres.connect import Connection, connect
from tests.acceptance.samples import Samples
from tests.support.browser import Complaints, new_page
from tests.support.daemon import SECRET, Frame, daemon_process, get, post, token

expect.set_options(timeout=60_000)

ALICE, BOB = "01JH000000VSER0000000A11CE", "01JH000000VSER000000000B0B"
GENERAL = "01JH000000CHAN00000GENERA1"
UNAUTHORIZED = "Failed to load resource: the server responded with a status of 40"


@pytest.fixture
async def sql(samples: Samples) -> AsyncIterator[Connection]:
    connection = await connect(samples.dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def opened(browser: Browser, samples: Samples) -> AsyncIterator[tuple[Page, Complaints]]:
    async with new_page(browser) as (page, complaints):
        await page.goto(f"{samples.daemon.http}/console")
        await expect(page.locator("#state")).to_have_attribute("data-state", "live")
        yield page, complaints


@pytest.fixture
def page(opened: tuple[Page, Complaints]) -> Page:
    return opened[0]


async def say(sql: Connection, content: str) -> str:
    found: str = await sql.fetchval(
        "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id",
        GENERAL,
        BOB,
        content,
    )
    return found


async def test_a_change_is_shown_with_its_latency_and_followers_but_without_its_content(
    page: Page, samples: Samples, sql: Connection
) -> None:
    async with samples.daemon.client(ALICE) as client:
        await client.subscribe(f"channel:{GENERAL}")
        await expect(page.locator("#topics")).to_contain_text(f"channel:{GENERAL}")
        await expect(page.locator(f'#sessions [title="{ALICE}"]')).to_be_visible()
        written = await say(sql, "a secret between us")
        line = page.locator(f'#events .event[title*="{written}"]')
        await expect(line.locator("b")).to_have_text("insert")
        await expect(line.locator(".way")).to_have_text(re.compile(r"^[\d,]+ ms → [1-9]"))
        await expect(page.locator("#tiles .tile").first.locator(".value")).to_contain_text("s")
        assert "a secret between us" not in await page.content()


async def test_changes_can_be_filtered_and_held_still(page: Page, sql: Connection) -> None:
    first = await say(sql, "first")
    await expect(page.locator(f'#events .event[title*="{first}"]')).to_have_count(1)
    await page.get_by_role("button", name="Pause").click()
    second = await say(sql, "second")
    await expect(page.get_by_role("button", name="Resume (")).to_be_visible()
    await expect(page.locator(f'#events .event[title*="{second}"]')).to_have_count(0)
    await page.get_by_role("button", name="Resume").click()
    await expect(page.locator(f'#events .event[title*="{second}"]')).to_have_count(1)
    await page.get_by_label("Filter the changes").fill(f"messages {second[-10:]}")
    await expect(page.locator("#events .event")).to_have_count(1)
    await page.get_by_label("Filter the changes").fill("no such topic")
    await expect(page.locator("#events")).to_have_text("No change matches.")


async def test_a_dead_letter_is_shown_and_replayed_with_a_button(
    opened: tuple[Page, Complaints], samples: Samples, sql: Connection
) -> None:
    page, complaints = opened
    await expect(page.locator("#dead-letters")).to_have_text("None: every change could be sent.")
    await sql.execute("alter table chatgenius.files drop constraint if exists files_size_not_negative")
    message = await say(sql, "with a file")
    await sql.execute(
        "insert into chatgenius.files (message_id, name, type, size, url) values ($1, 'n', 't', -1, 'u')", message
    )
    letter = page.locator("#dead-letters li", has_text="chatgenius.files")
    await expect(letter).to_contain_text("record: greater_than_equal size")
    await expect(page.locator("#verdict")).to_have_attribute("data-verdict", "warn")
    await sql.execute("update rowcast.dead_letters set record = jsonb_set(record::jsonb, '{size}', '1')")
    async with samples.daemon.client(ALICE) as client:
        await client.subscribe(f"channel:{GENERAL}")
        await letter.get_by_role("button", name="Replay").click()
        replayed: list[Frame] = []
        while not replayed:  # the bot writes too
            replayed = [change for change in (await client.next())["changes"] if change["table"] == "files"]
        assert [1] == [change["record"]["size"] for change in replayed]
    await expect(page.locator("#dead-letters")).to_have_text("None: every change could be sent.")
    await expect(page.locator("#replay-note")).to_contain_text("was replayed as a new change")
    await sql.execute("delete from chatgenius.files where size < 0")
    assert [] == complaints


async def test_an_operator_follows_a_topic_as_one_of_its_users(page: Page, sql: Connection) -> None:
    await page.get_by_label("Topic", exact=True).fill(f"channel:{GENERAL}")
    await page.locator("#follow-user").select_option(label="Alice Archer")
    await page.get_by_role("button", name="Follow", exact=True).click()
    await expect(page.locator("#follow-state")).to_have_text("Live")
    await say(sql, "as Alice sees it")
    await expect(page.locator("#followed")).to_contain_text('"content":"as Alice sees it"')
    await page.get_by_role("button", name="Stop").click()
    await page.locator("#follow-user").select_option(label="Eve Ellis")
    await page.get_by_role("button", name="Follow", exact=True).click()
    await expect(page.locator("#follow-state")).to_have_text("There is no such topic, or you may not read it.")


async def test_behind_a_proxy_the_console_needs_an_operators_token(browser: Browser, samples: Samples) -> None:
    async with new_page(browser) as (page, complaints):
        await page.set_extra_http_headers({"X-Forwarded-For": "192.0.2.1"})
        await page.goto(f"{samples.daemon.http}/console")
        field = page.get_by_label("Operator's token")
        await field.fill(token(ALICE))
        await field.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text(
            "This token is a user's: give one that `daemon token --operator` printed."
        )
        await field.fill("forged")
        await field.press("Enter")
        await expect(page.get_by_role("alert")).to_have_text("The token is invalid or has expired.")
        await field.fill(Authenticator(SECRET.encode()).issue("an operator", 60, operator=True))
        await field.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        assert [] == complaints.but_for(UNAUTHORIZED)


async def test_another_site_can_neither_read_the_console_nor_replay(samples: Samples) -> None:
    replay, body = f"{samples.daemon.http}/console/replay", {"seq": 2**60}
    assert (404, f"There is no dead letter {2**60} any more.\n") == await post(replay, body)
    for headers in (
        {"Origin": "http://elsewhere.example"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "elsewhere.example"},
        {"X-Forwarded-For": "192.0.2.1"},
    ):
        assert (await post(replay, body, **headers))[0] in {401, 403}, headers
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        assert 400 == (await post(replay, body, **{"Content-Type": content_type}))[0]
    strange: object
    for strange in ([], "seq", {"seq": "1"}, {"seq": True}, {"seq": -1}, {"seq": 2**63}):
        assert 400 == (await post(replay, strange))[0]
    assert 405 == (await get(replay))[0]


async def test_the_console_says_when_the_daemon_stops_answering(browser: Browser, samples: Samples) -> None:
    async with new_page(browser) as (page, _):
        async with daemon_process(samples.dsn) as daemon:
            await page.goto(f"{daemon.http}/console")
            await expect(page.get_by_role("heading", level=1)).to_have_text("All is well")
        await expect(page.locator("#verdict-lines")).to_contain_text("The daemon does not answer.")
        await expect(page.locator("#state-text")).to_contain_text("No answer")
