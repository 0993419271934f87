"""The experiment with floods: what an established client and /healthz notice of one, compared with a control.

Windows alternate, on one daemon. In a window of the control the same process floods a server of its own, with as
many units a second as the daemon took of it in the last flood: the processors are as busy, but not the daemon.
"""

import asyncio
import json
import re
import ssl
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import asyncpg
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from bench import data
from bench.experiments import WARM, Bench, in_turn, insert
from bench.flooder import LOCAL, REQUEST, Given
from bench.judge import Samples
from bench.load import Tool, tool
from bench.peers import SECRET, Rowcast, Service, daemon
from bench.rig import MeasurementError, cpu, python
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.auth import Authenticator

RATE: Final = 200  # rows a second
FIRST: Final = 1.0  # seconds of a flood that are shown apart: what limits allow at once is used then
SETTLE: Final = 1.5  # seconds between windows: what a user's rate allows at once is allowed again
HEALTH_EVERY: Final = 0.2  # seconds
HEALTH_TIMEOUT: Final = 5.0  # seconds
COUNTERS: Final = ("throttled", "held_up", "errors", "closed", "refused", "aborted")
_WRITTEN: Final = re.compile(r'"content":"@(\d+) ')


@dataclass(frozen=True)
class Flood:
    """A flood: its kind in flooder.py, how many connections at once, and the most units that they send a second.

    0 is as many as get through. `files`: the daemon has so few descriptors. `history`: rows to replay.
    """

    name: str
    kind: str
    connections: int
    most: float = 0
    files: int | None = None
    tls: bool = False
    history: int = 0

    @property
    def control(self) -> str:
        """The name of the control in the results."""
        return f"{self.name}, elsewhere"


FLOODS: Final = (
    Flood("sockets without hello", "no_hello", 1000, 200),
    Flood("open requests, few files", "request", 230, 200, files=256),
    Flood("pings", "ping", 4, 4 * 4096 / 40),
    Flood("nested lists", "nested", 4),
    Flood("subscribes at random", "subscribe", 4),
    Flood("replays that nobody reads", "replay", 300, 100, history=20_000),
    Flood("forged tokens", "token", 32),
    Flood("TLS handshakes", "handshake", 32, tls=True),
)


@dataclass
class Door:
    """Where a daemon listens, and how to speak to it."""

    service: Service
    tls: ssl.SSLContext | None
    epoch: str = ""  # of the log, as far as a client has been told

    @asynccontextmanager
    async def client(self) -> AsyncIterator[ClientConnection]:
        """A client of the first user."""
        scheme = "wss" if self.tls else "ws"
        url = f"{scheme}://{LOCAL}:{self.service.port}{self.service.path}"
        async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)], ssl=self.tls, max_size=None) as connection:
            await connection.send(json.dumps({"op": "hello", "token": token(0)}))
            welcome = json.loads(await connection.recv())
            self.epoch, _, _ = welcome["pos"].rpartition(":")
            yield connection

    async def get(self, path: str) -> str:
        """The answer to a request, closed by the daemon. Raises OSError."""
        reader, writer = await asyncio.open_connection(LOCAL, self.service.port, ssl=self.tls)
        try:
            writer.write(REQUEST.replace(b"/healthz", path.encode()))
            return (await reader.read()).decode()
        finally:
            writer.close()

    async def counters(self) -> dict[str, float]:
        """The sum over the labels of each of COUNTERS."""
        page = await self.get("/metrics")
        found = dict.fromkeys(COUNTERS, 0.0)
        for name, value in re.findall(r"^rowcast_(\w+)_total(?:\{.*\})? (\S+)", page, re.MULTILINE):
            if name in found:
                found[name] += float(value)
        return found


@dataclass
class Follower:
    """An established client that follows the first channel, and how long each row took to reach it, in seconds."""

    connection: ClientConnection
    rows: int = 0
    latencies: list[float] = field(default_factory=list)
    follows: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self) -> None:
        """Read until cancelled."""
        await self.connection.send(json.dumps({"op": "subscribe", "topic": f"channel:{data.channel(0)}"}))
        async for text in self.connection:
            now = time.time()
            if '"subscribed"' in str(text):
                self.follows.set()
            found = _WRITTEN.findall(str(text))
            self.rows += len(found)
            self.latencies += [now - int(at) / 1e6 for at in found]

    async def until(self, rows: int) -> None:
        """Wait until so many rows have arrived. Raises MeasurementError."""
        with suppress(TimeoutError):
            async with asyncio.timeout(60):
                while self.rows < rows:
                    await asyncio.sleep(0.02)
        if self.rows != rows:
            raise MeasurementError(f"{rows} rows should have arrived, and {self.rows} did")


def token(user: int) -> str:
    """A valid token of a user."""
    return Authenticator(SECRET.encode()).issue(data.user(user), 86_400)


