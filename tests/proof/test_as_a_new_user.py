"""Rowcast as somebody meets it who has only its packages: a plain table is live, and a restart loses nothing.

`pytest -s tests/proof` shows what such a person does, and when.
"""

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from playwright.async_api import Page, expect

from tests.support.browser import browser_page
from tests.support.daemon import free_port
from tests.support.folders import value
from tests.support.guide import Terminal
from tests.support.node import node
from tests.support.packages import ROOT, build_wheel, new_environment, pack
from tests.support.postgres import chosen_binaries

FILES = Path(__file__).parent
STEPS = 8  # until a row that is written is in the page
CREATE = """psql -q "$DATABASE_URL" <<'SQL'
create table orders (
    id bigint generated always as identity primary key,
    customer text not null,
    item text not null,
    status text not null default 'new'
);
create index on orders (customer);
SQL"""
SETTINGS = """cat > .env <<END
ROWCAST_PACKS=none
ROWCAST_LISTEN=$SERVER
ROWCAST_SECRET=$(python3 -c 'import secrets; print(secrets.token_urlsafe(48))')
END"""
WATCH = """daemon watch public.orders --topic "'orders:' || r.customer" --read "topic = 'orders:' || user_id\""""
OPEN = """daemon token --user ada > token
echo "$PAGES/page.html#$SERVER/ada/$(cat token)\""""
WRITE = """psql -q "$DATABASE_URL" \\
    -c "insert into orders (customer, item) values ('ada', 'a kite'), ('bob', 'a drum')\""""
GO_ON = """until [ -e enough ]; do
    psql -qtAX "$DATABASE_URL" \\
        -c "insert into orders (customer, item) values ('ada', 'a boat') returning 'order ' || id"
done"""
CHANGE = """psql -q "$DATABASE_URL" -c "update orders set status = 'sent' where id = 1" \\
    -c "delete from orders where id = 3\""""
CURL = 'curl -sN -H "Authorization: Bearer $(cat token)"{} "http://$SERVER/v1/stream?topic=orders:ada" || true'


class Person:
    """Somebody whose steps are counted and shown."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.steps = 0
        self._environment = environment
        self._start = time.monotonic()

    @asynccontextmanager
    async def terminal(self) -> AsyncIterator[Terminal]:
        async with Terminal.opened(self.folder, self._environment) as terminal:
            yield terminal

    def step(self, what: str, command: str) -> str:
        """Show the next step; returns its command."""
        self.steps += 1
        self.show(f"{self.steps}. {what}\n{command}")
        return f"{command}\n"

    def show(self, text: str) -> None:
        first, *more = text.splitlines()
        lines = f"\n{time.monotonic() - self._start:5.1f} s  {first}", *(f"{'':11}{line}" for line in more)
        print(*lines, sep="\n", flush=True)  # noqa: T201


class Follower:
    """A program that follows Ada's orders, and all that it has printed."""

    def __init__(self, terminal: Terminal) -> None:
        self.printed = ""
        self._terminal = terminal

    async def starts(self, command: str, until: str) -> None:
        self._terminal.start(f"{command}\n")
        await self.prints(until)

    async def prints(self, text: str) -> None:
        self.printed += await self._terminal.until(text)

    async def ends(self) -> None:
        self.printed += await self._terminal.run("true")


class Screen(NamedTuple):
    """The terminals in which the person works."""

    daemon: Terminal
    pages: Terminal
    writer: Terminal
    programs: list[Follower]
    curl: Follower | None


@asynccontextmanager
async def screen(person: Person) -> AsyncIterator[Screen]:
    async with AsyncExitStack() as stack:
        daemon, pages, writer, *more = [await stack.enter_async_context(person.terminal()) for _ in range(6)]
        *programs, curl = map(Follower, more)
        yield Screen(daemon, pages, writer, programs, curl if shutil.which("curl") else None)


@pytest.fixture
def packages(tmp_path: Path) -> list[Path]:
    """What a release publishes: the daemon, the Python client, the JavaScript client."""
    folder = tmp_path / "packages"
    folder.mkdir()
    archive = pack(ROOT / "clients/javascript", folder)
    return [build_wheel(ROOT, folder), build_wheel(ROOT / "clients/python", folder), archive]


@pytest.fixture
def person(empty_database: str, tmp_path: Path) -> Person:
    """Somebody who has a database, and nothing of Rowcast yet."""
    for name in ("home", "shop"):
        (tmp_path / name).mkdir()
    path = (tmp_path / "environment" / "bin", chosen_binaries().bindir, os.environ["PATH"])
    environment = {
        "PATH": ":".join(map(str, path)),
        "HOME": str(tmp_path / "home"),
        "DATABASE_URL": empty_database,
        "SERVER": f"127.0.0.1:{free_port()}",
        "PAGES": f"http://127.0.0.1:{free_port()}",
        "npm_config_offline": "true",
    }
    return Person(tmp_path / "shop", environment)


