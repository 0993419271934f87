"""A database, daemons and clients in one process. The test decides when queries return; every frame is checked.

The daemons consist of the real hub, pump, replay, sessions and frames. Their event loop has no clock and no files. It
runs until every task waits, and then the test decides what happens next.

With gateways, the daemons are members: what they publish and answer is real too, and so are the feeds of gateways and
their ports. Only the network is a model: see nats.py.
"""

import asyncio
import json
import selectors
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, TypeVar
from unittest.mock import patch

from pydantic import AfterValidator

from daemon.core.batch import OVERHEAD, Beat, Contents, LogBatch
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.close_history import CloseHistory
from daemon.core.epochs import Epochs
from daemon.core.errors import GrantsUnavailable, LogTruncated, LogUnavailable, RowcastError
from daemon.core.ports import Batch, Grants
from daemon.delivery import feed as feed_module
from daemon.delivery.client import Client as ClientHandler
from daemon.delivery.client import ClientContext
from daemon.delivery.contents import LINGER, Interest
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.replay import RetryingLogReader
from daemon.delivery.rights import Rights
from daemon.delivery.snapshots import Snapshots
from daemon.packs import BigInt, Pack, Row
from daemon.relay.codec import Pull
from daemon.relay.errors import RelayUnavailable
from daemon.relay.remote import RemoteGrants, RemoteLogReader
from tests.support.rows import NoColumns, NoRows
from tests.support.sharing import sharing
from tests.unit.model.client import Client, Violation
from tests.unit.model.designs import Design
from tests.unit.model.nats import ASKING, Message, Nats, Relay
from tests.unit.model.postgres import Entry, Leader, Postgres, is_refused

TOPICS = (Topic("t:a"), Topic("t:b"))
USERS = ("ada", "bob", "eve")
CHUNK = 3
QUEUE_BYTES = 700  # so that a few unread frames make a client slow
RECENT_BYTES = 6 * OVERHEAD
MAX_ROUNDS = 100
T = TypeVar("T")


def _check(version: int) -> int:
    if is_refused(version):
        raise ValueError("refused")
    return version


class Rows(Row):
    id: BigInt
    version: Annotated[int, AfterValidator(_check)]


class Members(Row):
    id: str


PACK = Pack("app", {"rows": Rows, "members": Members, "users": Members}, (r"[tu]:\w+",))


class _UntilIdle(selectors.SelectSelector):
    """A selector that never reports a file, and calls `idle` instead of waiting."""

    idle: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.idle()
        return []


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that stops when every task waits for the world."""

    def __init__(self) -> None:
        selector = _UntilIdle()
        super().__init__(selector)
        selector.idle = self.stop
        self.now = 0.0
        self.errors: list[BaseException] = []
        self.set_exception_handler(
            lambda _, context: self.errors.append(context.get("exception") or _LoopError(context))
        )

    def time(self) -> float:
        return self.now


class _LoopError(Exception):
    """An error that the event loop reports without an exception."""


@dataclass(eq=False)
class Query:
    """A query on its way to Postgres or, once `executed`, its result on the way back."""

    execute: Callable[[], Any]
    failure: RowcastError
    future: "asyncio.Future[Any]"
    executed: bool = False
    result: Any = None
    executed_at: int = 0


class Link:
    """One daemon's link to Postgres. While it is `held`, queries and results wait for `let_through()`."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.held = False
        self.waiting: list[Query] = []
        self._waiters: list[asyncio.Future[None]] = []

    async def query(self, execute: Callable[[], T], failure: RowcastError, executed_at: int | None = None) -> T:
        """The result. With `executed_at`, this is only the way back of a result that was read at that step."""
        if not self.held:
            self._world.since = min(self._world.since, self._world.since if executed_at is None else executed_at)
            return execute()
        query = Query(execute, failure, asyncio.get_running_loop().create_future())
        if executed_at is not None:
            query.executed, query.result, query.executed_at = True, execute(), executed_at
        self.waiting.append(query)
        try:
            return await query.future  # type: ignore[no-any-return]
        finally:
            self.waiting.remove(query)

    async def next_batch(self) -> None:
        """Wait until the next events have been numbered."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def notify_batch(self) -> None:
        """Wake the tasks that wait in `next_batch()`."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def let_through(self, number: int) -> None:
        """Let one query or one result arrive."""
        query = self.waiting[number % len(self.waiting)]
        if not query.executed:
            query.result, query.executed = query.execute(), True
            query.executed_at = self._world.postgres.step
        elif not query.future.done():
            self._world.run(lambda: query.future.set_result(query.result), since=query.executed_at)

    def let_go(self, number: int, *, all_queries: bool) -> None:
        """Let one query or result arrive, or all of them, and hold no more."""
        if all_queries:
            self.held = False
        while self.waiting:
            self.let_through(number)
            if not all_queries:
                break

    def fail(self, *, answered: bool = False) -> None:
        """Fail every query that has not reached Postgres, or all of them."""
        for query in tuple(self.waiting):
            if (answered or not query.executed) and not query.future.done():
                query.future.set_exception(query.failure)


