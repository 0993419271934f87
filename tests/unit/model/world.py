"""A database, daemons and clients in one process: answers come when the test lets them, and every frame is checked.

The daemons are made of the real hub, pump, replay, sessions and frames. They run on an event loop of their own that
knows no time and no files: it runs until nothing can go on, and then the test decides what happens next.
"""

import asyncio
import json
import selectors
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.close_history import CloseHistory
from daemon.core.errors import GrantsUnavailable, LogTruncated, LogUnavailable, RowcastError
from daemon.core.ports import Batch
from daemon.delivery.client import Client as ClientHandler
from daemon.delivery.client import ClientContext
from daemon.delivery.log_cache import OVERHEAD, LogCache
from daemon.delivery.replay import RetryingLogReader
from daemon.delivery.rights import Rights
from daemon.packs import Pack, Row
from tests.unit.model.client import Client, Violation
from tests.unit.model.designs import Design
from tests.unit.model.postgres import Entry, Leader, Postgres

TOPICS = (Topic("t:a"), Topic("t:b"))
USERS = ("ada", "bob", "eve")
CHUNK = 3
QUEUE_BYTES = 700  # more than a few frames that wait to be read make a client slow
RECENT_BYTES = 6 * OVERHEAD
MAX_ROUNDS = 100
T = TypeVar("T")


class Rows(Row):
    id: int
    version: int


class Members(Row):
    id: str


PACK = Pack("app", {"rows": Rows, "members": Members, "users": Members}, (r"[tu]:\w+",))


class _UntilIdle(selectors.SelectSelector):
    """Reports no file, and calls `idle` instead of waiting."""

    idle: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.idle()
        return []


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that stops when nothing can go on without the world."""

    def __init__(self) -> None:
        selector = _UntilIdle()
        super().__init__(selector)
        selector.idle = self.stop
        self.now = 0.0
        self.errors: list[BaseException] = []
        self.set_exception_handler(lambda _, context: self.errors.append(context.get("exception") or _Odd(context)))

    def time(self) -> float:
        return self.now


class _Odd(Exception):
    pass


@dataclass(eq=False)
class Question:
    """A statement on its way to Postgres (`answered` is false), or its answer on the way back."""

    ask: Callable[[], Any]
    failure: RowcastError
    future: "asyncio.Future[Any]"
    answered: bool = False
    answer: Any = None
    asked_at: int = 0


class Link:
    """Between one daemon and Postgres: while it is `held`, each statement and each answer waits to be let through."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self.held = False
        self.waiting: list[Question] = []
        self._waiters: list[asyncio.Future[None]] = []

    async def ask(self, ask: Callable[[], T], failure: RowcastError) -> T:
        if not self.held:
            return ask()
        question = Question(ask, failure, asyncio.get_running_loop().create_future())
        self.waiting.append(question)
        try:
            return await question.future  # type: ignore[no-any-return]
        finally:
            self.waiting.remove(question)

    async def next_batch(self) -> None:
        """Wait a little: until something has been numbered."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def batch(self) -> None:
        """Something has been numbered."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def let_through(self, number: int) -> None:
        """Let one statement arrive, or one answer."""
        question = self.waiting[number % len(self.waiting)]
        if not question.answered:
            question.answer, question.answered = question.ask(), True
            question.asked_at = self._world.postgres.step
        elif not question.future.done():
            self._world.run(lambda: question.future.set_result(question.answer), since=question.asked_at)

    def break_down(self) -> None:
        """Postgres is gone: what did not arrive fails."""
        for question in tuple(self.waiting):
            if not question.answered and not question.future.done():
                question.future.set_exception(question.failure)


class ModelLog:
    """The LogReader port, statement for statement like the real one."""

    def __init__(self, postgres: Postgres, link: Link) -> None:
        self._postgres = postgres
        self._ask: Callable[[Callable[[], Any]], Awaitable[Any]] = lambda ask: link.ask(ask, LogUnavailable("gone"))

    async def head(self) -> Position:
        found: Position = await self._ask(self._postgres.head)
        return found

    async def read(self, after: Seq, limit: int) -> Sequence[Change]:
        return await self._read(None, limit, after, None)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        changes = await self._read(topics, limit, after, upto)
        if await self._ask(lambda: self._postgres.state.floor) > after:
            raise LogTruncated
        return Batch(changes)

    async def _read(self, topics: Collection[Topic] | None, limit: int, after: int, upto: int | None) -> list[Change]:
        found = await self._ask(lambda: self._rows(self._postgres.entries(after, upto, topics)[:limit]))
        if len(found) == limit and found[-1][1] > found[-1][0].seq:
            cut, end = found[-1][0].seq, found[-1][1]
            found = found + await self._ask(lambda: self._rows(self._postgres.entries(cut, end, topics)))
        return [change for change, _ in found]

    def _rows(self, entries: Sequence[Entry]) -> list[tuple[Change, int]]:
        return [(self._postgres.change(entry), entry.tx_end) for entry in entries]

    async def continuity(self, since: Position) -> str | None:
        reasons = await self._ask(lambda: self._postgres.reasons(since))
        return next(iter(reasons), None)


