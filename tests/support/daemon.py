"""The real daemon in its own process, and a real websocket client."""

import asyncio
import itertools
import json
import os
import signal
import socket
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.error import HTTPError
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from daemon.core.frames import EXACTLY
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.auth import Authenticator
from tests.support.preloaded import Forker, Process

END_TIMEOUT = 30.0  # seconds until a daemon that does not stop is killed
SECRET = "a secret that is only good for tests, and long enough"

Frame = dict[str, Any]


def token(user: str, ttl: float = 3600) -> str:
    return Authenticator(SECRET.encode()).issue(user, ttl)


def clean_environment(**more: str) -> dict[str, str]:
    """The environment of a service: none of the tests' own settings."""
    inherited = ("PATH", "HOME", "LANG", "VIRTUAL_ENV", "TMPDIR", "PYTHONPATH")
    return {name: os.environ[name] for name in inherited if name in os.environ} | more


def whole_lines(path: Path) -> list[str]:
    """The lines of a file without one that is still being written: a file grows page by page."""
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return whole.decode().splitlines()


@dataclass
class Client:
    """A websocket client that has sent `hello`."""

    connection: ClientConnection
    welcome: Frame = field(default_factory=dict)

    async def say(self, **frame: object) -> None:
        await self.connection.send(json.dumps(frame))

    async def next(self) -> Frame:
        """The next frame that is not a heartbeat."""
        while True:
            text = await self.connection.recv()
            EXACTLY.validate_json(text)
            frame: Frame = json.loads(text)
            if frame["op"] != "head":
                return frame

    async def until(self, op: str) -> list[Frame]:
        """All frames up to and including the next one of this kind."""
        frames = [await self.next()]
        while frames[-1]["op"] != op:
            frames.append(await self.next())
        return frames

    async def subscribe(self, topic: str, **members: object) -> Frame:
        await self.say(op="subscribe", topic=topic, **members)
        return await self.next()

    async def changes(self, count: int = 1) -> list[Frame]:
        """The next `count` changes, from one or more frames. Fails if the last frame has more."""
        found: list[Frame] = []
        while len(found) < count:
            frame = await self.next()
            assert "changes" == frame["op"], frame
            found += frame["changes"]
        assert count == len(found)
        return found

    async def closed(self) -> tuple[int | None, str | None]:
        """Wait until the connection is closed; return the close code and reason."""
        await self.connection.wait_closed()
        return self.connection.close_code, self.connection.close_reason


@dataclass
class Daemon:
    """A daemon process that has become ready."""

    process: Process
    address: tuple[str, int]
    log: Path
    notices: "Notices"

    @property
    def url(self) -> str:
        return f"ws://{self.address[0]}:{self.address[1]}/v1"

    @property
    def http(self) -> str:
        return f"http://{self.address[0]}:{self.address[1]}"

    def events(self) -> list[Frame]:
        """The events logged so far; a line that is not an event is the fault that ended the daemon."""
        return [json.loads(line) for line in whole_lines(self.log) if not line.startswith("daemon: ")]

    def warnings(self) -> list[Frame]:
        """The warnings and errors logged so far."""
        return [event for event in self.events() if event["level"] not in ("debug", "info")]

    @asynccontextmanager
    async def raw(self, **options: Any) -> AsyncIterator[Client]:
        """A client that has sent nothing yet."""
        async with connect(
            self.url,
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            max_size=None,
            ping_interval=None,
            **options,
        ) as connection:
            yield Client(connection)

    @asynccontextmanager
    async def client(self, user: str, since: str | None = None, **members: object) -> AsyncIterator[Client]:
        """A client that has sent `hello`, with these members, and received `welcome`."""
        async with self.raw() as client:
            await client.say(op="hello", token=token(user), **({"since": since} if since else {}), **members)
            client.welcome = await client.next()
            assert "welcome" == client.welcome["op"], client.welcome
            yield client

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the signal, and wait until the process ends; return the exit code."""
        if self.process.returncode is None:
            self.process.send_signal(number)
        return await self.process.wait()


async def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Run `daemon` with these arguments until it exits; return the exit code, output and errors."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = await start(
            *arguments,
            environment=clean_environment(**{"ROWCAST_SECRET": SECRET} | environment),
            directory=tempfile.gettempdir(),
            output=output.fileno(),
            errors=errors.fileno(),
        )
        code = await process.wait()
        for file in (output, errors):
            file.seek(0)
        return code, output.read().decode(), errors.read().decode()


async def start(
    *arguments: str,
    module: str = "daemon",
    environment: Mapping[str, str],
    directory: Path | str,
    output: int | None = None,
    errors: int,
) -> Process:
    """Start `python -m MODULE ARGUMENTS` with an empty stdin; see `tests.support.preloaded`."""
    forker = await Forker.shared(clean_environment())
    with Path(os.devnull).open("r+b", buffering=0) as nothing:
        return await forker.run(
            module,
            *arguments,
            environment=environment,
            directory=directory,
            files=(nothing.fileno(), nothing.fileno() if output is None else output, errors),
        )


async def get(url: str, headers: Mapping[str, str] = {}) -> tuple[int, str]:
    """The status and text of a page."""
    return await asyncio.to_thread(_answer_to, urllib.request.Request(url, headers=dict(headers)))


async def post(url: str, body: object, **headers: str) -> tuple[int, str]:
    """The status and text of the answer to a JSON body."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    return await asyncio.to_thread(_answer_to, request)