class ModelLog:
    """A LogReader with the same statements as the real one."""

    def __init__(self, postgres: Postgres, link: Link) -> None:
        self._postgres = postgres
        self._query: Callable[[Callable[[], Any]], Awaitable[Any]] = lambda execute: link.query(
            execute, LogUnavailable("gone")
        )

    async def head(self) -> Position:
        found: Position = await self._query(self._postgres.head)
        return found

    async def read(self, after: Seq, limit: int) -> Batch:
        return await self._read(None, limit, after, None)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        batch = await self._read(topics, limit, after, upto)
        if await self._query(lambda: self._postgres.state.floor) > after:
            raise LogTruncated
        return batch

    async def _read(self, topics: Collection[Topic] | None, limit: int, after: int, upto: int | None) -> Batch:
        found = await self._query(lambda: self._rows(self._postgres.entries(after, upto, topics)[:limit]))
        cut = len(found) == limit
        if cut and found[-1][1] > found[-1][0].seq:
            last, end = found[-1][0].seq, found[-1][1]
            found = found + await self._query(lambda: self._rows(self._postgres.entries(last, end, topics)))
        return Batch((change for change, _ in found), more=cut)

    def _rows(self, entries: Sequence[Entry]) -> list[tuple[Change, int]]:
        return [(self._postgres.change(entry), entry.tx_end) for entry in entries]

    async def continuity(self, since: Position) -> str | None:
        reasons = await self._query(lambda: self._postgres.reasons(since))
        return next(iter(reasons), None)


class ModelGrants:
    """The Grants of the model."""

    def __init__(self, daemon: "Daemon", link: Link) -> None:
        self._daemon = daemon
        self._link = link

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        asking = ASKING.get() or self._daemon
        while True:
            right, granted, pending = await self._link.query(
                lambda: self._look_up(asking, user, topic), GrantsUnavailable("gone")
            )
            if not right:
                return None
            if not pending:
                return Seq(granted)
            await self._link.next_batch()

    def _look_up(self, asking: "Node", user: str, topic: Topic) -> tuple[int, int, bool]:
        postgres = self._daemon.world.postgres
        right, (granted, pending) = postgres.may_read(user, topic), postgres.readable_from(user, topic)
        connection = asking.connections.get(user)
        if right and connection is not None:
            connection.rights[topic] = right
        return right, granted, pending


@dataclass(frozen=True)
class _Claims:
    user: str
    expires: float = float("inf")