class ModelGrants:
    """The Grants port."""

    def __init__(self, daemon: "Daemon", link: Link) -> None:
        self._daemon = daemon
        self._link = link

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        while True:
            right, begun, pending = await self._link.ask(
                lambda: self._look_up(user, topic), GrantsUnavailable("gone")
            )
            if not right:
                return None
            if not pending:
                return Seq(begun)
            await self._link.next_batch()

    def _look_up(self, user: str, topic: Topic) -> tuple[int, int, bool]:
        postgres = self._daemon.world.postgres
        right, (begun, pending) = postgres.may_read(user, topic), postgres.readable_from(user, topic)
        line = self._daemon.lines.get(user)
        if right and line is not None:
            line.rights[topic] = right
        return right, begun, pending


@dataclass(frozen=True)
class _Claims:
    user: str
    expires: float = float("inf")


class Line:
    """A connection: the gateway's Socket on one side, a client's line on the other. Watches what is said on it."""

    def __init__(self, daemon: "Daemon", user: str) -> None:
        self.daemon = daemon
        self.user = user
        self.session = user
        self.inbox: deque[dict[str, Any]] = deque()
        self.rights: dict[Topic, int] = {}  # by which right a topic was allowed
        self.closed = False
        self.gone = False
        self.handler: ClientHandler | None = None
        self._last_positions: dict[Topic, Position] = {}
        self._transactions: dict[Topic, set[str]] = {}
        self._since: Position | None = None
        self._seen: Position | None = None
        self._breaks = daemon.hub.discontinuity.number
        self._explained: dict[Topic, int] = {}
        self._drains: list[tuple[asyncio.Future[None], int]] = []

    # What the client does.

    @property
    def over(self) -> bool:
        return self.closed and not self.inbox

    def send(self, **frame: Any) -> None:
        if not self.gone and not self.closed:
            if frame.get("since"):
                self._since = Position.parse(frame["since"])
                self._seen = Position.parse(frame["seen"]) if "seen" in frame else None
            text = json.dumps(frame).encode()
            self.daemon.world.run(lambda: self.require_handler().message_received(text))

    def cut(self) -> None:
        self.inbox.clear()
        self.closed = True
        self.daemon.world.run(self.end)

    def read(self) -> None:
        """Something was taken out of the inbox: maybe the server may write more."""
        while self._drains and self.queued() <= QUEUE_BYTES // 2:
            future, since = self._drains.pop(0)
            if not future.done():
                self.daemon.world.run(partial(future.set_result, None), since=since)

    # What the gateway does.

    def require_handler(self) -> ClientHandler:
        assert self.handler is not None
        return self.handler

    def end(self) -> None:
        if not self.gone:
            self.gone = True
            for future, _ in self._drains:
                if not future.done():
                    future.set_result(None)
            self.require_handler().connection_lost(None)
            self.daemon.lines.pop(self.user, None)

    def write(self, frames: bytes) -> int:
        for line in frames.splitlines():
            if not self.closed:
                frame = json.loads(line)
                try:
                    self._check(frame)
                except Violation as violation:  # whoever is writing would take it for its own mistake
                    self.daemon.world.violations.append(violation)
                self.inbox.append(frame)
        return self.queued()

    def queued(self) -> int:
        return 0 if self.gone else sum(len(str(frame)) for frame in self.inbox)

    async def drained(self) -> None:
        if self.queued() > QUEUE_BYTES // 2:
            future = asyncio.get_running_loop().create_future()
            self._drains.append((future, self.daemon.world.since))
            await future

    def close(self, code: int, reason: str) -> None:
        if code == 1011:
            self.daemon.world.violations.append(Violation("I7", f"the daemon failed: {reason}"))
        self.closed = True

    # What must hold of every frame.

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

    def _check_transactions(self, topic: Topic, these: set[str]) -> None:
        if repeated := these & self._transactions.setdefault(topic, set()):
            raise Violation(
                "whole", f"{self.user} is told of the transactions {repeated} in {topic} in several frames"
            )
        self._transactions[topic] |= these

    def _check_change(self, topic: Topic, place: Position, change: dict[str, Any]) -> None:
        world, uid = self.daemon.world, int(change["at"])
        last = self._last_positions.get(topic)
        what = f"{self.user} is told {place} ({change['kind']} {change['key']}) in {topic}"
        if last is None:
            raise Violation("I1", f"{what}, and does not follow it")
        if last.epoch == place.epoch and last.seq >= place.seq:
            raise Violation("I1", f"{what} behind {last}")
        self._last_positions[topic] = place
        if world.names.setdefault(place, uid) != uid:
            raise Violation("I1", f"{what}, a number that was another event's")
        if uid not in world.postgres.ever_committed:
            raise Violation("I5", f"{what}, which was never committed")
        self._check_right(what, topic, place)
        if "record" in change:
            self._check_content(what, place, uid)

    def _check_right(self, what: str, topic: Topic, place: Position) -> None:
        world, right = self.daemon.world, self.rights[topic]
        begun = world.begun(right)
        if begun > place.seq:
            raise Violation("I4", f"{what}, the right to which began at {begun}")
        for entry in world.postgres.state.log:
            event = entry.event
            ends = event.ends and event.ends.user in (None, self.user) and event.ends.topic in (None, topic)
            if ends and event.right >= right and entry.seq <= place.seq:
                raise Violation("I4", f"{what}, the right to which ended at {entry.seq}")

    def _check_content(self, what: str, place: Position, uid: int) -> None:
        for entry in self.daemon.world.postgres.state.log:
            if entry.event.uid == uid and entry.seq == place.seq:
                tombstone = self.daemon.world.postgres.tombstone(entry)
                if tombstone is None or tombstone.seq > self.daemon.hub.position.seq:
                    continue  # what is held in memory is as new as the hub
                if tombstone.at < self.daemon.world.since:
                    raise Violation("I4", f"{what}, content of a row whose deletion at {tombstone.seq} is on record")

    def _check_reset(self, topic: Topic, reason: str, place: Position) -> None:
        postgres, hub = self.daemon.world.postgres, self.daemon.hub
        if reason in (Kind.TRUNCATE, Kind.LOST):
            here = [entry.event for entry in postgres.state.log if entry.seq == place.seq]
            if any(event.kind == reason for event in (*here, *filter(None, [postgres.numbered.get(place)]))):
                return
        if reason == "rights":
            if (
                self._since is not None
                and self._since.seq < place.seq == self.daemon.world.begun(self.rights[topic]) - 1
            ):
                return
            raise Violation("I6", f"{self.user} is told that its right to {topic} began behind {place}")
        asked = [self._since] if self._since is not None and self._last_positions.get(topic) == place else []
        if asked and self._seen is not None:
            asked.append(self._seen)
        if reason == "retention":
            # What is still to be replayed may be dropped, and all of it begins anew.
            asked += self._last_positions.values()
        if hub.left is not None and self._explained.get(topic, self._breaks) < hub.discontinuity.number:
            asked.append(hub.left)
        self._explained[topic] = hub.discontinuity.number
        if not any(reason in postgres.reasons(position) for position in asked):
            raise Violation("I6", f"{self.user} is told that {topic} is reset ({reason} at {place}) for no reason")


