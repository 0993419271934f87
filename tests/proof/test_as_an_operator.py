"""docs/operate.md, followed word for word: root types every command on a new machine with a systemd of its own.

`pytest -s tests/proof/test_as_an_operator.py` shows what root types, and what it prints.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest

from tests.support.guide import Terminal, blocks
from tests.support.machine import Machine
from tests.support.packages import ROOT, build_index, build_wheel

GUIDE = "docs/operate.md"
# What is not typed here, by how it begins, and why.
LEFT_OUT = {
    "printf 'POSTGRES_PASSWORD=": "it needs Docker, and a network for the images that it builds on",
}
# What only newer versions of systemd know, by how it begins, and from which one on.
SINCE = {"install -D -m 0644 -t /etc/systemd/system/rowcast.service.d": 253}
# What readers have already, where the guide takes something of theirs as an example.
BEFORE = {
    "/opt/rowcast/bin/pip install --upgrade": "cd /srv/downloads",
    "daemon watch public.orders": "runuser -u rowcast -- psql -qd chat -c "
    "'create table public.orders (id bigint primary key, customer_id text, status text, total int)'",
}
NEW_CLUSTER = """shopt -s expand_aliases  # as in the shell of somebody who types
rm -rf /etc/postgresql/* /var/lib/postgresql/*
version=$(ls /usr/lib/postgresql | sort -n | tail -1)
pg_createcluster "$version" main
systemctl start "postgresql@$version-main"
cd /srv/downloads
"""
OFFLINE = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_NO_INDEX": "1",
    "PIP_FIND_LINKS": "/srv/downloads",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
}
GET = "import sys, urllib.request as u; print(u.urlopen('http://127.0.0.1:8787/' + sys.argv[1]).read().decode())"
TOKEN = (
    "runuser -u rowcast -- env ROWCAST_SECRET_FILE=/etc/rowcast/keys/secret /opt/rowcast/bin/daemon token --user ada"
)
STREAM = f"""curl -sN -H "Authorization: Bearer $({TOKEN})" 'http://127.0.0.1:8787/v1/stream?topic=orders:ada'\n"""
WRITE = "runuser -u rowcast -- psql -qd chat -c \"insert into public.orders values (1, 'ada', 'new', 5)\""


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    """A machine as a reader has it: Postgres as Debian installs it, and what they have downloaded."""
    async with Machine.booted() as machine:
        downloads = machine.root / "srv/downloads"
        downloads.mkdir()
        build_index(build_wheel(ROOT, downloads), downloads)
        yield machine


def of(code: str, table: Mapping[str, str]) -> str:
    """The entry of a table for the block that begins like its key."""
    return next((value for begin, value in table.items() if code.startswith(begin)), "")


class Reader:
    """Root, who types what the guide says."""

    def __init__(self, machine: Machine, terminal: Terminal) -> None:
        self._machine, self._terminal = machine, terminal
        self.printed: dict[str, str] = {}  # by the first line of what was typed

    async def type(self, code: str) -> None:
        """Type a block, with what is told about it above; it must succeed."""
        try:
            await self._terminal.run(of(code, BEFORE))
            printed = await self._terminal.run(code)
        except AssertionError:
            print(await self._machine.run("journalctl", "--boot", "--lines=50"))  # noqa: T201 so that one sees why
            raise
        print(f"\n# {code}\n{printed}")  # noqa: T201 pytest -s shows it
        self.printed[code.splitlines()[0]] = printed

    async def set(self, settings: str) -> None:
        """Take over settings; the program must understand them."""
        command = " ".join(settings.split())
        await self._terminal.run(f"cd / && env {command} /opt/rowcast/bin/daemon config")

    def of(self, begin: str) -> str:
        """What was printed after the command that begins like this."""
        [found] = [text for line, text in self.printed.items() if line.startswith(begin)]
        return found


@pytest.mark.timeout(300)  # it installs, boots, and starts the service five times
async def test_root_gets_a_service_by_typing_every_command_of_the_guide(machine: Machine) -> None:
    version = int((await machine.run("systemctl", "--version")).split()[1])
    too_old = {begin: "systemd" for begin, since in SINCE.items() if since > version}
    guide = blocks(GUIDE)
    for begin in (*LEFT_OUT, *SINCE, *BEFORE):
        assert [begin] == [begin for _, _, code in guide if code.startswith(begin)]
    async with machine.terminal(**OFFLINE) as terminal, machine.terminal() as other:
        await terminal.run(NEW_CLUSTER)
        reader = Reader(machine, terminal)
        for _, language, code in guide:
            if language == "ini":
                await reader.set(code)
            elif language == "sh" and not of(code, LEFT_OUT) and not of(code, too_old):
                await reader.type(code)
        assert "\nfail" not in reader.of("systemd-run ")
        assert '"reloaded"' in await machine.run("journalctl", "--unit=rowcast")
        assert await machine.run("find", "/var/lib/rowcast/backups/", "-name", "*.*", "-size", "+0")
        other.start(STREAM)
        await other.until("event: subscribed")
        await terminal.run(WRITE)
        await other.until('"status":"new"')
        await loses_no_connection(machine)


async def loses_no_connection(machine: Machine) -> None:
    """While the service restarts, everybody who connects is served."""
    restart = asyncio.create_task(machine.run("systemctl", "restart", "rowcast"))
    while not restart.done():
        page = await machine.run("/opt/rowcast/bin/python", "-c", GET, "readyz")
        assert json.loads(page)["ready"]
    await restart