class Connection:
    """A connection: a Socket for the daemon, a `client.Connection` for the client. It checks every frame."""

    outlet = None

    def __init__(self, daemon: "Node", user: str) -> None:
        self.daemon = daemon
        self.user = user
        self.session = user
        self.inbox: deque[dict[str, Any]] = deque()
        self.rights: dict[Topic, int] = {}  # the right by which each topic was allowed
        self.closed = False
        self.lost = False
        self.handler: ClientHandler | None = None
        self._last_positions: dict[Topic, Position] = {}
        self._transactions: dict[Topic, set[str]] = {}
        self._since: Position | None = None
        self._seen: Position | None = None
        self._first_discontinuity = daemon.hub.discontinuity.number
        self._explained: dict[Topic, int] = {}
        self._truncated_at: Position | None = None
        self._drains: list[tuple[asyncio.Future[None], int]] = []

    # For the client.

    @property
    def finished(self) -> bool:
        return self.closed and not self.inbox

    def send(self, **frame: Any) -> None:
        if not self.lost and not self.closed:
            if frame.get("since"):
                self._since = Position.parse(frame["since"])
                self._seen = Position.parse(frame["seen"]) if "seen" in frame else None
            text = json.dumps(frame).encode()
            self.daemon.world.run(lambda: self.require_handler().message_received(text))

    def cut(self) -> None:
        self.inbox.clear()
        self.closed = True
        self.daemon.world.run(self.disconnect)

    def read(self) -> None:
        """Resume the server's writing if the inbox has become short enough."""
        while self._drains and self.queued() <= QUEUE_BYTES // 2:
            future, since = self._drains.pop(0)
            if not future.done():
                self.daemon.world.run(partial(future.set_result, None), since=since)

    # For the daemon.

    def require_handler(self) -> ClientHandler:
        assert self.handler is not None
        return self.handler

    def disconnect(self) -> None:
        if not self.lost:
            self.lost = True
            for future, _ in self._drains:
                if not future.done():
                    future.set_result(None)
            self.require_handler().connection_lost(None)
            self.daemon.connections.pop(self.user, None)

    def write(self, frames: bytes) -> int:
        for text in frames.splitlines():
            if not self.closed:
                frame = json.loads(text)
                try:
                    self._check(frame)
                except Violation as violation:  # raised here, it would reach the code that writes
                    self.daemon.world.violations.append(violation)
                self.inbox.append(frame)
        return self.queued()

    def queued(self) -> int:
        return 0 if self.lost else sum(len(str(frame)) for frame in self.inbox)

    async def drained(self) -> None:
        if self.queued() > QUEUE_BYTES // 2:
            future = asyncio.get_running_loop().create_future()
            self._drains.append((future, self.daemon.world.since))
            await future

    def authenticated(self, user: str) -> None:
        """There is always a place."""

    def charge(self, frames: int) -> None:
        """There is no rate."""

    def spend(self, seconds: float) -> None:
        """There is no share."""

    def lend(self, seconds: float) -> None:
        """There is no end to what it may take in advance."""

    def has_credit(self) -> bool:
        return True

    def delay(self) -> float:
        return 0.0

    def close(self, code: int, reason: str) -> None:
        if code == 1011:
            self.daemon.world.violations.append(Violation("I7", f"the daemon failed: {reason}"))
        self.closed = True

    # The checks of every frame.

    def _check(self, frame: dict[str, Any]) -> None:
        topic = Topic(frame.get("topic", ""))
        match frame["op"]:
            case "subscribed":
                self._last_positions[topic] = Position.parse(frame["pos"])
                self._transactions[topic] = set()
            case "reset":
                self._check_reset(topic, frame["reason"], Position.parse(frame["pos"]))
                self._last_positions[topic] = Position.parse(frame["pos"])
                self._transactions[topic] = set()
            case "changes":
                self._check_transactions(topic, {change["tx"] for change in frame["changes"]})
                for change in frame["changes"]:
                    self._check_change(topic, Position(Position.parse(frame["pos"]).epoch, change["seq"]), change)

    def _check_transactions(self, topic: Topic, ids: set[str]) -> None:
        if repeated := ids & self._transactions.setdefault(topic, set()):
            raise Violation(
                "atomic", f"{self.user} receives the transactions {repeated} in {topic} in several frames"
            )
        self._transactions[topic] |= ids

    def _check_change(self, topic: Topic, position: Position, change: dict[str, Any]) -> None:
        world, uid = self.daemon.world, int(change["at"])
        last = self._last_positions.get(topic)
        received = f"{self.user} receives {position} ({change['kind']} {change['key']}) in {topic}"
        if last is None:
            raise Violation("I1", f"{received}, and is not subscribed")
        if last.epoch == position.epoch and last.seq >= position.seq:
            raise Violation("I1", f"{received} after {last}")
        self._last_positions[topic] = position
        if world.uids.setdefault(position, uid) != uid:
            raise Violation("I1", f"{received}, a number of another event")
        if uid not in world.postgres.ever_committed:
            raise Violation("I5", f"{received}, which was never committed")
        self._check_right(received, topic, position)
        if "record" in change:
            self._check_content(received, position, uid)

    def _check_right(self, received: str, topic: Topic, position: Position) -> None:
        world, right = self.daemon.world, self.rights[topic]
        granted = world.granted_at(right)
        if granted > position.seq:
            raise Violation("I4", f"{received}, the right to which began at {granted}")
        for entry in world.postgres.state.log:
            event = entry.event
            ends = event.ends and event.ends.user in (None, self.user) and event.ends.topic in (None, topic)
            if ends and event.right >= right and entry.seq <= position.seq:
                raise Violation("I4", f"{received}, the right to which ended at {entry.seq}")

    def _check_content(self, received: str, position: Position, uid: int) -> None:
        for entry in self.daemon.world.postgres.state.log:
            if entry.event.uid == uid and entry.seq == position.seq:
                tombstone = self.daemon.world.postgres.tombstone(entry)
                if tombstone is None or tombstone.seq > self.daemon.hub.position.seq:
                    continue  # the log cache is only as new as the hub
                if tombstone.at < self.daemon.world.since:
                    raise Violation(
                        "I4", f"{received}, content of a row whose deletion at {tombstone.seq} was recorded"
                    )

    def _beginnings(self, topic: Topic, epoch: str) -> set[int]:
        """The numbers at which the right to the topic has begun, also if a crash has taken them back unnoticed."""
        world, right = self.daemon.world, self.rights[topic]
        ever = {seq: event for (at, seq), event in world.postgres.numbered.items() if at == epoch}
        began = [seq for seq, event in ever.items() if event.begins and event.right == right]
        first = [min(other for other in ever if ever[other].xid == ever[seq].xid) for seq in began]
        return {world.granted_at(right), *first}

    def _check_reset(self, topic: Topic, reason: str, position: Position) -> None:
        postgres, hub = self.daemon.world.postgres, self.daemon.hub
        here = [entry.event for entry in postgres.state.log if entry.seq == position.seq]
        here += filter(None, [postgres.numbered.get(position)])
        if any(event.kind == reason for event in here):
            return
        if reason == Kind.INVALID and any(event.is_invalid and event.topic == topic for event in here):
            return
        if reason == "rights":
            if (
                self._since is not None
                and self._since.seq < position.seq
                and position.seq + 1 in self._beginnings(topic, position.epoch)
            ):
                return
            raise Violation(
                "I6", f"{self.user} gets a reset of {topic} for a right that does not begin after {position}"
            )
        positions = [self._since] if self._since is not None and self._last_positions.get(topic) == position else []
        if positions and self._seen is not None:
            positions.append(self._seen)
        if reason == "retention":
            # The log may be dropped during a replay, which resets all of its topics.
            positions += self._last_positions.values()
        if (
            hub.position_before_move is not None
            and self._explained.get(topic, self._first_discontinuity) < hub.discontinuity.number
        ):
            positions.append(hub.position_before_move)
        self._explained[topic] = hub.discontinuity.number
        if reason == "retention" and position == self._truncated_at:
            return  # the replay resets all of its topics, and this is not the first one
        if reason == "retention":
            self._truncated_at = position
        if not any(reason in postgres.reasons(one) for one in positions):
            raise Violation("I6", f"{self.user} gets a reset of {topic} ({reason} at {position}) for no reason")


