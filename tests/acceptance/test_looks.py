"""How both pages look in light and dark, wide and on a phone: accessible, nothing cut, no complaints."""

from collections.abc import AsyncIterator
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, ViewportSize, expect

from daemon.postgres.connect import connect
from tests.acceptance.samples import Samples
from tests.support.axe import cut_off, violations
from tests.support.browser import new_page

expect.set_options(timeout=60_000)

WIDE: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 375, "height": 740}
FORGOTTEN = 2**40  # the number of a dead letter that the log does not have
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")


async def look(page: Page, samples: Samples, path: str) -> None:
    await page.goto(f"{samples.daemon.http}{path}")
    await expect(page.locator("#state")).to_have_attribute("data-state", "live")
    if path == "/":
        await expect(page.locator("#messages .message").first).to_be_visible()
    else:
        await expect(page.locator("#watches tbody tr")).to_have_count(10)
        await expect(page.locator("#dead-letters .letter")).to_be_visible()


@pytest.fixture
async def dead_letter(samples: Samples) -> AsyncIterator[None]:
    """One with a long key and a long reason."""
    sql = await connect(samples.dsn, application_name="test")
    await sql.execute(
        """insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
           values ($1, 'chatgenius', 'chatgenius', 'files', 'channel:' || repeat('x', 100), 'insert',
                   json_build_object('id', repeat('y', 200)), null, repeat('no ', 60) || repeat('z', 200))""",
        FORGOTTEN,
    )
    yield
    await sql.execute("delete from rowcast.dead_letters where seq = $1", FORGOTTEN)
    await sql.close()


@pytest.mark.usefixtures("dead_letter")
@pytest.mark.parametrize("path", ["/", "/console"])
async def test_pages_are_accessible_and_nothing_is_cut(browser: Browser, samples: Samples, path: str) -> None:
    found = {}
    async with new_page(browser) as (page, complaints):
        await page.emulate_media(reduced_motion="reduce")
        await look(page, samples, path)
        for size in (WIDE, PHONE):
            await page.set_viewport_size(size)
            for scheme in SCHEMES:
                await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
                found[size["width"], scheme] = [*await violations(page), *await cut_off(page)]
    assert {view: [] for view in found} == found
    assert [] == complaints


async def test_on_a_phone_the_channels_open_and_close_with_the_keyboard(browser: Browser, samples: Samples) -> None:
    async with new_page(browser) as (page, _):
        await page.set_viewport_size(PHONE)
        await look(page, samples, "/")
        await expect(page.get_by_role("button", name="random")).to_be_hidden()
        menu = page.get_by_role("button", name="Channels and people")
        await menu.press("Enter")
        await expect(page.locator("#channels button").first).to_be_focused()
        assert [] == await violations(page)
        await page.keyboard.press("Escape")
        await expect(menu).to_be_focused()
        await menu.press("Enter")
        await page.get_by_role("button", name="random").click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("random")
        await expect(page.get_by_role("button", name="leads")).to_be_hidden()


async def test_the_forms_for_tokens_are_accessible_and_nothing_is_cut(browser: Browser, samples: Samples) -> None:
    async with new_page(browser) as (page, _):
        await page.set_viewport_size(PHONE)
        await page.set_extra_http_headers({"X-Forwarded-For": "192.0.2.1"})
        await page.goto(f"{samples.daemon.http}/console")
        await expect(page.get_by_label("Operator's token")).to_be_focused()
        for scheme in SCHEMES:
            await page.emulate_media(color_scheme=scheme)
            assert [] == [*await violations(page), *await cut_off(page)]
