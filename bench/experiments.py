"""The experiments: each measures all of its peers in turn, round by round, and returns the samples.

Rounds alternate (A B, B A, A B ...), so that changes on the machine affect all peers alike. Each measurement has its
own database and processes.
"""

import asyncio
import json
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import asyncpg
from websockets.asyncio.client import connect
from websockets.typing import Subprotocol

from bench import data
from bench.costs import Costs
from bench.judge import Samples
from bench.load import Load, build, load, split, tool
from bench.peers import SECRET, NoTrigger, Peer, Rowcast, Service, relays
from bench.rig import MeasurementError, Server, cpu, raise_open_files, resident
from bench.writers import Written, evenly, write
from daemon.core.wire import SUBPROTOCOL
from daemon.gateway.auth import Authenticator

WARM = 20  # events before a measurement begins
FIRST = 1.0  # seconds at the beginning of writing whose latencies are not counted
FILTERS = (0, 1, 100)  # different ones among the clients of a topic
BATCH_ROWS = 2000  # rows in one transaction when the history is written


@dataclass(frozen=True)
class Form:
    """The size of a run. `seconds` is the length of one measurement."""

    name: str
    rounds: int
    seconds: float
    fan_out: int  # clients that receive every event
    idle_clients: int
    history: int  # rows
    snapshot: int  # rows of each table
    scales: tuple[tuple[int, int], ...]  # clients, topics


FORMS = {
    "short": Form("short", 3, 4, 1000, 10_000, 200_000, 4000, ((10, 10), (1000, 10_000))),
    "long": Form(
        "long", 5, 15, 1000, 10_000, 200_000, 4000, ((10, 10), (100, 1000), (1000, 10_000), (10_000, 100_000))
    ),
    "tiny": Form("tiny", 1, 3, 20, 50, 2000, 200, ((2, 2), (4, 8))),
}
"""`tiny` only shows that everything works; its figures mean nothing."""


@dataclass(frozen=True)
class Bench:
    """What an experiment gets: a server, the size of the run, and a function that logs its progress."""

    server: Server
    form: Form
    log: Callable[[str], None]

    @asynccontextmanager
    async def serving(self, peer: Peer) -> AsyncIterator[tuple[str, Service | None]]:
        """A fresh database of a peer, served."""
        async with self.server.database(await peer.template(self.server)) as dsn, peer.serving(dsn) as service:
            yield dsn, service

    def note(self, samples: Samples, number: int, peer: str, **figures: float) -> None:
        """Record and log the figures of a round."""
        samples.add(peer, **figures)
        shown = ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())
        self.log(f"round {number + 1}/{self.form.rounds}  {peer}: {shown}")


T = TypeVar("T")


def in_turn(rounds: int, peers: Sequence[T]) -> Iterator[tuple[int, T]]:
    """Every peer in every round; every other round goes in reverse order."""
    for number in range(rounds):
        for peer in peers if number % 2 == 0 else reversed(peers):
            yield number, peer


@asynccontextmanager
async def opened(service: Service, topics: Sequence[Sequence[int]]) -> AsyncIterator[Load]:
    """Clients that already follow their topics."""
    async with service.clients(topics) as clients:
        await clients.open()
        yield clients


@asynccontextmanager
async def distributed(services: Sequence[Service], count: int) -> AsyncIterator[Load]:
    """Clients that already follow the first topic, the same number at each service."""
    async with AsyncExitStack() as stack:
        shares = zip(services, split(count, len(services)), strict=True)
        clients = Load.of([await stack.enter_async_context(one.clients([[0]] * share)) for one, share in shares])
        await clients.open()
        yield clients


async def write_settled(dsn: str, load: Load, *, clients: int, seconds: float, rate: float | None = None) -> Written:
    """Write at full speed or at a rate, and forget the latencies of the first second.

    Writers connect in it, and the first insert of each loads what its backend needs. That takes many times as long as
    any other, for every peer, and what waits for it would be the 99th percentile of the whole.
    """
    writing = asyncio.create_task(write(dsn, clients=clients, seconds=FIRST + seconds, rate=rate))
    try:
        await asyncio.wait({writing}, timeout=FIRST)
        await load.forget()
        return await writing
    finally:
        writing.cancel()