def figures_of(latencies: list[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    ordered = sorted(latencies)
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[int(0.99 * (len(ordered) - 1))]}


async def measure(flood: Flood, bench: Bench) -> Samples:
    """What an established client notices of a flood.

    Figures: p50 and p99, in seconds from the row to the client; first, p99 in the FIRST seconds, which are not in the
    others; health, the slowest round trip of /healthz in seconds; units that the daemon took, a second; daemon_cpu;
    and by how much the daemon's COUNTERS rose.
    """
    samples, form = Samples(), bench.form
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rowcast-bench-")))
        dsn = await enter(bench.server.database(await Rowcast().template(bench.server)))
        if flood.history:
            await insert(dsn, min(flood.history, form.history), together=100)
        settings = certificate(home) if flood.tls else {}
        service = await enter(daemon({"DATABASE_URL": dsn, **settings}, files=flood.files))
        door = Door(service, _trusting() if flood.tls else None)
        follower = Follower(await enter(door.client()))
        following = asyncio.create_task(follower.follow())
        stack.callback(following.cancel)
        writer = await asyncpg.connect(dsn)
        stack.push_async_callback(writer.close)
        await writer.execute("set synchronous_commit = off")  # so that the figures are not those of the disk
        async with asyncio.timeout(60):
            await follower.follows.wait()  # else it misses the first rows
        window = _Window(flood, door, follower, writer, settings)
        await window.written(WARM / RATE)
        took = (await window.measured(1.0, flood.most, elsewhere=False))["units"]
        for number, elsewhere in in_turn(form.rounds, (True, False)):
            rate = max(took, 0.1) if elsewhere else flood.most
            figures = await window.measured(form.seconds, rate, elsewhere=elsewhere)
            took = took if elsewhere else figures["units"]
            bench.note(samples, number, flood.control if elsewhere else flood.name, **figures)
        if following.done():
            await following
    return samples


@dataclass
class _Window:
    flood: Flood
    door: Door
    follower: Follower
    writer: asyncpg.Connection
    files: dict[str, str]
    rows: int = 0

    async def measured(self, seconds: float, rate: float, *, elsewhere: bool) -> dict[str, float]:
        """The figures of one window."""
        flood, service = self.flood, self.door.service
        await asyncio.sleep(SETTLE)
        given = Given(
            kind=flood.kind,
            connections=flood.connections,
            rate=rate,
            port=0 if elsewhere else service.port,
            token=token(1),
            since=f"{self.door.epoch}:0",
            topic=f"channel:{data.channel(0)}",
            certificate=self.files.get("ROWCAST_TLS_CERTIFICATE", ""),
            key=self.files.get("ROWCAST_TLS_KEY", ""),
        )
        self.follower.latencies.clear()
        async with tool(*python("bench.flooder")) as flooder:
            await flooder.send(json.dumps(given))
            await flooder.receive()
            before = await self.door.counters()
            await _ask(flooder, "go")
            await self.written(FIRST)
            first = figures_of(self.follower.latencies)["p99"]
            self.follower.latencies.clear()
            done, used, began = (await _ask(flooder, "mark"))["done"], cpu(service.pid), time.monotonic()
            health = asyncio.create_task(self._health(began + seconds))
            await self.written(seconds)
            elapsed = time.monotonic() - began
            figures = {
                **figures_of(self.follower.latencies),
                "health": await health,
                "first": first,
                "units": ((await _ask(flooder, "mark"))["done"] - done) / elapsed,
                "daemon_cpu": (cpu(service.pid) - used) / elapsed,
            }
        after = await self.door.counters()
        return figures | {name: after[name] - before[name] for name in COUNTERS}

    async def written(self, seconds: float) -> None:
        """Write at RATE, and wait until all has arrived."""
        began, rows = time.monotonic(), round(seconds * RATE)
        for number in range(rows):
            await asyncio.sleep(max(0.0, began + number / RATE - time.monotonic()))
            await self.writer.execute(data.INSERT, data.channel(0), data.user(0), 1)
        self.rows += rows
        await self.follower.until(self.rows)

    async def _health(self, end: float) -> float:
        """The longest that /healthz took to answer; HEALTH_TIMEOUT if it did not."""
        longest = 0.0
        while (began := time.monotonic()) < end:
            try:
                async with asyncio.timeout(HEALTH_TIMEOUT):
                    if " 200 " not in await self.door.get("/healthz"):
                        return HEALTH_TIMEOUT
            except (OSError, TimeoutError):
                return HEALTH_TIMEOUT
            longest = max(longest, time.monotonic() - began)
            await asyncio.sleep(HEALTH_EVERY)
        return longest


async def _ask(flooder: Tool, command: str) -> dict[str, float]:
    await flooder.send(command)
    return await flooder.receive()


def certificate(home: Path) -> dict[str, str]:
    """The settings of a daemon that speaks TLS, with a new certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + timedelta(days=30))
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    files = {"ROWCAST_TLS_CERTIFICATE": home / "certificate.pem", "ROWCAST_TLS_KEY": home / "key.pem"}
    texts = (
        builder.sign(key, hashes.SHA256()).public_bytes(pem),
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain),
    )
    for file, text in zip(files.values(), texts, strict=True):
        file.write_bytes(text)
    return {setting: str(file) for setting, file in files.items()}


def _trusting() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context
