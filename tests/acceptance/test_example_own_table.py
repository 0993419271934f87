"""examples/own-table, run as its README says: from an empty database to a page that moves."""

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from playwright.async_api import Page

from daemon.postgres.connect import connect
from tests.support.browser import browser_page
from tests.support.daemon import clean_environment, free_port, get
from tests.support.guide import Terminal
from tests.support.postgres import Server, chosen_binaries

EXAMPLE = Path(__file__).parents[2] / "examples" / "own-table"
GUIDE = (EXAMPLE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", GUIDE, re.DOTALL)
HERE = "postgresql://postgres@localhost/shop", "127.0.0.1:8787"  # what is different in the test


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """That of a terminal with the programs `daemon` and psql."""
    programs = folder / "bin"
    programs.mkdir()
    (programs / "daemon").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m daemon "$@"\n')
    (programs / "daemon").chmod(0o755)
    found = clean_environment(**variables)
    return found | {"PATH": f"{programs}:{chosen_binaries().bindir}:{found['PATH']}"}


@pytest.fixture
async def shop(postgres: Server) -> AsyncIterator[str]:
    """The URL of the database that the guide creates."""
    dsn = postgres.embedded.dsn_for("shop")
    yield dsn
    connection = await connect(postgres.embedded.dsn_for("postgres"), application_name="test")
    await connection.execute("drop database if exists shop with (force)")
    await connection.close()


async def is_ready(port: int) -> bool:
    with suppress(OSError):
        return (await get(f"http://127.0.0.1:{port}/readyz"))[0] == 200
    return False


async def until_ready(port: int) -> None:
    while not await is_ready(port):
        await asyncio.sleep(0.05)


async def shows(page: Page, *lines: str) -> None:
    """Wait until these are the lines of the page's table."""
    wanted = "lines => JSON.stringify([...document.querySelectorAll('tr')].map(row => row.innerText)) == lines"
    await page.wait_for_function(wanted, arg="[" + ",".join(f'"{line}"' for line in lines) + "]")


async def test_seven_steps_lead_from_an_empty_database_to_a_page_that_moves(
    postgres: Server, shop: str, tmp_path: Path
) -> None:
    port = free_port()

    def adapted(text: str) -> str:
        return text.replace(HERE[0], f"'{shop}'").replace(HERE[1], f"127.0.0.1:{port}")

    html = (EXAMPLE / "page.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(adapted(html))
    assert 30 >= html.count("\n")
    assert 7 == len(re.findall(r"^\*\*\d\.", GUIDE, re.MULTILINE)) == len(BLOCKS) - 1
    server = urlsplit(shop)
    libpq = {
        "PGHOST": parse_qs(server.query)["host"][0],
        "PGUSER": server.username or "",
        "PGPORT": parse_qs(server.query)["port"][0],
        "PGPASSWORD": server.password or "",
    }
    *first, address, write, restart = map(adapted, BLOCKS)
    async with (
        Terminal.opened(tmp_path, environment(tmp_path, ROWCAST_LISTEN=f"127.0.0.1:{port}", **libpq)) as shell,
        browser_page() as (page, complaints),
    ):
        for block in first:
            await shell.run(block)
        await until_ready(port)
        [url] = [line for line in (await shell.run(address)).splitlines() if line.startswith("file://")]
        await page.goto(url)
        await page.get_by_text("live", exact=True).wait_for()
        await shell.run(write)
        await shows(page, "1\\tpaid\\t12.50")
        await shell.run(restart)
        await until_ready(port)
        await shows(page, "1\\tpaid\\t12.50", "2\\tnew\\t99.00")
        await shell.run("kill %2 || kill %1; wait")
        assert [] == complaints.but_for("WebSocket connection to")