async def full_load(bench: Bench) -> Samples:
    """32 writers at full speed, one client that follows every channel.

    Figures: tps; p50 and p99 in seconds; what a row costs, see Costs.
    """
    samples = Samples()
    peers: list[Peer] = [NoTrigger(), Rowcast(), *relays()]
    for number, peer in in_turn(bench.form.rounds, peers):
        async with bench.serving(peer) as (dsn, service):
            costs = Costs(bench.server, dsn, service)
            if service is None:
                await costs.begin()
                written = await write(dsn, clients=32, seconds=bench.form.seconds)
                bench.note(samples, number, peer.name, tps=written.rate, **await costs.per_row(written.rows))
                continue
            async with opened(service, [range(data.CHANNELS)]) as clients:
                await costs.begin()
                written = await write_settled(dsn, clients, clients=32, seconds=bench.form.seconds)
                seen = await clients.received(written.rows)
            spent = await costs.per_row(written.rows)
            bench.note(samples, number, peer.name, tps=written.rate, p50=seen.p50, p99=seen.p99, **spent)
    return samples


async def half_load(bench: Bench) -> Samples:
    """Every peer at half of what the relay admits at full speed. Figures: tps; p50 and p99 in seconds."""
    samples, form = Samples(), bench.form
    peers: list[Peer] = [Rowcast(), *relays()]
    for number in range(form.rounds):
        async with bench.serving(relays()[0]) as (dsn, service):
            assert service
            async with opened(service, [range(data.CHANNELS)]) as clients:
                full = await write(dsn, clients=32, seconds=form.seconds)
                await clients.received(full.rows)
        for peer in peers if number % 2 == 0 else reversed(peers):
            async with bench.serving(peer) as (dsn, service):
                assert service
                async with opened(service, [range(data.CHANNELS)]) as clients:
                    warm = await evenly(dsn, rate=50, seconds=WARM / 50, channels=data.CHANNELS)
                    await clients.received(warm.rows)
                    written = await write_settled(dsn, clients, clients=32, seconds=form.seconds, rate=full.rate / 2)
                    seen = await clients.received(warm.rows + written.rows)
                bench.note(samples, number, peer.name, tps=written.rate, p50=seen.p50, p99=seen.p99)
    return samples


async def paced(bench: Bench) -> Samples:
    """Writers at 50 and at 1,000 rows a second. Figures: p50 and p99 for each, in seconds."""
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
                    seconds = bench.form.seconds * (2 if rate == 50 else 1)  # enough samples for a p99
                    written = await write_settled(dsn, clients, clients=writers, seconds=seconds, rate=rate)
                    rows += written.rows
                    seen = await clients.received(rows)
                    figures |= {f"p50_{rate}": seen.p50, f"p99_{rate}": seen.p99}
            bench.note(samples, number, peer.name, **figures)
    return samples


