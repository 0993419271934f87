"""How it is measured: each experiment takes all of its peers in turn, round by round, and returns what it found.

Rounds alternate (A B, B A, A B ...), so that what changes on the machine meanwhile is shared. Each measurement has a
database and processes of its own.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import asyncpg
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from bench import data
from bench.judge import Samples
from bench.load import Load, build, load, tool
from bench.peers import SECRET, NoTrigger, Peer, Rowcast, Service, relays
from bench.rig import Broken, Server, cpu, raise_open_files, resident
from bench.writers import evenly, write
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.auth import Authenticator

WARM = 20  # events before it counts
OPEN_ROWS = 2000  # rows in one transaction, where many are written beforehand


@dataclass(frozen=True)
class Form:
    """How long it takes. `seconds` is one measurement."""

    name: str
    rounds: int
    seconds: float
    fan_out: int  # clients
    crowd: int  # clients
    history: int  # rows
    scales: tuple[tuple[int, int], ...]  # clients, topics


FORMS = {
    "short": Form("short", 3, 4, 1000, 10_000, 200_000, ((10, 10), (1000, 10_000))),
    "long": Form("long", 5, 15, 1000, 10_000, 200_000, ((10, 10), (100, 1000), (1000, 10_000), (10_000, 100_000))),
    "tiny": Form("tiny", 1, 3, 20, 50, 2000, ((2, 2), (4, 8))),
}
"""`tiny` shows that it works, and measures nothing."""


@dataclass(frozen=True)
class Bench:
    """What an experiment is given: a server, how long it may take, and who hears of its progress."""

    server: Server
    form: Form
    say: Callable[[str], None]

    @asynccontextmanager
    async def serving(self, peer: Peer) -> AsyncIterator[tuple[str, Service | None]]:
        """A fresh database of a peer, served."""
        async with self.server.database(await peer.template(self.server)) as dsn, peer.serving(dsn) as service:
            yield dsn, service

    def note(self, samples: Samples, number: int, peer: str, **figures: float) -> None:
        """Keep what a round found, and say so."""
        samples.add(peer, **figures)
        shown = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.say(f"round {number + 1}/{self.form.rounds}  {peer}: {shown}")


T = TypeVar("T")


def in_turn(rounds: int, peers: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Every peer in every round, every other round in the opposite order."""
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            yield number, peer


@asynccontextmanager
async def opened(service: Service, topics: Sequence[Sequence[int]]) -> AsyncIterator[Load]:
    """Clients that follow their topics."""
    async with service.clients(topics) as clients:
        await clients.open()
        yield clients


async def full_load(bench: Bench) -> Samples:
    """32 writers as fast as they can, with one client that follows every channel: tps, p50 and p99 in seconds."""
    samples = Samples()
    peers: list[Peer] = [NoTrigger(), Rowcast(), *relays()]
    for number, peer in in_turn(bench.form.rounds, peers):
        async with bench.serving(peer) as (dsn, service):
            if service is None:
                written = await write(dsn, clients=32, seconds=bench.form.seconds)
                bench.note(samples, number, peer.name, tps=written.rate)
                continue
            async with opened(service, [range(data.CHANNELS)]) as clients:
                written = await write(dsn, clients=32, seconds=bench.form.seconds)
                seen = await clients.received(written.rows)
            bench.note(samples, number, peer.name, tps=written.rate, p50=seen.p50, p99=seen.p99)
    return samples


async def paced(bench: Bench) -> Samples:
    """Writers at 50 and at 1,000 rows a second: p50_50 and p50_1000, in seconds."""
    samples = Samples()
    for number, peer in in_turn(bench.form.rounds, [Rowcast(), *relays()]):
        async with bench.serving(peer) as (dsn, service):
            assert service
            async with opened(service, [range(data.CHANNELS)]) as clients:
                written = await evenly(dsn, rate=50, seconds=WARM / 50, channels=data.CHANNELS)
                rows = written.rows
                figures: dict[str, float] = {}
                for rate, writers in ((50, 4), (1000, 16)):
                    await clients.received(rows)
                    await clients.forget()
                    seconds = bench.form.seconds * (2 if rate == 50 else 1)  # for as many samples as it takes
                    written = await write(dsn, clients=writers, seconds=seconds, rate=rate)
                    rows += written.rows
                    seen = await clients.received(rows)
                    figures |= {f"p50_{rate}": seen.p50, f"p99_{rate}": seen.p99}
            bench.note(samples, number, peer.name, **figures)
    return samples