def _answer_to(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Notices:
    """The messages that a service sends to systemd, received on a real NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(path))

    async def next(self) -> list[str]:
        """The lines of the next message."""
        return (await asyncio.get_running_loop().sock_recv(self._socket, 4096)).decode().splitlines()

    async def wait_for(self, line: str) -> list[str]:
        """Wait for a message with this line; returns all of its lines."""
        while line not in (lines := await self.next()):
            pass
        return lines

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def free_port() -> int:
    """A free port, below the ephemeral range and in a range that no other test process uses."""
    while True:
        port = next(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port


# Runs without workers may go on beside each other: one took the port of a server that the other had killed.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", f"gw{os.getpid()}").removeprefix("gw"))
_PORTS = itertools.cycle(range(20_000 + 500 * (_WORKER % 20), 20_500 + 500 * (_WORKER % 20)))


@asynccontextmanager
async def daemon_process(
    dsn: str,
    *arguments: str,
    port: int | None = None,
    environment: Mapping[str, str] = {},
    module: str = "daemon",
) -> AsyncIterator[Daemon]:
    """A daemon that is ready, stopped at the end. Fails if the daemon logged a traceback or an internal error.

    Without a `port`, the system chooses one. `module` is the module that Python runs.
    """
    with tempfile.TemporaryDirectory() as home, Notices(Path(home, "notify")) as notices:
        log = Path(home, "log")
        with log.open("wb") as stderr:
            process = await start(
                *arguments,
                module=module,
                environment=clean_environment(
                    DATABASE_URL=dsn,
                    NOTIFY_SOCKET=str(notices.path),
                    ROWCAST_SECRET=SECRET,
                    ROWCAST_LISTEN=f"127.0.0.1:{port or 0}",
                    ROWCAST_LOG_FORMAT="json",
                    ROWCAST_LOG_LEVEL="debug",
                    **environment,
                ),
                directory=home,
                errors=stderr.fileno(),
            )
        daemon = Daemon(process, ("127.0.0.1", port or 0), log, notices)
        try:
            await _ready(daemon)
            serving = next(line for line in daemon.events() if line["event"] == "serving")
            daemon.address = ("127.0.0.1", urlsplit(serving["data"]["listen"]).port or 0)
            yield daemon
        finally:
            await _end(daemon)
            print(*daemon.warnings(), sep="\n")  # noqa: T201 pytest shows it with a failed test
        assert "Traceback" not in log.read_text(), log.read_text()
        failures = [line["data"] for line in daemon.events() if line["event"] == "internal_error"]
        assert not failures, "\n".join(str(failure.get("traceback", failure)) for failure in failures)


async def _end(daemon: Daemon) -> None:
    """Stop the daemon as an operator would. If it hangs, SIGABRT makes it print its stack before it is killed."""
    try:
        async with asyncio.timeout(END_TIMEOUT):
            await daemon.stop()
    except TimeoutError:
        daemon.process.send_signal(signal.SIGABRT)
        daemon.process.send_signal(signal.SIGCONT)
        with suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT):
                await daemon.process.wait()
        await daemon.stop(signal.SIGKILL)
        raise AssertionError(f"the daemon does not stop:\n{daemon.log.read_text()}") from None


async def _ready(daemon: Daemon) -> None:
    ended = asyncio.create_task(daemon.process.wait())
    ready = asyncio.create_task(daemon.notices.wait_for("READY=1"))
    await asyncio.wait({ended, ready}, return_when=asyncio.FIRST_COMPLETED)
    assert ready.done(), daemon.log.read_text()
    ended.cancel()