class Node:
    """One process that serves clients."""

    task: "asyncio.Task[None]"
    live: Live

    def __init__(self, world: "World") -> None:
        self.world = world
        self.connections: dict[str, Connection] = {}
        self.link = Link(world)
        self.router = world.design.router({"app": PACK})
        self.hub = world.design.hub(lambda payload: payload + b"\n", self.router.with_exact_numbers)

    def _serve(self, log_cache: LogCache, grants: Grants, until_readable: Callable[[], Awaitable[object]]) -> Live:
        """Make what clients need, for a log that is read through this cache."""
        world, hub = self.world, self.hub
        live = self.live = Live(hub, self.router, log_cache)
        wait_until_delivered = live.wait_until_delivered if world.design.waits_until_delivered else _at_once
        self.context = ClientContext(
            hub=hub,
            log_reader=log_cache,
            replay_reader=RetryingLogReader(log_cache, until_readable),
            rights=Rights(hub, grants, wait_until_delivered),
            snapshots=Snapshots(NoRows(), hub, self.router, lambda payload: payload + b"\n", wait_until_delivered),
            columns=NoColumns(),
            **sharing(hub),
            router=self.router,
            authenticate=_Claims,
            wait_until_delivered=wait_until_delivered,
            encode=lambda payload: payload + b"\n",
            delivery_age=lambda: 0.0,
            close_history=CloseHistory(),
            clock=lambda: world.now,
            heartbeat=20.0,
            schema=lambda: "model",
            max_topics=128,
            frame_bytes=65536,
            queue_bytes=QUEUE_BYTES,
            chunk=CHUNK,
        )
        return live

    def accept(self, user: str) -> Connection:
        connection = Connection(self, user)
        connection.handler = self.world.design.client(self.context, connection)
        self.connections[user] = connection
        return connection

    def wake(self) -> None:
        """Let it know what there is to know of the log."""
        raise NotImplementedError

    def tick(self) -> None:
        """Let time pass until the next heartbeat."""
        self.world.now += 100.0
        for connection in tuple(self.connections.values()):
            self.world.run(partial(connection.require_handler().tick, self.world.now))

    def kill(self) -> None:
        """Kill the process. Clients still receive the frames that it has written."""
        for connection in tuple(self.connections.values()):
            connection.closed = True
            self.world.run(connection.disconnect)
        self.task.cancel()
        self.world.run()


