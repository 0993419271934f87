"""The one room that knows everybody: builds the parts, joins them, runs them, and lets them go in order."""

import asyncio
import gc
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import astuple, dataclass
from functools import partial
from hashlib import sha256
from typing import Any, ClassVar

from pydantic import TypeAdapter

from daemon import __version__, metrics, systemd
from daemon.core.errors import NoLog, OperatorFault
from daemon.core.farewells import Farewells
from daemon.core.hub import Hub
from daemon.files import folder
from daemon.flow.attend import Desk, bye
from daemon.flow.pump import Pump
from daemon.flow.recent import Recent
from daemon.flow.replay import PatientHistory
from daemon.flow.served import Served
from daemon.gateway.auth import Authenticator
from daemon.gateway.http import Page, Site, json_page, static_pages, text_page
from daemon.gateway.server import Gateway, Limits, bind, encode
from daemon.logs import get_logger
from daemon.packs import Pack, bundled
from daemon.postgres import ddl
from daemon.postgres.connect import DRIVER_ERRORS, Connection, Pool, address_of, connect, explain, lent, open_pool
from daemon.postgres.doorbell import Doorbell
from daemon.postgres.drift import Drift, broken_rules, count_watched, drift
from daemon.postgres.event_log import DeadLetters, PgEventLog, PgGrants
from daemon.postgres.history import UnknownPack
from daemon.postgres.queries import query
from daemon.postgres.retention import DROPPING, Retention
from daemon.postgres.sequencer import Sequencer
from daemon.settings import Address, Settings

log = get_logger()

# A leader that is waiting must not be cut off for being idle, and a transaction that hangs must not hold others up.
SESSION = {
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "5s",
    "lock_timeout": "5s",
    "statement_timeout": "0",
    "timezone": "UTC",
    # Few rows are looked for among many, by an index, and always in the same way: no plan may depend on whether
    # statistics are fresh, and none has to be made anew each time, which would cost more than the statement.
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "max_parallel_workers_per_gather": "0",
    "jit": "off",
}
Demo = Callable[[], Mapping[str, Any]]
"""What whoever asks is told in a demo: the sample users, with tokens."""

START_WITHIN = 30.0  # seconds for the first echo of NOTIFY, and until what goes on for longer is talked about
CLOSE_WITHIN = 2.0  # seconds for the database connections to close
LOOK_WITHIN = 30.0  # seconds to look at the schemas and the captures
# A full pass of the garbage collector stops everybody for 0.3 s where 10,000 clients follow ten topics each. What is
# done often leaves it nothing, so it makes one a hundred times more rarely than it would by itself.
COLLECTING = 700, 10, 1000
READ_WITHIN = 10.0  # seconds without a read of the log until this daemon counts as not ready


class Standby(OperatorFault):
    """This database is a standby and takes no writes: connect to the primary."""

    exit_code: ClassVar[int] = 31


class Deaf(OperatorFault):
    """NOTIFY does not come back from this database: connect directly to it, not through a transaction pooler."""

    exit_code: ClassVar[int] = 33


class Unordered(OperatorFault):
    """Events cannot be given their order ({reason}): mend that in the database. What is written meanwhile is kept."""

    exit_code: ClassVar[int] = 39

    def __init__(self, reason: str) -> None:
        self.reason = reason


class NotCurrent(OperatorFault):
    """The schema is not current ({why}): run `daemon --apply-ddl` first."""

    exit_code: ClassVar[int] = 32

    def __init__(self, why: str) -> None:
        self.why = why


def schemas_of(settings: Settings) -> dict[str, str]:
    """The chosen packs, each with the schema that it lives in."""
    return {pack: settings.schema_name or pack for pack in settings.packs}


def chosen_packs(settings: Settings) -> dict[str, Pack]:
    """The packs to serve, by schema. Raises UnknownPack."""
    for name in settings.packs:
        if name not in bundled():
            raise UnknownPack(name, list(bundled()))
    return {schema: bundled()[pack] for pack, schema in schemas_of(settings).items()}