async def single_events(bench: Bench) -> Samples:
    """Single small events to many clients. Figures: us, server CPU per delivery in microseconds; bytes per delivery.

    Fifty events a second at even intervals; the C loop sends as many bytes at the same pace.
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
                    # An event that arrives while the previous one is still being sent would be sent together with it.
                    written = await evenly(dsn, rate=rate, seconds=form.seconds, after_each=_by_all(clients))
                    deliveries = written.rows * form.fan_out
                    after = await clients.received(before.rows + deliveries)
                    used = cpu(service.pid) - used
            each = round((after.bytes - before.bytes) / deliveries)
            size = each if peer.name == Rowcast().name else size
            bench.note(samples, number, peer.name, us=used / deliveries * 1e6, bytes=each)
        figure = await floor(form.fan_out, size, 1, rate, round(rate * form.seconds))
        bench.note(samples, number, "C loop", us=figure, bytes=size)
    return samples


async def filtered_events(bench: Bench) -> Samples:
    """Single small events to many clients, without filters and with some that each event matches.

    Figure: us, CPU of the daemon per delivery in microseconds.
    """
    samples, form, rate = Samples(), bench.form, 50
    for number, count in in_turn(form.rounds, FILTERS):
        async with bench.serving(Rowcast()) as (dsn, service):
            assert service
            async with service.clients([[0]] * form.fan_out, subscribe=partial(_filter, count)) as clients:
                await clients.open()
                await evenly(dsn, rate=rate, seconds=WARM / rate)
                await clients.received(WARM * form.fan_out)
                used = cpu(service.pid)
                written = await evenly(dsn, rate=rate, seconds=form.seconds, after_each=_by_all(clients))
                used = cpu(service.pid) - used
        bench.note(samples, number, filters_name(count), us=used / (written.rows * form.fan_out) * 1e6)
    return samples


def _filter(count: int, client: int) -> Mapping[str, object]:
    """One of so many filters."""
    return {"where": {"messages": {"content": {"ne": f"none {client % count}"}}}} if count else {}


def filters_name(count: int) -> str:
    """The name of this many filters in the results."""
    return f"{count or 'no'} filter{'' if count == 1 else 's'}"


def _by_all(clients: Load) -> Callable[[int], Awaitable[int]]:
    """Waits until every client has this many rows after those of the warm-up."""
    return lambda rows: clients.until(WARM + rows)


async def floor(clients: int, size: int, joined: int, rate: float, events: int) -> float:
    """CPU of a C loop per delivery, in microseconds. Raises MeasurementError if there is no compiler."""
    program = await build("floor")
    if program is None:
        raise MeasurementError("there is no C compiler (cc), and so no C loop to compare with")
    async with AsyncExitStack() as stack:
        looping = await stack.enter_async_context(tool(program, *map(str, (clients, size, joined, rate, events))))
        port = int((await looping.receive())["port"])
        listening = await stack.enter_async_context(load(port, [()] * clients))
        await listening.open()
        await looping.receive()
        await looping.send("go")
        answer = await looping.receive(timeout=600)
        await listening.received(int(answer["sent"]))
    return float(answer["cpu"]) / int(answer["sent"]) * 1e6


async def bursts(bench: Bench) -> Samples:
    """Transactions of 100 rows to many clients, several of them in flight at once: see closed_loop."""
    samples, form = Samples(), bench.form
    for number in range(form.rounds):
        async with bench.serving(Rowcast()) as (dsn, service):
            assert service
            figures = await closed_loop(dsn, service, form.fan_out, form.seconds, rows=100, writers=4, ahead=1)
        bench.note(samples, number, Rowcast().name, **figures)
    return samples


async def workers(bench: Bench) -> Samples:
    """Single small events to many clients: see one_by_one."""
    samples, form = Samples(), bench.form
    peers: list[Peer] = [Rowcast("1 worker"), Rowcast("2 workers", {"ROWCAST_WORKERS": "2"})]
    for number, peer in in_turn(form.rounds, peers):
        async with bench.serving(peer) as (dsn, service):
            assert service
            figures = await one_by_one(dsn, [service], 4 * form.fan_out, form.seconds)
        bench.note(samples, number, peer.name, **figures)
    return samples


async def one_by_one(dsn: str, services: Sequence[Service], count: int, seconds: float) -> dict[str, float]:
    """Single events, each written when all clients have the previous one.

    First the clients read an event when it has arrived for all of them, so that the processors belong to the services
    until then, and reading takes no part of the time. Then they read while the services send. Figures: deliveries a
    second, and at_once, the same while clients read; us, CPU of the services per delivery in microseconds, and
    daemon_cpu, the processors that they used, both of the first part; load_cpu, those of the clients in the second.
    """
    async with AsyncExitStack() as stack:
        connection = await asyncpg.connect(dsn)
        stack.push_async_callback(connection.close)
        await connection.execute("set synchronous_commit = off")
        insert = await connection.prepare(data.INSERT)
        clients = await stack.enter_async_context(distributed(services, count))
        rows = 0

        async def step(reach: Callable[[int], Awaitable[int]]) -> float:
            nonlocal rows
            began = time.monotonic_ns()
            await insert.fetch(data.channel(0), data.user(0), 1)
            rows += 1
            return (await reach(rows) - began) / 1e9

        async def gathered() -> float:
            await clients.pause()
            return await step(clients.gather)

        async def steps(one: Callable[[], Awaitable[float]]) -> tuple[int, float, float, float]:
            """Deliveries, the time they took, and the CPU that services and clients used."""
            before, own, elapsed, first = _used(services), (await clients.mark()).cpu, 0.0, rows
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                elapsed += await one()
            return (rows - first) * count, elapsed, _used(services) - before, (await clients.mark()).cpu - own

        for _ in range(WARM // 2):
            await step(clients.until)
        deliveries, elapsed, used, _ = await steps(gathered)
        at_once, elapsed_then, _, own = await steps(lambda: step(clients.until))
        await clients.received(rows * count)
    return {
        "deliveries": deliveries / elapsed,
        "us": used / deliveries * 1e6,
        "daemon_cpu": used / elapsed,
        "at_once": at_once / elapsed_then,
        "load_cpu": own / elapsed_then,
    }


def _used(services: Sequence[Service]) -> float:
    """The CPU that they have used, in seconds."""
    return sum(cpu(service.pid) for service in services)


async def closed_loop(
    dsn: str, service: Service, count: int, seconds: float, *, rows: int, writers: int, ahead: int
) -> dict[str, float]:
    """In each step every writer writes a transaction of `rows` rows; clients are at most `ahead` whole steps behind.

    The writers commit asynchronously, so that the daemon never waits for a flush. Figures: deliveries a second; us,
    CPU of the daemon per delivery in microseconds; the processors that the daemon and the load client used. If the
    daemon used less than one, it was not the bottleneck.
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
            """When everything written so far had arrived, and the CPU used until then by daemon and clients."""
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