async def single_events(bench: Bench) -> Samples:
    """Single small events to many clients: us, the CPU of the server for one delivery, in microseconds; and bytes.

    Fifty events a second at even distances, and the C loop sends as many bytes at the same pace.
    """
    samples, form, rate = Samples(), bench.form, 50
    size = 0
    for number in range(form.rounds):
        for peer in (Rowcast(), *relays()):
            async with bench.serving(peer) as (dsn, service):
                assert service
                async with opened(service, [[0]] * form.fan_out) as clients:
                    await evenly(dsn, rate=rate, seconds=WARM / rate)
                    before, used = await clients.received(WARM * form.fan_out), cpu(service.pid)
                    # One that came while its predecessor is still being sent would be sent with it.
                    written = await evenly(dsn, rate=rate, seconds=form.seconds, heard=_by_all(clients))
                    deliveries = written.rows * form.fan_out
                    after = await clients.received(before.rows + deliveries)
                    used = cpu(service.pid) - used
            each = round((after.bytes - before.bytes) / deliveries)
            size = each if peer.name == Rowcast().name else size
            bench.note(samples, number, peer.name, us=used / deliveries * 1e6, bytes=each)
        figure = await floor(form.fan_out, size, 1, rate, round(rate * form.seconds))
        bench.note(samples, number, "C loop", us=figure, bytes=size)
    return samples


def _by_all(clients: Load) -> Callable[[int], Awaitable[int]]:
    """Waits until every client has so many rows behind those of the warm-up."""
    return lambda rows: clients.until(WARM + rows)


async def floor(clients: int, size: int, joined: int, rate: float, events: int) -> float:
    """CPU microseconds of a C loop for one delivery. Raises Broken where there is no compiler."""
    program = await build("floor")
    if program is None:
        raise Broken("there is no C compiler (cc), and so no C loop to compare with")
    async with AsyncExitStack() as stack:
        looping = await stack.enter_async_context(tool(program, *map(str, (clients, size, joined, rate, events))))
        port = int((await looping.hear())["port"])
        listening = await stack.enter_async_context(load(port, [()] * clients))
        await listening.open()
        await looping.hear()
        await looping.say("go")
        told = await looping.hear(within=600)
        await listening.received(int(told["sent"]))
    return float(told["cpu"]) / int(told["sent"]) * 1e6


async def bursts(bench: Bench) -> Samples:
    """Transactions of 100 rows to many clients, several of them on their way at once: see _closed_loop."""
    samples, form = Samples(), bench.form
    for number in range(form.rounds):
        async with bench.serving(Rowcast()) as (dsn, service):
            assert service
            figures = await _closed_loop(dsn, service, form.fan_out, form.seconds, rows=100, writers=4, ahead=1)
        bench.note(samples, number, Rowcast().name, **figures)
    return samples


async def workers(bench: Bench) -> Samples:
    """Single small events to many clients, each written when all have the one before: see _closed_loop."""
    samples, form = Samples(), bench.form
    peers: list[Peer] = [Rowcast("1 worker"), Rowcast("2 workers", {"ROWCAST_WORKERS": "2"})]
    for number, peer in in_turn(form.rounds, peers):
        async with bench.serving(peer) as (dsn, service):
            assert service
            figures = await _closed_loop(dsn, service, 4 * form.fan_out, form.seconds, rows=1, writers=1, ahead=0)
        bench.note(samples, number, peer.name, **figures)
    return samples


