"""`make screenshots`: the pictures of the pages in docs/images, light and dark, wide and on a phone."""

import asyncio
import tempfile
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

from PIL import Image
from playwright.async_api import Browser, Page, ViewportSize, expect

from daemon.postgres.connect import Connection, connect
from tests.acceptance.samples import Samples
from tests.support.browser import new_page, running_browser
from tests.support.postgres import FAST, running_server
from tests.support.preloaded import Forker

IMAGES: Final = Path(__file__).parents[2] / "docs/images"
MAX_BYTES: Final = 150_000
WIDE: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 390, "height": 780}
VIEWS: dict[str, tuple[ViewportSize, Literal["light", "dark"]]] = {
    "": (WIDE, "light"),
    "-dark": (WIDE, "dark"),
    "-phone": (PHONE, "light"),
    "-phone-dark": (PHONE, "dark"),
}

ALICE, BOB = "01JH000000VSER0000000A11CE", "01JH000000VSER000000000B0B"
CAROL, DAVE = "01JH000000VSER0000000CAR01", "01JH000000VSER00000000DAVE"
GENERAL, RANDOM = "01JH000000CHAN00000GENERA1", "01JH000000CHAN000000RAND0M"
CONVERSATION = (
    (BOB, "The import took four minutes last night. It used to take forty."),
    (CAROL, "What did you change?"),
    (BOB, "One index. It was scanning all of last year for every row."),
    (BOB, "I wrote it down in the notes, with the plan before and after."),
    (DAVE, "I will add it to the release notes. Does the page still wait for it?"),
    (ALICE, "No: it follows the rows now, and shows them as they come."),
    (CAROL, "I just watched it. Lovely."),
)
CHANGES = 40  # written while the console looks, about one a second


async def main() -> None:
    """Start a daemon with its sample data, and take every picture."""
    with tempfile.TemporaryDirectory() as directory:
        async with (
            running_server(FAST) as server,
            Samples.serving(server, Path(directory)) as samples,
            running_browser() as browser,
        ):
            sql = await connect(samples.dsn, application_name="screenshots")
            await take_chat(browser, samples, sql)
            await take_console(browser, samples, sql)
            await sql.close()
        await Forker.close_shared()


async def say(sql: Connection, user: str, content: str, channel: str = GENERAL) -> str:
    found: str = await sql.fetchval(
        "insert into chatgenius.messages (channel_id, user_id, content) values ($1, $2, $3) returning id",
        channel,
        user,
        content,
    )
    return found


async def take_chat(browser: Browser, samples: Samples, sql: Connection) -> None:
    messages = [await say(sql, *line) for line in CONVERSATION]
    for user, emoji in ((ALICE, "🚀"), (CAROL, "🚀"), (DAVE, "👏")):
        await sql.execute(
            "insert into chatgenius.reactions (message_id, user_id, emoji) values ($1, $2, $3)",
            messages[2],
            user,
            emoji,
        )
    for user in (BOB, DAVE):
        await sql.execute(
            "insert into chatgenius.message_reads (message_id, user_id) values ($1, $2)", messages[-1], user
        )
    async with new_page(browser) as (page, _):
        await page.goto(samples.daemon.http)
        await expect(page.locator("#messages")).to_contain_text("Lovely.")
        await expect(page.locator(".separator.unread")).to_be_visible()
        await say(sql, CAROL, "Who brings cake on Friday?", RANDOM)
        await expect(page.get_by_role("button", name="random, ")).to_be_visible()
        await take(page, "chat")


async def take_console(browser: Browser, samples: Samples, sql: Connection) -> None:
    async with AsyncExitStack() as stack:
        for name in ("Alice Archer", "Bob Baker", "Eve Ellis"):
            chat, _ = await stack.enter_async_context(new_page(browser))
            await chat.goto(samples.daemon.http)
            await chat.get_by_label("Signed in as").select_option(label=name)
            await expect(chat.locator("#state")).to_have_attribute("data-state", "live")
        page, _ = await stack.enter_async_context(new_page(browser))
        await page.goto(f"{samples.daemon.http}/console")
        for number in range(CHANGES):
            async with sql.transaction():
                written = [await say(sql, DAVE, f"line {number}") for _ in range(1 + number * 7 % 5)]
            await expect(page.locator(f'#events [title*="{written[-1]}"]').first).to_be_attached()
        await page.locator("#events-pane").evaluate("(pane) => { pane.scrollTop = pane.scrollHeight }")
        await take(page, "console")


async def take(page: Page, name: str) -> None:
    for suffix, (size, scheme) in VIEWS.items():
        await page.set_viewport_size(size)
        await page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        await page.mouse.move(0, 0)
        await page.evaluate("() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        if name == "chat":
            await page.evaluate('() => { const pane = document.getElementById("pane"); pane.scrollTop = 1e6; }')
        file = IMAGES / f"{name}{suffix}.png"
        with Image.open(BytesIO(await page.screenshot())) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
        assert file.stat().st_size < MAX_BYTES, f"{file.name} is too large"


if __name__ == "__main__":
    asyncio.run(main())