async def idle_clients(bench: Bench) -> Samples:
    """Many clients connect and then stay idle. Figures: us, server CPU to connect a client; bytes, memory per client.

    Clients of the relay only make a handshake.
    """
    samples, form = Samples(), bench.form
    count = min(form.idle_clients, raise_open_files() - 200)
    warm, measured = count // 50, count // 5
    for number, peer in in_turn(form.rounds, [Rowcast(), *relays()]):
        async with bench.serving(peer) as (_, service):
            assert service
            async with service.clients([[0]] * count) as clients:
                await clients.open(warm)
                used, held = cpu(service.pid), resident(service.pid)
                await clients.open(measured)
                used = cpu(service.pid) - used
                await clients.open()
                held = resident(service.pid) - held
        bench.note(samples, number, peer.name, us=used / measured * 1e6, bytes=held / (count - warm), clients=count)
    return samples


async def replay(bench: Bench) -> Samples:
    """One client replays its whole topic from a daemon that has just started. Figures: rows a second, CPU."""
    samples, form, peer = Samples(), bench.form, Rowcast()
    async with bench.server.database(await peer.template(bench.server)) as dsn:
        since = await write_history(bench, dsn, peer)
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


async def insert(dsn: str, rows: int, channel: int = 0, together: int = BATCH_ROWS) -> None:
    """Insert messages into a channel, so many in one transaction."""
    connection = await asyncpg.connect(dsn)
    try:
        for first in range(0, rows, together):
            await connection.execute(data.INSERT, data.channel(channel), data.user(0), min(together, rows - first))
    finally:
        await connection.close()


async def snapshots(bench: Bench) -> Samples:
    """Clients that are connected all ask at once for the rows of one topic, and wait for the last one's.

    Figures: rows, a second; reads, of the database; us, CPU of the daemon per client in microseconds. Half of the
    rows are messages, whose arrival is timed; the others are memberships.
    """
    samples, form = Samples(), bench.form
    most = min(form.idle_clients, raise_open_files() - 200)
    sizes = [(1, form.snapshot), (min(form.fan_out, most), form.snapshot // 10), (most, form.snapshot // 100)]
    async with bench.server.database(await Rowcast().template(bench.server)) as dsn:
        await insert(dsn, form.snapshot)
        await data.run(dsn, "vacuum analyze")
        for number, (count, limit) in in_turn(form.rounds, sizes):
            wanted = partial(_snapshot, limit)
            async with Rowcast().serving(dsn) as service, service.clients([[0]] * count, subscribe=wanted) as clients:
                await clients.connect()
                began, used = time.monotonic_ns(), cpu(service.pid)
                await clients.ask()
                seconds = (await clients.until(limit) - began) / 1e9
                figures = {
                    "rows": 2 * limit * count / seconds,
                    "reads": await metric(service, "rowcast_snapshot_seconds_count"),
                    "us": (cpu(service.pid) - used) / count * 1e6,
                }
            bench.note(samples, number, snapshot_name(count), **figures)
    return samples


def _snapshot(limit: int, _: int) -> Mapping[str, object]:
    return {"snapshot": {"limit": limit}}


def snapshot_name(clients: int) -> str:
    """The name of this many clients in the results."""
    return f"{clients:,} client{'s' if clients > 1 else ''}"


async def metric(service: Service, name: str) -> float:
    """The value of a metric of the daemon, without labels."""
    url = f"http://127.0.0.1:{service.port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    [line] = [line for line in page.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


async def write_history(bench: Bench, dsn: str, peer: Rowcast) -> str:
    """Write the rows of a replay, and have them numbered. Returns the position before them."""
    bench.log(f"writing {bench.form.history:,} rows")
    await insert(dsn, bench.form.history)
    async with peer.serving(dsn) as service:  # the daemon numbers the rows before it is ready
        since = await first_position(service)
    for statement in ("vacuum analyze", "checkpoint"):
        await data.run(dsn, statement)
    return since


async def first_position(service: Service) -> str:
    """The position before the first change."""
    url = f"ws://127.0.0.1:{service.port}{service.path}"
    async with connect(url, subprotocols=[Subprotocol(SUBPROTOCOL)]) as connection:
        token = Authenticator(SECRET.encode()).issue(data.user(0), 60)
        await connection.send(json.dumps({"op": "hello", "token": token}))
        welcome = json.loads(await connection.recv())
    epoch, _, _ = welcome["pos"].rpartition(":")
    return f"{epoch}:0"


async def scale(bench: Bench) -> Samples:
    """The same rate of events over more and more topics and clients. Figures: us, CPU per event in microseconds.

    One client follows each topic. The idle use of daemon and Postgres, such as heartbeats, is measured before and
    subtracted: it depends on the clients, not on the events.
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
    """The name of this size in the results."""
    return f"{clients:,} clients, {topics:,} topics"