def contract_hash(packs: Mapping[str, Pack]) -> str:
    """A short hash of every payload contract: it changes when a row model does."""
    contracts = {
        f"{pack.name}.{table}": TypeAdapter(model).json_schema()
        for pack in packs.values()
        for table, model in pack.tables.items()
    }
    return sha256(json.dumps(contracts, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Running:
    """A daemon that serves: where, and what its operator may want to say about it."""

    host: str
    port: int
    pool: Pool
    readiness: "Readiness"
    metrics_url: str | None

    @property
    def http_url(self) -> str:
        """Where the live page is."""
        return f"http://{Address(self.host, self.port)}/"

    @property
    def websocket_url(self) -> str:
        """Where clients connect."""
        return f"ws{self.http_url.removeprefix('http')}v1"


class Schema:
    """What is wrong with the schemas and the captures in the database. Somebody may change them at any time."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.stale: str | None = None
        self.drifts: list[Drift] = []
        self._pool, self._settings = pool, settings

    @property
    def problems(self) -> list[str]:
        """One line each; empty if all is well."""
        return [*filter(None, [self.stale]), *map(str, self.drifts)]

    async def look(self) -> None:
        """Look it up anew, and log what is new about the captures. Raises a DatabaseFault or the driver's errors."""
        async with lent(self._pool, LOOK_WITHIN) as connection:
            self.stale, drifts = await examine(connection, self._settings)
        for one in drifts:
            if one not in self.drifts:
                log.error("trigger_error", table=one.table, problem=one.problem, remedy=one.remedy)
        if self.drifts and not drifts and not self.stale:
            log.info("capture_restored")
        self.drifts = drifts
        metrics.CAPTURE_DRIFT.set(len({one.table for one in drifts}))

    async def watch(self, every: float = 60.0) -> None:
        """Look every so many seconds, for ever. While the database does not answer, what was last seen stands."""
        while True:
            await asyncio.sleep(every)
            with suppress(OperatorFault, *DRIVER_ERRORS):
                await self.look()


async def examine(connection: Connection, settings: Settings) -> tuple[str | None, list[Drift]]:
    """Why the schemas are not current, or None; and what has drifted. Raises an OperatorFault or a driver error."""
    stale = await ddl.stale(connection, settings.packs, schemas=schemas_of(settings))
    present = await ddl.current(connection, ddl.ROWCAST) is not None
    return stale, await drift(connection) if present else []


async def check(settings: Settings) -> tuple[list[str], int]:
    """A line for each problem of the schemas and the captures, and how many tables are watched.

    Beside what `examine` finds, these are the problems that the packs' own check.sql find. Raises an OperatorFault.
    """
    connection = await connect(
        settings.require_dsn(),
        application_name="rowcast check",
        server_settings=SESSION,
        attempts=settings.connect_attempts,
    )
    try:
        stale, drifts = await examine(connection, settings)
        lines = [str(NotCurrent(stale))] if stale else []
        lines += map(str, drifts)
        for pack, schema in schemas_of(settings).items():
            if await ddl.current(connection, schema) is not None:
                lines += map(str, await broken_rules(connection, pack, schema))
        return lines, 0 if lines else await count_watched(connection)
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        connection.terminate()


@dataclass(frozen=True)
class Readiness:
    """Why this daemon is not ready; asked by /readyz and by the watchdog."""

    doorbell: Doorbell
    pump: Pump
    schema: Schema

    def reasons(self) -> list[str]:
        """Empty if it is ready."""
        reasons = list(self.schema.problems)
        if not self.doorbell.hears:
            reasons.append("the listener has no heartbeat")
        if self.pump.silence > READ_WITHIN:
            reasons.append("the log is not being read")
        return reasons

    def page(self) -> Page:
        """200 when ready, else 503 with the reasons."""
        reasons = self.reasons()
        return json_page({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


def site(readiness: Readiness, demo: Demo | None) -> Site:
    """The pages beside the websocket."""
    pages: dict[str, Page | Callable[[], Page]] = {
        **static_pages(folder("web")),
        "/healthz": lambda: text_page(f"ok {__version__}\n"),
        "/readyz": readiness.page,
        "/metrics": _metrics_page,
    }
    if demo is not None:
        pages["/demo.json"] = lambda: json_page(demo())
    return Site(pages)


def _metrics_page() -> Page:
    body, content_type = metrics.exposition()
    return Page(200, body, content_type)


@asynccontextmanager
async def running(
    settings: Settings,
    *,
    demo: Demo | None = None,
    handed: Sequence[socket.socket] = (),
    my_turn: Callable[[int], bool] = lambda _: True,
) -> AsyncIterator[Running]:
    """Serve for as long as the block lasts; leaving it says bye to the clients. Raises an OperatorFault.

    It listens on the sockets that it was `handed`, if any, else at `settings.listen`; `my_turn` is for the gateway.
    Everything has proven itself once the block is entered: the schema is current, the listener hears, the log has
    been read, and the port is open.
    """
    dsn = settings.require_dsn()
    packs = chosen_packs(settings)
    opening = partial(connect, dsn, server_settings=SESSION, attempts=1)
    async with AsyncExitStack() as stack:
        pool = await open_pool(
            dsn,
            application_name="rowcast",
            server_settings=SESSION,
            attempts=settings.connect_attempts,
            on_retry=lambda fault, attempt: log.warning("database_retry", reason=str(fault), attempt=attempt),
        )
        stack.push_async_callback(_close, pool)
        schema = Schema(pool, settings)
        try:
            async with lent(pool, LOOK_WITHIN) as connection:
                if await connection.fetchval(query("in_recovery")):
                    raise Standby
            await schema.look()
        except DRIVER_ERRORS as error:
            raise explain(error, address=address_of(dsn)) from None
        if schema.stale:
            raise NotCurrent(schema.stale)

        hub, served = Hub(encode), Served(packs)
        event_log = PgEventLog(pool, settings.transaction_changes)
        recent = Recent(event_log, settings.recent_bytes)
        events, numbers = asyncio.Event(), asyncio.Event()
        pump = Pump(
            event_log,
            numbers,
            hub,
            served,
            recent,
            DeadLetters(pool).bury,
            poll_every=settings.poll_every,
            chunk=settings.read_chunk,
        )
        sequencer = Sequencer(
            partial(opening, application_name="rowcast sequencer", server_settings=SESSION),
            pool,
            events,
            numbers,
            pump.hand,
            most_handed=min(settings.read_chunk, settings.transaction_changes),
            poll_every=settings.poll_every,
            sync=settings.order_commit == "sync",
        )
        doorbell = Doorbell(
            partial(opening, application_name="rowcast listener"),
            {"rowcast": events, "rowcast_log": numbers},
            is_own=sequencer.told,
            beat_every=settings.beat_every,
            beat_limit=settings.beat_limit,
        )
        retention = Retention(
            pool,
            partial(opening, application_name="rowcast retention", server_settings=SESSION | DROPPING),
            sequencer,
            settings.retention,
            recent.forget,
        )
        readiness = Readiness(doorbell, pump, schema)
        limits = Limits(connections=settings.max_clients, deflate_bytes=settings.deflate_bytes)
        desk = Desk(
            hub=hub,
            event_log=recent,
            history=PatientHistory(recent, pump.reads.wait),
            grants=PgGrants(pool, served.schema_of),
            served=served,
            authenticate=Authenticator(settings.require_secret()).verify,
            reached=pump.reached,
            silence=lambda: pump.silence,
            farewells=Farewells(),
            encode=encode,
            clock=time.monotonic,
            heartbeat=settings.heartbeat,
            schema=contract_hash(packs),
            frame_bytes=limits.message_bytes,
            queue_bytes=settings.queue_bytes,
            chunk=settings.read_chunk,
        )
        gateway = Gateway(desk.attend, site(readiness, demo), limits=limits)
        metrics.CLIENTS.set_function(lambda: gateway.connections)
        metrics.SUBSCRIPTIONS.set_function(lambda: hub.subscriptions)
        metrics.RECENT_BYTES.set_function(lambda: recent.size)
        metrics.LOG_POSITION.set_function(lambda: hub.position.seq)
        metrics.BEAT_AGE.set_function(lambda: doorbell.silence)

        tasks = await stack.enter_async_context(_in_background())
        tasks(doorbell.run())
        tasks(sequencer.run())
        tasks(schema.watch())
        tasks(retention.run())
        try:
            async with asyncio.timeout(START_WITHIN):
                await doorbell.listening.wait()
        except TimeoutError:
            raise Deaf from None
        # What was written while no daemon ran is history for whoever connects now: it gets its numbers first.
        await until_ordered(sequencer)
        tasks(pump.run())
        try:
            async with asyncio.timeout(START_WITHIN):
                await pump.started.wait()
        except TimeoutError:
            raise NoLog(pump.failure or "no answer") from None
        own = [] if settings.metrics_listen is None else await bind(*astuple(settings.metrics_listen))
        try:
            sockets = handed or await bind(*astuple(settings.listen))
        except OperatorFault:
            for listening in own:
                listening.close()
            raise
        host, port = await gateway.start(sockets=[*sockets, *own], my_turn=my_turn)
        stack.push_async_callback(gateway.drain, lambda: encode(bye("restart")), within=settings.drain_seconds)
        metrics_url = f"http://{Address(*own[0].getsockname()[:2])}/metrics" if own else None
        yield Running(host, port, pool, readiness, metrics_url)


async def until_ordered(sequencer: Sequencer, within: float = START_WITHIN) -> None:
    """Wait until all that was written has its number, for as long as that takes. Raises Unordered if it fails."""
    while not sequencer.settled.is_set():
        try:
            async with asyncio.timeout(within):
                await sequencer.settled.wait()
        except TimeoutError:
            if sequencer.failure:
                raise Unordered(sequencer.failure) from None
            log.info("catching_up")


@asynccontextmanager
async def _in_background() -> AsyncIterator[Callable[[Coroutine[Any, Any, None]], None]]:
    """Run coroutines beside the block, until it ends. One that fails ends the block, with its error."""
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[None]] = []
        try:
            yield lambda work: tasks.append(group.create_task(work))
        finally:
            for task in tasks:
                task.cancel()


async def _close(pool: Pool) -> None:
    """Let the last statements end, but wait for no peer that is gone."""
    with suppress(TimeoutError, *DRIVER_ERRORS):
        async with asyncio.timeout(CLOSE_WITHIN):
            await pool.close()
    pool.terminate()


async def _show_life(
    manager: systemd.Manager, reasons: Callable[[], Sequence[str]], starts: Callable[[], bool]
) -> None:
    """Feed the watchdog for as long as the loop turns, and say for which reasons the daemon is not ready."""
    interval = manager.watchdog_interval()
    while interval is not None:
        manager.notify(systemd.alive("; ".join(reasons()) or "ready", interval, starts=starts()))
        await asyncio.sleep(interval)


async def serve(
    settings: Settings,
    *,
    demo: Demo | None = None,
    beside: Callable[[Running], Coroutine[Any, Any, None]] | None = None,
    manager: systemd.Manager = systemd,
    my_turn: Callable[[int], bool] = lambda _: True,
) -> None:
    """Serve until SIGTERM or SIGINT; `beside` runs from when the daemon is ready. Raises an OperatorFault.

    `manager` hears how it goes, and may hand sockets over; `my_turn` is for the gateway.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTING)
    stop, ready = asyncio.Event(), asyncio.Event()
    reasons: Callable[[], Sequence[str]] = lambda: ["starting"]  # noqa: E731

    async def life() -> None:
        nonlocal reasons
        async with _in_background() as lasting:
            lasting(_show_life(manager, lambda: reasons(), lambda: not ready.is_set()))  # noqa: PLW0108 - it changes
            opening = running(settings, demo=demo, handed=manager.listen_fds(), my_turn=my_turn)
            async with opening as daemon, _in_background() as tasks:
                ready.set()
                reasons = daemon.readiness.reasons
                places = {"listen": daemon.http_url} | ({"metrics": daemon.metrics_url} if daemon.metrics_url else {})
                log.info("serving", **places, packs=list(settings.packs), version=__version__)
                manager.notify("READY=1")
                if beside is not None:
                    tasks(beside(daemon))
                await stop.wait()
                log.info("stopping")
                manager.notify("STOPPING=1")
        log.info("stopped")

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT))  # a worker begins with both held back
    living, stopping = asyncio.create_task(life()), asyncio.create_task(stop.wait())
    await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not ready.is_set() and not living.done():
        living.cancel()  # it still waits for the database, and there is nobody to say bye to
        with suppress(asyncio.CancelledError):
            await living
        return
    await living