@dataclass
class Daemon:
    """One process of Rowcast."""

    world: "World"
    lines: dict[str, Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        world = self.world
        self.link = Link(world)
        self.wakeup = asyncio.Event()
        self.hub = world.design.hub(encode=lambda payload: payload + b"\n")
        router = world.design.router({"app": PACK})
        log_reader = ModelLog(world.postgres, self.link)
        self.log_cache = log_cache = LogCache(log_reader, RECENT_BYTES)
        self.pump = pump = world.design.pump(
            log_reader, self.wakeup, self.hub, router, log_cache, _store_dead_letters, chunk=CHUNK
        )
        wait_until_delivered = pump.wait_until_delivered if world.design.waits_for_place else _at_once
        self.context = ClientContext(
            hub=self.hub,
            log_reader=log_cache,
            replay_reader=RetryingLogReader(log_cache, pump.readable.wait),
            rights=Rights(self.hub, ModelGrants(self, self.link), wait_until_delivered),
            router=router,
            authenticate=_Claims,
            wait_until_delivered=wait_until_delivered,
            encode=lambda payload: payload + b"\n",
            read_age=lambda: 0.0,
            close_history=CloseHistory(),
            clock=lambda: world.now,
            heartbeat=20.0,
            schema="model",
            frame_bytes=65536,
            queue_bytes=QUEUE_BYTES,
            chunk=CHUNK,
        )
        self.task = world.loop.create_task(pump.run())
        world.run()

    def accept(self, user: str) -> Line:
        line = Line(self, user)
        line.handler = self.world.design.client(self.context, line)
        self.lines[user] = line
        return line

    def wake(self) -> None:
        """Tell it that the log has grown."""
        self.world.run(self.wakeup.set)

    def tick(self) -> None:
        """Let time pass until the next heartbeat."""
        self.world.now += 100.0
        for line in tuple(self.lines.values()):
            self.world.run(partial(line.require_handler().tick, self.world.now))

    def kill(self) -> None:
        """Nothing more comes from this process but what was written."""
        for line in tuple(self.lines.values()):
            line.closed = True
            self.world.run(line.end)
        self.task.cancel()
        self.world.run()


async def _store_dead_letters(dead_letters: object) -> None:
    """The dead letters of this model have no reader."""


async def _at_once(seq: Seq) -> None:
    """Wait for nothing."""


class World:
    """All of it, and what the tests do to it. Every method leaves it idle."""

    def __init__(self, design: Design, daemons: int = 2) -> None:
        self.design = design
        self.loop = _Loop()
        self.now = 0.0
        self.since = 0  # no answer that is being used is older than this step
        self.violations: list[Violation] = []
        self.names: dict[Position, int] = {}
        self.postgres = Postgres(design.fresh, design.far, purges=design.purges)
        self.leader: Leader | None = None
        self.leading: Daemon | None = None  # None: a daemon without clients
        self.daemons: list[Daemon] = []
        self.elect()
        self.daemons += [Daemon(self) for _ in range(daemons)]
        self.clients = [Client(user, self.read_state) for user in USERS]

    def run(self, first: Callable[[], object] | None = None, *, since: int | None = None) -> None:
        """Do this, and let everything go on as far as it can. `since`: what it uses was read at that step."""
        self.postgres.step += 1
        self.since = self.postgres.step if since is None else since
        if first is not None:
            self.loop.call_soon(first)
        self.loop.run_forever()
        for daemon in getattr(self, "daemons", ()):
            for line in [line for line in daemon.lines.values() if line.closed]:
                self.loop.call_soon(line.end)
                self.loop.run_forever()
        for error in (*self.loop.errors, *self.violations):
            raise error
        for daemon in getattr(self, "daemons", ()):
            if daemon.task.done():
                daemon.task.result()

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.run_forever()
        self.loop.close()

    def read_state(self, topic: Topic) -> tuple[dict[int, int], object]:
        """What the application would say of a topic now."""
        state = self.postgres.state
        return {
            row: stored.version
            for row, stored in state.rows.items()
            if stored.topic == topic and stored.there and not stored.deleted
        }, state

    # The sequencer.

    def elect(self, *, next_segment: bool = False) -> None:
        """Another leader begins, or the same goes on in the next segment."""
        self.leader = self.postgres.open_term(next_segment=next_segment)
        leaders = (*self.daemons, None)
        self.leading = leaders[self.postgres.state.terms[-1].term % len(leaders)]

    def number(self) -> None:
        """The leader looks for events; if there is none any more, another begins."""
        self.postgres.step += 1
        if self.leader is None:
            self.elect()
        assert self.leader is not None
        before = self.leader.last_seq
        changes = self.postgres.number(self.leader)
        if changes and self.leading is not None:
            self.run(partial(self.leading.pump.offer, Seq(before), changes))
        for daemon in self.daemons:
            self.run(daemon.link.batch)

    def wake_all(self) -> None:
        for daemon in self.daemons:
            daemon.wake()

    def begun(self, right: int) -> int:
        """Where in the log a right began: where its transaction did; 0 where that is not on record."""
        log = self.postgres.state.log
        xid = next((entry.event.xid for entry in log if entry.event.begins and entry.event.right == right), None)
        return next((entry.seq for entry in log if entry.event.xid == xid), 0)

    def drop_segments(self) -> None:
        """What is old goes, and every daemon learns of it."""
        self.postgres.drop_segments()
        for daemon in self.daemons:
            daemon.log_cache.forget(Seq(self.postgres.state.floor))

    # Clients.

    def connect(self, client: Client, daemon: Daemon) -> None:
        client.cut()
        client.connect(daemon.accept(client.user))

    def receive(self, client: Client, limit: int = 1_000_000) -> int:
        """Let a client read; returns how many frames it has read."""
        count = 0
        while count < limit and client.receive(1):
            count += 1
            if isinstance(client.line, Line):
                client.line.read()
        return count

    def pass_time(self) -> None:
        """Let two seconds pass, in which whoever looks now and then has looked."""
        self.loop.now += 2.0
        self.run()

    def subscribe(self, client: Client, topic: Topic) -> None:
        if topic not in client.wanted:
            client.wanted.append(topic)
        if client.line is not None and topic not in client.topics:
            client.ask(topic)

    # What befalls everybody.

    def _break_down(self) -> None:
        """Postgres is gone, and with it the leader's connection and everything that was asked."""
        self.leader = None
        for daemon in self.daemons:
            self.run(daemon.link.break_down)

    def crash(self, lost: int) -> None:
        """Postgres is killed, and comes back."""
        self.postgres.crash(lost)
        self._break_down()

    def fail_over(self, lost: int) -> None:
        """A standby takes over, which knows of every term."""
        self.postgres.fail_over(lost)
        self._break_down()

    def restart(self, number: int) -> None:
        """A daemon is killed, and another takes its place."""
        killed = self.daemons.pop(number)
        killed.kill()
        if killed is self.leading:
            self.leader = None
        self.daemons.insert(number, Daemon(self))

    # The end.

    def rest(self) -> None:
        """Heal everything, end everything, let everybody hear everything, and see whether that is all there is."""
        for daemon in self.daemons:
            daemon.link.held = False
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
        """Until nobody has anything to read, to ask or to say."""
        self.number()
        busy, rounds = True, 0
        while busy:
            busy, rounds = False, rounds + 1
            self.pass_time()
            if rounds > MAX_ROUNDS:
                raise Violation("I7", "it never comes to rest")
            for daemon in self.daemons:
                while daemon.link.waiting:
                    daemon.link.let_through(0)
                daemon.wake()
            for client in self.clients:
                if client.line is None:
                    client.connect(self.daemons[0].accept(client.user))
                    busy = True
                assert isinstance(client.line, Line)
                busy |= self.receive(client) > 0 or client.line is None
                if client.line is None:
                    continue
                for topic in client.wanted:
                    if topic not in client.topics and self.postgres.state.rights.get((client.user, topic)):
                        client.ask(topic)
                        busy = True
        for daemon in self.daemons:
            daemon.tick()
        for client in self.clients:
            self.receive(client)

    def _check_at_rest(self) -> None:
        for client in self.clients:
            for topic in client.wanted:
                allowed = bool(self.postgres.state.rights.get((client.user, topic)))
                assert isinstance(client.line, Line)
                if allowed != (topic in client.topics):
                    raise Violation("I7", f"{client.user} should follow {topic}: {allowed}")
            if client.pending:
                raise Violation("I7", f"{client.user} waits for ever")
            for topic, following in client.topics.items():
                self._check_received(client.user, topic, following)
        self._check_one_order()

    def _check_received(self, user: str, topic: Topic, following: Any) -> None:
        received = [one.uid for one in following.received]
        events = {event.uid: event for event in self.postgres.state.events}
        for uid in received:
            if uid not in events:
                raise Violation("I5", f"{user} was told event {uid} in {topic}, which was taken back, and no reset")
        versions: dict[object, int] = {}
        for event in map(events.__getitem__, received):
            if event.table == "rows":
                if versions.get(event.key, 0) >= event.version:
                    raise Violation("I2", f"{user} heard version {event.version} of {event.key} in {topic} too late")
                versions[event.key] = event.version
        owed = [
            entry
            for entry in self.postgres.state.log
            if entry.seq > following.base.seq and entry.event.topic == topic and not self.postgres.purged(entry)
        ]
        for entry in owed:
            if entry.event.uid not in received:
                raise Violation("I7", f"{user} was never told {entry.seq} in {topic}")
        # What the application itself said, and a crash took back, is not for a stream of changes to mend.
        kept = any(state is following.read_from for state in self.postgres.history)
        rows, _ = self.read_state(topic)
        if kept and following.state != rows:
            raise Violation("I7", f"{user} knows {following.state} of {topic}, which is {rows}")

    def _check_one_order(self) -> None:
        for topic in TOPICS:
            orders = [[one.uid for one in c.topics[topic].received] for c in self.clients if topic in c.topics]
            for number, one in enumerate(orders):
                for other in orders[:number]:
                    common = set(one) & set(other)
                    if [uid for uid in one if uid in common] != [uid for uid in other if uid in common]:
                        raise Violation("I3", f"two clients heard {topic} in two orders")