class Daemon(Node):
    """One daemon process, with a database: a member, if there are gateways."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self.wakeup = asyncio.Event()
        log_reader = ModelLog(world.postgres, self.link)
        grants = ModelGrants(self, self.link)
        live = self._serve(LogCache(log_reader, RECENT_BYTES), grants, lambda: self.pump.readable.wait())  # noqa: PLW0108 - not made yet
        self.pump = world.design.pump(log_reader, self.wakeup, live, _store_dead_letters, chunk=CHUNK)
        self.relay = Relay(
            world.nats, live, log_reader, grants, lambda: world.postgres.step, by_topic=world.design.by_topic
        )
        self.task = world.loop.create_task(self.pump.run())
        world.run()

    def wake(self) -> None:
        """Notify the daemon that the log has grown."""
        self.world.run(self.wakeup.set)

    def kill(self) -> None:
        super().kill()
        self.link.fail(answered=True)  # who has asked this member hears that it has gone
        self.world.run()


class Gateway(Node):
    """One gateway process, without a database. `asked` is the number of the member that it asks."""

    def __init__(self, world: "World") -> None:
        super().__init__(world)
        self.asked = 0
        self.fate = "told"  # of messages to it
        self.arriving: list[Message] = []  # what is late
        reader = RemoteLogReader(self._ask, lambda: self.hub.position)
        self.later = 0.0  # seconds for which topics have lingered
        self.interest = self.hub.interest = Interest(lambda: self.later)
        cache = LogCache(reader, RECENT_BYTES)
        cache.covers = self.interest.covers
        live = self._serve(cache, RemoteGrants(self._ask, reader.epoch), lambda: self.feed.readable.wait())  # noqa: PLW0108 - not made yet
        self.feed = world.design.feed(reader, live, _no_own_tables, self.interest, Epochs())
        self.task = world.loop.create_task(self.feed.run())

    def kill(self) -> None:
        super().kill()
        self.link.fail(answered=True)  # nobody is left who waits
        self.world.run()

    def receive(self, message: Message) -> None:
        """A message has arrived, as those of one connection do: one after the other."""
        match message:
            case Beat():
                self.feed.record_beat(message)
            case Contents():
                self.feed.receive_contents(message)
            case LogBatch():
                self.feed.receive(message)
            case Pull():
                self.feed.receive(None)

    def end_lingering(self) -> None:
        """Topics that nobody has followed for a while are not wanted any more."""
        self.later += LINGER + 1
        self.interest.sweep()

    def arrive(self, place: int, *, again: bool = False) -> None:
        """Let a late message arrive, which may come again later."""
        if self.arriving:
            message = self.arriving[place % len(self.arriving)]
            if not again:
                self.arriving.remove(message)
            self.world.run(partial(self.receive, message))

    def wake(self) -> None:
        """Let everything arrive that is late, and what members have to say after it."""
        self.world.wake_all()
        while self.arriving:
            self.arrive(0)

    async def _ask(self, question: str, payload: bytes) -> bytes:
        """Ask a member. The question is held up on its way there or back while the link is."""
        cut_off = RelayUnavailable("cut off")
        await self.link.query(lambda: None, cut_off)
        member = self.world.daemons[self.asked % len(self.world.daemons)]
        ASKING.set(self)
        answer = await member.relay.service.answer(question, payload)
        return await self.link.query(lambda: answer, cut_off, min(self.world.since, member.relay.reached_at))


async def _no_own_tables() -> None:
    """There are none to look for."""


async def _store_dead_letters(dead_letters: object) -> None:
    """Discard dead letters: nothing in this model reads them."""


async def _at_once(seq: Seq) -> None:
    """Return at once."""


class World:
    """The database, daemons and clients, and what tests do to them. After each method, all tasks wait."""

    def __init__(self, design: Design, daemons: int = 2, gateways: int = 0) -> None:
        self.design = design
        self.loop = _Loop()
        self.now = 0.0
        self.since = 0  # every result that is in use was read at this step or later
        self.violations: list[Violation] = []
        self.uids: dict[Position, int] = {}
        self.postgres = Postgres(design.select_new, design.term_gap, hides_deleted=design.hides_deleted)
        self.leader: Leader | None = None
        self.leading: Daemon | None = None  # None: a daemon without clients leads
        self.daemons: list[Daemon] = []
        self.gateways: list[Gateway] = []
        self.nats = Nats(self.gateways, self.loop.call_soon)
        self._patched_time = patch.object(feed_module, "time", SimpleNamespace(monotonic=self.loop.time))
        self._patched_time.start()
        self.elect()
        self.daemons += [Daemon(self) for _ in range(daemons)]
        self.gateways += [Gateway(self) for _ in range(gateways)]
        self._let_gateways_begin()
        self.clients = [Client(user, self.read_state) for user in USERS]

    def run(self, first: Callable[[], object] | None = None, *, since: int | None = None) -> None:
        """Call `first`, and run until every task waits. Results that this uses were read at step `since` or later."""
        self.postgres.step += 1
        self.since = self.postgres.step if since is None else since
        if first is not None:
            self.loop.call_soon(first)
        self.loop.run_forever()
        for node in self.nodes:
            for connection in [connection for connection in node.connections.values() if connection.closed]:
                self.loop.call_soon(connection.disconnect)
                self.loop.run_forever()
        for error in (*self.loop.errors, *self.violations):
            raise error
        for node in self.nodes:
            if node.task.done():
                node.task.result()

    @property
    def nodes(self) -> list[Node]:
        """Every process that serves clients."""
        return [*self.daemons, *self.gateways]

    def close(self) -> None:
        self._patched_time.stop()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_forever()
        self.loop.close()

    def read_state(self, topic: Topic) -> tuple[dict[int, int], object]:
        """The rows of a topic that the application would return now, and the state they are from."""
        state = self.postgres.state
        return {
            row: stored.version
            for row, stored in state.rows.items()
            if stored.topic == topic and stored.exists and not stored.deleted
        }, state

    # The sequencer.

    def elect(self, *, next_segment: bool = False, unnoticed: bool = False) -> None:
        """Begin a new term, in this segment or the next; another process leads.

        If that is `unnoticed`, those who have led so far go on telling the gateways what they read of the log.
        """
        self.leader = self.postgres.open_term(next_segment=next_segment)
        leaders = (*self.daemons, None)
        self.leading = leaders[self.postgres.state.terms[-1].term % len(leaders)]
        for daemon in self.daemons:
            daemon.relay.is_leading = daemon is self.leading or (unnoticed and daemon.relay.is_leading)

    def number(self) -> None:
        """Number the new events, after an election if there is no leader."""
        self.postgres.step += 1
        if self.leader is None:
            self.elect()
        assert self.leader is not None
        before = self.leader.last_seq
        changes = self.postgres.number(self.leader)
        if changes and self.leading is not None:
            self.run(partial(self.leading.pump.offer, Seq(before), changes))
        for daemon in self.daemons:
            self.run(daemon.link.notify_batch)

    def wake_all(self) -> None:
        for daemon in self.daemons:
            daemon.wake()

    def beat(self) -> None:
        """Every member says how far it is."""
        for daemon in self.daemons:
            self.run(daemon.relay.beat)

    def granted_at(self, right: int) -> int:
        """The number at which a right began, the first of its transaction; 0 if the log does not have it."""
        log = self.postgres.state.log
        xid = next((entry.event.xid for entry in log if entry.event.begins and entry.event.right == right), None)
        return next((entry.seq for entry in log if entry.event.xid == xid), 0)

    def drop_segments(self) -> None:
        """Drop the closed segments, and notify every daemon. No message is late by as long as the retention."""
        self.postgres.drop_segments()
        for daemon in self.daemons:
            daemon.live.forget(Seq(self.postgres.state.floor))
        for gateway in self.gateways:
            gateway.arriving.clear()
            for daemon in self.daemons:
                self.run(partial(gateway.receive, daemon.relay.message()))

    # Clients.

    def connect(self, client: Client, node: Node) -> None:
        """Connect a client to this node, instead of the one that it is connected to."""
        client.cut()
        if not isinstance(node, Gateway) or node.feed.started.is_set():
            client.connect(node.accept(client.user))

    def receive(self, client: Client, limit: int = 1_000_000) -> int:
        """Let a client read up to `limit` frames, and try again what failed before; return their number."""
        if client.connection is not None:
            client.retry()
        count = 0
        while count < limit and client.receive(1):
            count += 1
            if isinstance(client.connection, Connection):
                client.connection.read()
        return count

    def pass_time(self) -> None:
        """Let two seconds pass, longer than the pump's polling interval."""
        self.loop.now += 2.0
        self.run()

    def subscribe(self, client: Client, topic: Topic) -> None:
        if topic not in client.wanted:
            client.wanted.append(topic)
        if client.connection is not None and topic not in client.topics:
            client.subscribe(topic)

    # Faults.

    def _disconnect_postgres(self) -> None:
        """Break every connection to Postgres: there is no leader, and queries fail."""
        self.leader = None
        for daemon in self.daemons:
            self.run(daemon.link.fail)

    def crash(self, lost: int) -> None:
        """Kill Postgres and restart it."""
        self.postgres.crash(lost)
        self._disconnect_postgres()

    def fail_over(self, lost: int) -> None:
        """Let a standby take over, which has every term."""
        self.postgres.fail_over(lost)
        self._disconnect_postgres()

    def restart(self, number: int) -> None:
        """Kill a daemon and start another in its place."""
        killed = self.daemons.pop(number)
        killed.kill()
        if killed is self.leading:
            self.leader = None
        self.daemons.insert(number, Daemon(self))

    def restart_gateway(self, number: int) -> None:
        """Kill a gateway and start another in its place."""
        self.gateways.pop(number).kill()
        self.gateways.insert(number, Gateway(self))
        self._let_gateways_begin()

    def _let_gateways_begin(self) -> None:
        """Gateways listen for a while before they choose an epoch."""
        if self.gateways:
            self.beat()
            self.pass_time()

    # The end of a history.

    def rest(self) -> None:
        """Undo all faults, commit all transactions, deliver everything, and check what the clients received."""
        for node in self.nodes:
            node.link.held = False
        for gateway in self.gateways:
            gateway.fate = "told"
        for daemon in self.daemons:
            daemon.relay.line.cut_off = False
        for tx in tuple(self.postgres.open):
            self.postgres.commit(tx)
        self.elect()
        for _ in range(2):
            self._write_everywhere()
            self._settle()
        self._check_at_rest()

    def _write_everywhere(self) -> None:
        for row, topic in enumerate(TOPICS, 100):
            tx = self.postgres.begin()
            self.postgres.write(tx, row, topic)
            self.postgres.commit(tx)

    def _settle(self) -> None:
        """Run until nothing is left to read, to query or to send."""
        self.number()
        busy, rounds = True, 0
        while busy:
            busy, rounds = False, rounds + 1
            self.pass_time()
            if rounds > MAX_ROUNDS:
                where = [*(str(node.hub.position) for node in self.nodes), str(self.postgres.head())]
                raise Violation("I7", f"the system never comes to rest: {', '.join(where)}")
            for node in self.nodes:
                while node.link.waiting:
                    node.link.let_through(0)
                node.wake()
            self.beat()
            busy |= any(gateway.hub.position != self.postgres.head() for gateway in self.gateways)
            for number, client in enumerate(self.clients):
                if client.connection is None:
                    self.connect(
                        client, self.nodes[-1 - number % len(self.nodes)] if self.gateways else self.nodes[0]
                    )
                    busy = True
                if client.connection is None:
                    continue
                assert isinstance(client.connection, Connection)
                busy |= self.receive(client) > 0 or client.connection is None or bool(client.refused)
                if client.connection is None:
                    continue
                for topic in client.wanted:
                    if topic not in client.topics and self.postgres.state.rights.get((client.user, topic)):
                        client.subscribe(topic)
                        busy = True
        for node in self.nodes:
            node.tick()
        for client in self.clients:
            self.receive(client)

    def _check_at_rest(self) -> None:
        for client in self.clients:
            for topic in client.wanted:
                allowed = bool(self.postgres.state.rights.get((client.user, topic)))
                assert isinstance(client.connection, Connection)
                if allowed != (topic in client.topics):
                    raise Violation("I7", f"{client.user} should follow {topic}: {allowed}")
            if client.pending:
                raise Violation("I7", f"{client.user} waits forever")
            for topic, subscription in client.topics.items():
                self._check_received(client.user, topic, subscription)
        self._check_one_order()

    def _check_received(self, user: str, topic: Topic, subscription: Any) -> None:
        received = [one.uid for one in subscription.received]
        events = {event.uid: event for event in self.postgres.state.events}
        for uid in received:
            if uid not in events:
                raise Violation("I5", f"{user} received event {uid} in {topic}, which was undone, and no reset")
        versions: dict[object, int] = {}
        for event in map(events.__getitem__, received):
            if event.table == "rows":
                if versions.get(event.key, 0) >= event.version:
                    raise Violation(
                        "I2", f"{user} received version {event.version} of {event.key} in {topic} too late"
                    )
                versions[event.key] = event.version
        expected = [
            entry
            for entry in self.postgres.state.log
            if entry.seq > subscription.base.seq
            and entry.event.topic == topic
            and not self.postgres.is_hidden(entry)
            and not entry.event.is_invalid
        ]
        for entry in expected:
            if entry.event.uid not in received:
                raise Violation("I7", f"{user} never received {entry.seq} in {topic}")
        # Changes cannot correct a state that the application returned and a crash undid.
        survived = any(state is subscription.read_from for state in self.postgres.history)
        rows, _ = self.read_state(topic)
        if survived and subscription.state != rows:
            raise Violation("I7", f"{user} has {subscription.state} for {topic}, which is {rows}")

    def _check_one_order(self) -> None:
        for topic in TOPICS:
            orders = [[one.uid for one in c.topics[topic].received] for c in self.clients if topic in c.topics]
            for number, one in enumerate(orders):
                for other in orders[:number]:
                    common = set(one) & set(other)
                    if [uid for uid in one if uid in common] != [uid for uid in other if uid in common]:
                        raise Violation("I3", f"two clients received {topic} in different orders")