async def _closed_loop(
    dsn: str, service: Service, count: int, seconds: float, *, rows: int, writers: int, ahead: int
) -> dict[str, float]:
    """In each step every writer writes a transaction of `rows` rows; clients are at most `ahead` whole steps behind.

    These writers do not wait for their flush: it is about the daemon, which must not wait for them.
    Returns deliveries a second; the CPU for one of them, in microseconds; and how many processors the daemon and the
    load client had. With less than a whole one, the daemon was not what it had to wait for.
    """
    async with AsyncExitStack() as stack:
        inserts = []
        for _ in range(writers):
            connection = await asyncpg.connect(dsn)
            stack.push_async_callback(connection.close)
            await connection.execute("set synchronous_commit = off")
            inserts.append(await connection.prepare(data.INSERT))
        clients = await stack.enter_async_context(opened(service, [[0]] * count))
        steps = 0

        async def step() -> None:
            nonlocal steps
            await asyncio.gather(*(insert.fetch(data.channel(0), data.user(0), rows) for insert in inserts))
            steps += 1
            await clients.until(rows * writers * max(0, steps - ahead))

        async def state() -> tuple[int, float, float]:
            """When all of it had come in, and what had been used by then."""
            at = await clients.until(rows * writers * steps)
            return at, cpu(service.pid), (await clients.mark()).cpu

        for _ in range(WARM // 2):
            await step()
        first, (began, daemon, own) = steps, await state()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await step()
        ended, daemon_then, own_then = await state()
        await clients.received(rows * writers * steps * count)
    deliveries, elapsed = (steps - first) * rows * writers * count, (ended - began) / 1e9
    return {
        "deliveries": deliveries / elapsed,
        "us": (daemon_then - daemon) / deliveries * 1e6,
        "daemon_cpu": (daemon_then - daemon) / elapsed,
        "load_cpu": (own_then - own) / elapsed,
    }


async def crowd(bench: Bench) -> Samples:
    """Many clients come, and then do nothing: us, CPU for one to come in; bytes, memory for one that is there.

    Of the relay, to which one comes by a handshake alone, too.
    """
    samples, form = Samples(), bench.form
    count = min(form.crowd, raise_open_files() - 200)
    warm, coming = count // 50, count // 5
    for number, peer in in_turn(form.rounds, [Rowcast(), *relays()]):
        async with bench.serving(peer) as (_, service):
            assert service
            async with service.clients([[0]] * count) as clients:
                await clients.open(warm)
                used, held = cpu(service.pid), resident(service.pid)
                await clients.open(coming)
                used = cpu(service.pid) - used
                await clients.open()
                held = resident(service.pid) - held
        bench.note(samples, number, peer.name, us=used / coming * 1e6, bytes=held / (count - warm), clients=count)
    return samples


async def replay(bench: Bench) -> Samples:
    """One client comes back to a daemon that has just started, and gets all there is of its topic: rows a second."""
    samples, form, peer = Samples(), bench.form, Rowcast()
    async with bench.server.database(await peer.template(bench.server)) as dsn:
        bench.say(f"writing {form.history:,} rows")
        connection = await asyncpg.connect(dsn)
        try:
            for _ in range(form.history // OPEN_ROWS):
                await connection.execute(data.INSERT, data.channel(0), data.user(0), OPEN_ROWS)
        finally:
            await connection.close()
        async with peer.serving(dsn) as service:  # which gives the rows their numbers
            since = await first_position(service)
        for statement in ("vacuum analyze", "checkpoint"):
            await data.run(dsn, statement)
        for number in range(form.rounds):
            async with peer.serving(dsn) as service, service.clients([[0]], since) as clients:
                began, used = time.monotonic_ns(), (cpu(service.pid), cpu(bench.server.pid))
                await clients.open()
                seconds = (await clients.until(form.history) - began) / 1e9
                daemon, postgres = (cpu(service.pid) - used[0]) / seconds, (cpu(bench.server.pid) - used[1]) / seconds
                await clients.received(form.history)
            figures = {"rows": form.history / seconds, "daemon_cpu": daemon, "postgres_cpu": postgres}
            bench.note(samples, number, peer.name, **figures)
    return samples


async def first_position(service: Service) -> str:
    """The position before everything."""
    url = f"ws://127.0.0.1:{service.port}{service.path}"
    async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)]) as connection:
        token = Authenticator(SECRET.encode()).issue(data.user(0), 60)
        await connection.send(json.dumps({"op": "hello", "token": token}))
        welcome = json.loads(await connection.recv())
    epoch, _, _ = welcome["pos"].rpartition(":")
    return f"{epoch}:0"


async def scale(bench: Bench) -> Samples:
    """The same rate of events over more and more topics and clients: us, CPU for one event, in microseconds.

    One client follows each topic. What daemon and Postgres use while nothing happens, for beats and heartbeats, is
    measured before and taken off: it belongs to a client and not to an event.
    """
    samples, form, rate = Samples(), bench.form, 100

    def used(service: Service) -> tuple[float, float]:
        return cpu(service.pid), cpu(bench.server.pid)

    for number, (count, topics) in in_turn(form.rounds, form.scales):
        followed = [range(first, first + topics // count) for first in range(0, topics, topics // count)]
        template = await data.wide(bench.server, count, topics)
        async with (
            bench.server.database(template) as dsn,
            Rowcast().serving(dsn) as service,
            opened(service, followed) as clients,
        ):
            written = await evenly(dsn, rate=rate, seconds=WARM / rate, channels=topics)
            await clients.received(written.rows)
            before, began = used(service), time.monotonic()
            await asyncio.sleep(form.seconds)
            idle_for = time.monotonic() - began
            idle = [(after - b) / idle_for for after, b in zip(used(service), before, strict=True)]
            before, began = used(service), time.monotonic()
            again = await write(dsn, clients=2, seconds=form.seconds, channels=topics, authors=count, rate=rate)
            await clients.received(written.rows + again.rows)
            elapsed = time.monotonic() - began
            own, postgres = (
                (after - b - rest * elapsed) / again.rows * 1e6
                for after, b, rest in zip(used(service), before, idle, strict=True)
            )
        bench.note(samples, number, scale_name(count, topics), us=own + postgres, daemon_us=own, postgres_us=postgres)
    return samples


def scale_name(clients: int, topics: int) -> str:
    """As it stands in the results."""
    return f"{clients:,} clients, {topics:,} topics"
