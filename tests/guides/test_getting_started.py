"""docs/getting-started.md, followed word for word from an empty server to a page that changes in a real browser."""

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.async_api import expect

from tests.support.browser import browser_page
from tests.support.daemon import clean_environment, free_port
from tests.support.guide import Terminal, blocks
from tests.support.postgres import Server, chosen_binaries

STEPS: dict[str, list[str]] = {}
for heading, _, code in blocks("docs/getting-started.md"):
    STEPS.setdefault(heading, []).append(code)
CUT = "WebSocket connection to"  # how Chromium reports that the daemon is away


@pytest.fixture
async def environment(postgres: Server, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """That of a reader who has installed Rowcast and Postgres, but for the port."""
    dsn = urlsplit(postgres.embedded.dsn_for("postgres"))
    installed = [str(chosen_binaries().bindir), str(Path(sys.executable).parent), os.environ["PATH"]]
    server = {"PGHOST": parse_qs(dsn.query)["host"][0], "PGUSER": dsn.username, "PGPASSWORD": dsn.password}
    environment = clean_environment(
        HOME=str(tmp_path),
        PATH=":".join(installed),
        ROWCAST_LISTEN=f"127.0.0.1:{free_port()}",
        **{name: value or "" for name, value in server.items()},
    )
    yield environment
    async with Terminal.opened(tmp_path, environment) as terminal:
        await terminal.run("dropdb --force --if-exists shop")


async def test_a_newcomers_own_table_is_live_and_loses_nothing(environment: dict[str, str], tmp_path: Path) -> None:
    (take,) = STEPS["2. Take a table"]
    watch, printed, serve = STEPS["3. Watch it"]
    page_text, show_address = STEPS["4. See it"]
    write, write_while_away = STEPS["5. Write"]
    async with (
        Terminal.opened(tmp_path, environment) as first,
        Terminal.opened(tmp_path, environment) as second,
        browser_page() as (page, complaints),
    ):
        await first.run(take)
        assert (await first.run(watch)).endswith(printed)
        first.start(serve)
        await first.until("serving")
        (tmp_path / "orders.html").write_text(page_text.replace("127.0.0.1:8787", environment["ROWCAST_LISTEN"]))
        await page.goto((await second.run(show_address)).strip())
        orders = page.locator("li")
        await expect(orders).to_have_text(["a kite: new"], timeout=60_000)
        await second.run(write)
        await expect(orders).to_have_text(["a kite: sent", "a lamp: new"], timeout=60_000)
        first.interrupt()
        await first.run("true")
        await second.run(write_while_away)
        first.start(serve)
        await expect(orders).to_have_text(["a kite: sent", "a lamp: new", "a boat: new"], timeout=60_000)
        assert [] == complaints.but_for(CUT)


def test_each_code_block_of_the_guide_is_a_step_of_the_test() -> None:
    # The first needs the network for the packages that Rowcast depends on.
    assert {"1. Install": 1, "2. Take a table": 1, "3. Watch it": 3, "4. See it": 2, "5. Write": 2} == {
        heading: len(steps) for heading, steps in STEPS.items()
    }