async def install(person: Person, on: Screen, packages: list[Path]) -> None:
    """Install the packages, and nothing from this checkout."""
    *wheels, archive = packages
    environment = person.folder.with_name("environment")
    names = " ".join(wheel.name for wheel in wheels)
    person.step("Install Rowcast", f"python3 -m venv environment && environment/bin/pip install {names}")
    await asyncio.to_thread(new_environment, environment, *wheels)
    await on.writer.run(person.step("Install the JavaScript client", f"npm install --silent {archive}"))
    for module in ("daemon", "rowcast_client"):
        found = await on.writer.run(f"python -c 'import {module}, sys; print({module}.__file__, sys.path)'")
        assert found.startswith(f"{environment}/lib/"), found
        assert str(ROOT) not in found
    assert f"{environment}/bin/daemon\n" == await on.writer.run("command -v daemon")
    assert (person.folder / "node_modules/rowcast").resolve().is_relative_to(person.folder)


async def serve(person: Person, on: Screen) -> None:
    """From a database with one table to a daemon that serves it."""
    await on.writer.run(CREATE)
    await on.writer.run(person.step("Say what to serve", SETTINGS))
    await on.writer.run(person.step("Install Rowcast's own schema", "daemon --apply-ddl"))
    person.show(await on.writer.run(person.step("Watch the table", WATCH)))
    on.daemon.start(person.step("Start the daemon, in a terminal of its own", "daemon"))
    await on.daemon.until("serving")


async def follow(person: Person, on: Screen, page: Page) -> None:
    """Open the page. The programs are for those who want to write one."""
    for name in ("page.html", "follow.mjs", "follow.py"):
        shutil.copy(FILES / name, person.folder)
    on.pages.start("python3 -u -m http.server --bind 127.0.0.1 ${PAGES##*:}\n")
    await on.pages.until("Serving HTTP")
    await page.goto(
        (await on.writer.run(person.step("Save the page where your pages are, and open it", OPEN))).strip()
    )
    await page.get_by_text("live", exact=True).wait_for()
    commands = (" ".join(node("follow.mjs")), "python follow.py")
    for program, command in zip(on.programs, commands, strict=True):
        await program.starts(f"TOKEN=$(cat token) {command}", until="status live\n")
    if on.curl:
        await on.curl.starts(CURL.format(""), until="event: subscribed\n")


async def restart_while_rows_are_written(person: Person, on: Screen, dsn: str) -> None:
    """Rows are written before the daemon stops, while it is away, and after it serves again."""

    async def some_more() -> None:
        newest = await value(dsn, "select max(id) from orders")
        await on.writer.until(f"order {newest + 2}\n")

    on.writer.start(f"{GO_ON}\n")
    await some_more()
    person.show("Ctrl-C ends the daemon.")
    on.daemon.interrupt()
    await on.daemon.run("true")
    person.show("It has ended.")
    await some_more()
    on.daemon.start("daemon\n")
    await on.daemon.until("serving")
    person.show("It serves again.")
    if on.curl:
        await on.curl.ends()
        last = re.findall(r"^id: (.*)$", on.curl.printed, re.MULTILINE)[-1]
        await on.curl.starts(CURL.format(f' -H "Last-Event-ID: {last}"'), until="event: subscribed\n")
    await some_more()
    (person.folder / "enough").touch()
    await on.writer.run(CHANGE)


def received(printed: str) -> dict[str, list[str]]:
    """The ids of the rows that a program received, by kind of change, in order."""
    found: dict[str, list[str]] = {}
    for kind, row in re.findall(r"^(insert|update|delete|restore|reset) (.+)$", printed, re.MULTILINE):
        found.setdefault(kind, []).append(row)
    return found


def streamed(events: str) -> dict[str, list[str]]:
    """The same, of a stream of events. When it is resumed, a change may come again."""
    frames = [
        json.loads(data) for data in re.findall(r"^event: (?:changes|reset)\ndata: (.*)$", events, re.MULTILINE)
    ]
    assert all("changes" == frame["op"] for frame in frames)
    changes = {change["seq"]: change for frame in frames for change in frame["changes"]}
    return received("\n".join(f"{change['kind']} {change['key']['id']}" for _, change in sorted(changes.items())))


async def shows_adas_orders(page: Page, dsn: str) -> None:
    """Wait until the page shows what the table holds."""
    text = "select array_agg(id || ' ' || item || ': ' || status order by id) from orders where customer = 'ada'"
    await expect(page.locator("li")).to_have_text(await value(dsn, text), timeout=60_000)


async def test_with_the_packages_alone_a_plain_table_is_live_and_loses_nothing(
    packages: list[Path], person: Person, empty_database: str
) -> None:
    assert 30 >= (FILES / "page.html").read_text(encoding="utf-8").count("\n")
    async with screen(person) as on, browser_page() as (page, complaints):
        await install(person, on, packages)
        await serve(person, on)
        await follow(person, on, page)
        await on.writer.run(person.step("Write a row, and look at the page", WRITE))
        await shows_adas_orders(page, empty_database)
        assert STEPS == person.steps
        person.show(f"The page shows it, after {STEPS} steps.")
        await restart_while_rows_are_written(person, on, empty_database)
        await shows_adas_orders(page, empty_database)
        newest = await value(empty_database, "select max(id) from orders")
        inserted = [str(row) for row in (1, *range(3, newest + 1))]  # the second is Bob's
        expected = {"insert": inserted, "update": ["1"], "delete": ["3"]}
        for program in on.programs:
            await program.prints("delete 3\n")
            assert expected == received(program.printed)
        if on.curl:
            await on.curl.prints('"kind":"delete"')
            assert expected == streamed(on.curl.printed)
        person.show(f"The page shows what the table holds, and the programs received all {len(inserted)} rows.")
        assert [] == complaints.but_for("WebSocket connection to")
