"""Every recipe of docs/recipes.md runs as it stands there, but for the address of the daemon."""

import asyncio
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from playwright.async_api import Browser, expect

from tests.support.browser import new_page, running_browser
from tests.support.daemon import SECRET, Daemon, clean_environment, command, daemon_process, free_port, token
from tests.support.guide import ROOT, blocks, shell
from tests.support.node import installed, node
from tests.support.postgres import Server, chosen_binaries, replay

RECIPES = {heading: code for heading, _, code in blocks("docs/recipes.md")}
TABLE = """create table orders (
    id bigint generated always as identity primary key, customer text not null, item text not null
)"""
WATCH = "watch public.orders --topic \"'orders:' || r.customer\" --read \"topic = 'orders:' || user_id\""
HERE = Path(__file__).parent
CLIENTS = ROOT / "clients"

# The component of each framework, and how the template of its build tool starts it. React's recipe starts itself.
COMPONENTS = {"React": "main.jsx", "Vue": "App.vue", "Svelte": "App.svelte"}
STARTS = {
    "Vue": """import { createApp } from "vue"
import App from "./App.vue"
createApp(App).mount("#app")""",
    "Svelte": """import { mount } from "svelte"
import App from "./App.svelte"
mount(App, { target: document.querySelector("#app") })""",
}
PAGE = """<!doctype html><link rel="icon" href="data:,"><div id="app"></div>
<script type="module" src="built/main.js"></script>"""


@dataclass
class Shop:
    """The database and the daemon of "Getting started", and what Ada's programs need."""

    dsn: str
    daemon: Daemon

    def recipe(self, name: str) -> str:
        """A recipe with the address of this daemon."""
        return RECIPES[name].replace("127.0.0.1:8787", "{}:{}".format(*self.daemon.address))

    @property
    def environment(self) -> dict[str, str]:
        path = f"{chosen_binaries().bindir}:{os.environ['PATH']}"
        return clean_environment(PATH=path, TOKEN=token("ada"))

    async def psql(self, item: str) -> None:
        """The recipe for psql, which inserts an order, with this item and in this database."""
        script = RECIPES["psql"].replace("a lamp", item).replace("shop", f'"{self.dsn}"')
        process = await asyncio.create_subprocess_exec("sh", "-euc", script, env=self.environment)
        assert 0 == await process.wait()


@pytest.fixture(scope="module")
async def shop(postgres: Server) -> AsyncIterator[Shop]:
    async with postgres.database() as dsn:
        await replay(dsn, TABLE)
        settings = {"DATABASE_URL": dsn, "ROWCAST_PACKS": "none"}
        for arguments in (["--apply-ddl"], shlex.split(WATCH)):
            assert 0 == (await command(*arguments, **settings))[0]
        async with daemon_process(dsn, environment={"ROWCAST_PACKS": "none"}) as daemon:
            yield Shop(dsn, daemon)


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser


async def shows_a_new_row(shop: Shop, browser: Browser, url: str, name: str) -> None:
    """The page shows the rows that exist, and then one that psql inserts."""
    await shop.psql(f"{name}-before")
    async with new_page(browser) as (page, complaints):
        await page.goto(url)
        await expect(page.locator("li", has_text=f"{name}-before")).to_be_visible(timeout=60_000)
        await shop.psql(f"{name}-after")
        await expect(page.locator("li", has_text=f"{name}-after")).to_be_visible(timeout=60_000)
        assert [] == complaints


async def test_the_plain_page_shows_a_row_that_psql_inserts(shop: Shop, browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "orders.html"
    page.write_text(shop.recipe("A plain page"))
    await shows_a_new_row(shop, browser, f"{page.as_uri()}#{token('ada')}", "plain")


@pytest.mark.parametrize("framework", COMPONENTS)
async def test_a_component_shows_a_row_that_psql_inserts(
    framework: str, shop: Shop, browser: Browser, tmp_path: Path
) -> None:
    build = installed(HERE, "esbuild", HERE / "build.mjs")
    (tmp_path / "connection.js").write_text(shop.recipe("With a framework"))
    component = tmp_path / COMPONENTS[framework]
    component.write_text(shop.recipe(framework))
    entry = component
    if framework in STARTS:
        entry = tmp_path / "main.js"
        entry.write_text(STARTS[framework])
    (tmp_path / "token").write_text(token("ada"))
    (tmp_path / "index.html").write_text(PAGE)
    arguments = (tmp_path, CLIENTS / "javascript/rowcast.js", entry.name)
    built = await asyncio.create_subprocess_exec(*build, *arguments, stderr=asyncio.subprocess.PIPE)
    _, errors = await built.communicate()
    assert (0, "") == (built.returncode, errors.decode())
    handler = partial(QuietHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", free_port()), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            await shows_a_new_row(shop, browser, f"http://127.0.0.1:{server.server_port}/", framework.lower())
        finally:
            server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves files, and prints nothing."""

    def log_message(self, *_: object) -> None:
        pass


async def prints(shop: Shop, item: str, *command: str | Path, **environment: str) -> None:
    """The program prints an order that psql inserts. It is connected at some time; until then, more are inserted."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=shop.environment | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdout
    printed = asyncio.create_task(process.stdout.readuntil(item.encode()))
    try:
        while not printed.done():
            await shop.psql(item)
            await asyncio.wait([printed], timeout=0.2)
        await printed
    finally:
        process.kill()
        await process.communicate()


async def test_the_recipe_for_curl_prints_a_row_that_psql_inserts(shop: Shop) -> None:
    await prints(shop, "a bell", *shell("curl", shop.recipe("curl")))


async def test_the_program_for_node_receives_a_row_that_psql_inserts(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules/rowcast").symlink_to(CLIENTS / "javascript")
    script = tmp_path / "orders.mjs"
    script.write_text(shop.recipe("Node"))
    await prints(shop, "a drum", *node(script))


async def test_the_program_in_python_receives_a_row_that_psql_inserts(shop: Shop, tmp_path: Path) -> None:
    script = tmp_path / "orders.py"
    script.write_text(shop.recipe("Python"))
    await prints(shop, "a flute", sys.executable, script, PYTHONPATH=str(CLIENTS / "python"))


async def test_the_daemon_accepts_the_token_that_the_recipe_makes(shop: Shop, tmp_path: Path) -> None:
    script = tmp_path / "make_token.py"
    script.write_text(RECIPES["A token"])
    environment = shop.environment | {"ROWCAST_SECRET": SECRET}
    process = await asyncio.create_subprocess_exec(sys.executable, script, env=environment, stdout=subprocess.PIPE)
    printed, _ = await process.communicate()
    async with shop.daemon.raw() as client:
        await client.say(op="hello", token=printed.decode().strip())
        assert "ada" == (await client.next())["user"]


def test_each_recipe_is_run_by_a_test() -> None:
    assert {
        "A token",
        "A plain page",
        "With a framework",
        *COMPONENTS,
        "Node",
        "Python",
        "curl",
        "psql",
    } == RECIPES.keys()
