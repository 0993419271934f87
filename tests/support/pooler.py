"""A real PgBouncer before a test's Postgres."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from daemon.embedded.account import Account
from tests.support.daemon import free_port
from tests.support.postgres import passable_directory

PLACES = ("/usr/sbin", "/usr/local/sbin")
NONE = "There is no PgBouncer here: install pgbouncer (Debian: apt install pgbouncer)."

CONFIGURATION = """
[databases]
* = host={host} port={server_port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
"""


@dataclass(frozen=True)
class Pooler:
    """A running PgBouncer. `dsn` leads through it to the database that it was started for."""

    dsn: str
    port: int


def find_pgbouncer() -> str | None:
    """The program, if it is installed."""
    return shutil.which("pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), *PLACES]))


@asynccontextmanager
async def running_pooler(
    dsn: str, mode: str, *settings: str, size: int = 20, port: int | None = None
) -> AsyncIterator[Pooler]:
    """A PgBouncer in this pool mode, with more lines of configuration. Skips the test where none is installed."""
    program = find_pgbouncer()
    if program is None:
        pytest.skip(NONE)
    url, port = urlsplit(dsn), port or free_port()
    options = parse_qs(url.query)
    with passable_directory() as directory:
        account = Account.of(directory / "none")
        file = directory / "pgbouncer.ini"
        text = CONFIGURATION.format(
            host=options["host"][0], server_port=options["port"][0], user=url.username,
            password=unquote(url.password or ""), port=port, mode=mode, size=size,
        )  # fmt: skip
        file.write_text("\n".join([text, *settings]))
        file.chmod(0o600)
        as_root = os.geteuid() == 0  # which PgBouncer refuses to run as
        if as_root:
            account.take_ownership(file)
        with (directory / "log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(program, "-q", file),
                stdin=asyncio.subprocess.DEVNULL,
                stderr=log,
                user=account.uid if as_root else None,
                group=account.gid if as_root else None,
            )
        try:
            await _listening(port, process, directory / "log")
            name = unquote(url.path.lstrip("/"))
            yield Pooler(f"postgresql://{url.username}@127.0.0.1:{port}/{name}?sslmode=disable", port)
        finally:
            process.terminate()
            await process.wait()


async def _listening(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    while process.returncode is None:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            return
        await asyncio.sleep(0)
    raise AssertionError(log.read_text())
