"""The feed of a gateway, whatever becomes of what members tell it: lost, repeated, late, out of order, or not told.

A history is a list of steps. The feed, the hub, the cache and the router are real; the log, the members and the
network are small models, and the clock goes on only when nothing else can happen. Each mutant lacks one safeguard,
and a history of a seed that is named shows it.

Contents travel with their batches or by topic; the leader may change that in between.
"""

import asyncio
import json
import selectors
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import pytest
from hypothesis import Phase, example, given, seed, settings
from hypothesis import strategies as st

from daemon.core import batch as batch_module
from daemon.core.batch import Beat, Contents, LogBatch, apart, gone_in, size_of
from daemon.core.change import RESET_KINDS, Change, Kind, Numbers, Position, Right, Seq, Topic
from daemon.core.epochs import Epochs
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery import contents as contents_module
from daemon.delivery import feed as feed_module
from daemon.delivery.contents import LINGER, Interest
from daemon.delivery.feed import Feed
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import PackRouter
from tests.support.feeds import (
    NoEnds,
    NoFill,
    NoGone,
    NoJumpCheck,
    NoLingerRule,
    NoMissing,
    NoPrev,
    WantedSeenOnce,
)
from tests.unit.model.world import PACK, TOPICS

USERS = ("ada", "bob")
JUMP = 50  # numbers that a new term leaves out
ANSWERED = 2  # batches in an answer
SETTLED = 12.0  # seconds after the last fault


class Violation(AssertionError):
    """A promise that was broken."""


class _Clock(selectors.SelectSelector):
    """A selector that never reports a file: instead of waiting, it moves the clock."""

    loop: "_Loop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self.loop
        if timeout is None or loop.now + timeout > loop.end:
            loop.now = loop.end
            loop.stop()
        else:
            loop.now += timeout
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = self.end = 1000.0
        selector = _Clock()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now

    def pass_time(self, seconds: float) -> None:
        self.end = self.now + seconds
        self.run_forever()


class Entry(NamedTuple):
    """A transaction of the log: its changes, and what was on record before it."""

    epoch: str
    before: Seq
    changes: list[Change]

    @property
    def upto(self) -> Seq:
        return self.changes[-1].seq


class Log:
    """What the database holds, and what it has ever held."""

    def __init__(self) -> None:
        self.epoch, self.floor, self._last, self._tx = "e1", Seq(0), 0, count(1)
        self.entries: list[Entry] = []
        self.ever: dict[Position, Entry] = {}
        self.lost: set[Position] = set()

    @property
    def head(self) -> Position:
        return Position(self.epoch, self.entries[-1].upto if self.entries else self.floor)

    def write(self, kind: str, topic: Topic, row: int) -> None:
        tx, before = str(next(self._tx)), self.head.seq
        first = Change(
            Seq(self._last + 1), tx, "", "app", "rows", topic, Kind.INSERT, f'{{"id":{row}}}',
            f'{{"id":{row},"version":{self._last + 1}}}',
        )  # fmt: skip
        if kind == "delete":
            first = first._replace(kind=Kind.DELETE, record=None)
        elif kind == "limit":
            first = first._replace(kind=Kind.LIMIT, key="{}", record=None)
        elif kind == "end":
            right = Right(USERS[row % 2], topic)
            first = first._replace(table="members", kind=Kind.DELETE, key='{"id":"x"}', record=None, ends=right)
        changes = [first]
        if row == 2:  # a transaction of two, in both topics
            other = TOPICS[1 - TOPICS.index(topic)]
            changes.append(
                first._replace(seq=Seq(first.seq + 1), topic=other, kind=Kind.DELETE, record=None, ends=None)
            )  # fmt: skip
        self._last = changes[-1].seq
        entry = Entry(self.epoch, before, changes)
        self.entries.append(entry)
        self.ever[Position(self.epoch, entry.upto)] = entry

    def begin_term(self, losing: int) -> None:
        """A new term: it leaves numbers out, and the last transactions may not have survived."""
        for _ in range(min(losing, len(self.entries) - 1)):
            self.lost.add(Position(self.epoch, self.entries.pop().upto))
        self._last += JUMP

    def begin_epoch(self) -> None:
        self.epoch, self.entries, self.floor = f"e{int(self.epoch[1:]) + 1}", [], Seq(0)
        self._last = 0

    def drop_old(self) -> None:
        if len(self.entries) > 1:
            self.floor = self.entries.pop(0).upto

    def after(self, seq: Seq) -> list[Entry]:
        return [entry for entry in self.entries if entry.upto > seq]

    def reason(self, since: Position) -> str | None:
        """Why no stream continues from here, as the log says."""
        if since.epoch != self.epoch:
            return "epoch"
        if since.seq < self.floor:
            return "retention"
        on_record = since.seq == self.floor or any(since.seq == entry.upto for entry in self.entries)
        return None if on_record else "crash"


class Member:
    """A member: how far its hub is, and what it holds in memory."""

    def __init__(self, name: str, log: Log, router: PackRouter) -> None:
        self.name, self._log, self._router = name, log, router
        self.position, self._floor = log.head, log.head.seq
        self._held: deque[LogBatch] = deque()

    def catch_up(self) -> list[LogBatch]:
        """What it publishes on its way to the head."""
        published = []
        if self._log.reason(self.position):
            rest = self._log.after(self.position.seq) if self.position.epoch == self._log.epoch else []
            first = rest[0].changes[0].seq if rest else self._log.head.seq + 1
            self.position, self._floor = Position(self._log.epoch, Seq(first - 1)), Seq(first - 1)
            self._held.clear()
        for entry in self._log.after(self.position.seq):
            batch = self._router.batch_of(self.position, entry.changes)[0]
            self._held.append(batch)
            self.position = Position(batch.epoch, batch.upto)
            published.append(batch)
        return published

    def beat(self) -> Beat:
        return Beat(*self.position, 0.0, self.name, "c")

    def forget(self) -> None:
        """Hold nothing: what is asked for is read from the database."""
        self._held.clear()
        self._floor = self.position.seq

    def batches(self, after: Position) -> tuple[Position, list[LogBatch]]:
        head = self.position
        if after.epoch != head.epoch:
            return self._log.head, []
        if after.seq >= head.seq:
            return head, []
        if self._floor <= after.seq:
            return head, [batch.since(after.seq) for batch in self._held if batch.upto > after.seq][:ANSWERED]
        if after.epoch != self._log.epoch:
            return head, []
        if after.seq < self._log.floor:
            raise LogTruncated
        known = [change for entry in self._log.after(after.seq) for change in entry.changes if change.seq <= head.seq]
        return head, [self._router.batch_of(after, known)[0]] if known else []

    def contents(self, after: Position, upto: Seq, hashes: Collection[int]) -> list[Change]:
        if upto > self.position.seq or after.epoch != self.position.epoch:
            raise LogUnavailable("behind")
        if self._floor > after.seq or any(batch.gone is None for batch in self._held if batch.upto > after.seq):
            raise LogTruncated
        if any(last < upto < first for batch in self._held for last, first in batch.jumps):
            raise LogTruncated
        held = [change for batch in self._held for change in batch.changes]
        return [
            change
            for change in held
            if after.seq < change.seq <= upto and batch_module.hash_of(change.topic) in hashes
        ]

    def continuity(self, since: Position, upto: Position) -> str | None:
        """Like the cache of a member: it knows by itself what lies between its floor and its position."""
        if upto.epoch == self.position.epoch and upto.seq > self.position.seq:
            raise LogUnavailable("behind")
        ends = {self._floor, *(batch.upto for batch in self._held)}
        if since.epoch == self.position.epoch and since.seq in ends:
            return None
        return self._log.reason(since)


class Reader:
    """Asks one of the members, whose answer takes a while."""

    def __init__(self, log: Log, members: Sequence[Member]) -> None:
        self._log, self._members = log, members
        self.asked, self.is_down, self.seconds = 0, False, 0.0

    async def _answer(self, answer: Any) -> Any:
        if self.is_down:
            raise LogUnavailable("no member")
        await asyncio.sleep(self.seconds)
        return answer

    async def head(self) -> Position:
        return cast("Position", await self._answer(self._log.head))

    async def batches(self, after: Position) -> tuple[Position, Sequence[LogBatch]]:
        found = self._members[self.asked].batches(after)
        return cast("tuple[Position, Sequence[LogBatch]]", await self._answer(found))

    async def contents(self, after: Position, upto: Seq, hashes: Collection[int]) -> Sequence[Change]:
        return cast("list[Change]", await self._answer(self._members[self.asked].contents(after, upto, hashes)))

    async def continuity(self, since: Position, upto: Position) -> str | None:
        return cast("str | None", await self._answer(self._members[self.asked].continuity(since, upto)))


class Client:
    """A follower of one topic. What it gets is held against the log."""

    outlet = None

    def __init__(self, world: "World", user: str, topic: Topic) -> None:
        self.user, self.topic, self.numbers, self._world = user, topic, Numbers.JSON, world
        self._got: list[Any] = []
        self.follows = False
        self._left: tuple[Position, int] | None = None
        self.join()

    def join(self) -> None:
        self.begun = self._world.live.position
        self._got, self.follows, self._left = [], True, None
        self._world.live.hub.follow(self.topic, self)

    def leave(self) -> None:
        hub = self._world.live.hub
        self.check(hub.position)
        self.follows, self._left = False, (hub.position, hub.discontinuity.number)
        hub.unfollow(self.topic, self)

    async def resume(self) -> None:
        """Replay what it has missed, and follow again. Whoever has lost the right, or the stream, begins anew."""
        if self._left is None:
            return
        (place, number), self._left = self._left, None
        hub = self._world.live.hub
        while place != hub.position:
            upto = hub.position
            try:
                found = await self._world.cache.read_topics([self.topic, Topic("*app")], place.seq, upto.seq, 10**6)
            except LogTruncated:
                return
            if hub.discontinuity.number != number or self.follows:
                return
            missed = [
                change for entry in reversed(self._world.path(place, upto)) for change in entry.changes
            ]  # fmt: skip
            if any(change.ends == Right(self.user, self.topic) for change in missed):
                return
            expected = [change for change in self._world.router.validate(missed)[0] if change.topic == self.topic]
            gone = {
                change.key for entry in self._world.log.ever.values() for change in entry.changes if not change.record
            }
            seen = {change.seq for change in found if change.topic == self.topic}
            if lost := [change for change in expected if change.seq not in seen and change.key not in gone]:
                self._world.blame(f"{self.user} from {place} to {upto}: {lost} not replayed")
            self._got += ["reset" if change.kind in RESET_KINDS else change.seq for change in expected]
            place = upto
        if hub.discontinuity.number == number and not self.follows:
            self.follows = True
            hub.follow(self.topic, self)

    def deliver(self, frames: bytes) -> None:
        for line in frames.decode().splitlines():
            frame = json.loads(line)
            if frame["op"] == "changes":
                self._got += [change["seq"] for change in frame["changes"]]
            else:
                self._got.append(frame["op"])
            if frame["op"] == "revoked":
                self.check(self._world.live.position)

    def signal(self, frame: bytes) -> None:
        """No test sends one."""

    def revoked(self, topic: Topic) -> None:
        """Its frames come right after this."""
        self.follows = False

    def discontinued(self) -> None:
        """The stream has been broken: the hub has moved already."""
        hub = self._world.live.hub
        self.check(self._world.before)
        if self._world.log.reason(self._world.before) != hub.discontinuity.reason:
            self._world.blame(f"unexplained reset: {hub.discontinuity.reason} at {self._world.before}")
        self.begun, self._got = hub.position, []

    def check(self, upto: Position) -> None:
        """Compare what it got since it began with what the log has ever held in between."""
        expected: list[Any] = []
        for entry in reversed(self._world.path(self.begun, upto)):
            for change in entry.changes:
                if change.ends == Right(self.user, self.topic):
                    expected.append("revoked")
                if change.topic == self.topic:
                    sent = self._world.router.validate([change])[0]
                    expected += ["reset" if found.kind in RESET_KINDS else found.seq for found in sent]
        if "revoked" in expected:
            expected = [*expected[: expected.index("revoked")], "revoked"]
        if _joined(expected) != _joined(self._got):
            self._world.blame(f"{self.user} from {self.begun} to {upto}: {expected} expected, {self._got} received")


def _joined(events: Sequence[Any]) -> list[Any]:
    """Resets of a topic that follow each other may come as one."""
    return [
        event for event, before in zip(events, [None, *events], strict=False) if (event, before) != ("reset", "reset")
    ]


class LogOfMember:
    """What the cache does not hold, a member reads."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        await asyncio.sleep(self._world.reader.seconds)
        log = self._world.log
        if after < log.floor:
            raise LogTruncated
        changes = [change for entry in log.after(after) for change in entry.changes if change.seq <= upto]
        return Batch([change for change in self._world.router.validate(changes)[0] if change.topic in topics])


class World:
    """A gateway, two members, their network, and the log."""

    def __init__(self, design: type[Feed], *, by_topic: bool) -> None:
        self.loop, self.log, self.by_topic = _Loop(), Log(), by_topic
        self.router = PackRouter({"app": PACK})
        self.log.write("insert", TOPICS[0], 1)
        self.members = [Member(name, self.log, self.router) for name in ("one", "two")]
        self.reader = Reader(self.log, self.members)
        self.hub = Hub(lambda payload: payload + b"\n", self.router.with_exact_numbers)
        self.cache = LogCache(LogOfMember(self), 2**20)  # type: ignore[arg-type]
        self.interest = Interest(self.loop.time)
        self.hub.interest, self.cache.covers = self.interest, self.interest.covers
        self.live = Live(self.hub, self.router, self.cache)
        self.before = self.live.position
        self.live.on_batch, self.live.on_move = self._on_batch, self._on_move
        self.refresh_fails, self._refreshed = False, Position("", Seq(0))
        self.messages: list[LogBatch | Contents | Beat | None] = []
        self.errors: list[BaseException] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context["exception"]))
        self.feed = design(self.reader, self.live, self._refresh, self.interest, Epochs())

    def begin(self) -> None:
        """Start the gateway; clients follow."""
        self._run = self.loop.create_task(self.feed.run())
        self.beat()
        self.pass_time(1.0)
        self.clients = [Client(self, user, topic) for user in USERS for topic in TOPICS]

    def close(self) -> None:
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.pass_time(0)
        self.loop.close()

    async def _refresh(self) -> None:
        await asyncio.sleep(self.reader.seconds)
        if self.refresh_fails:
            raise LogUnavailable("the tables cannot be read")
        self._refreshed = self.live.position

    def _on_batch(self, batch: LogBatch) -> None:
        if any(change.kind is Kind.LIMIT for change in batch.changes) and self._refreshed != self.before:
            self.blame(f"other tables may be served since {batch.after}, and nobody has asked")
        self.before = self.live.position

    def _on_move(self, position: Position) -> None:
        self.before = position

    def path(self, begun: Position, upto: Position) -> list[Entry]:
        """The transactions between two positions, newest first: what was on record when the last was written."""
        found = []
        while upto != begun:
            entry = self.log.ever.get(upto)
            if entry is None or upto.epoch != begun.epoch or upto.seq < begun.seq:
                self.blame(f"nothing leads from {begun} to {upto}")
                break
            found.append(entry)
            upto = Position(entry.epoch, entry.before)
        return found

    def blame(self, what: str) -> None:
        """A promise was broken, inside code that catches errors."""
        self.errors.append(Violation(what))

    def pass_time(self, seconds: float) -> None:
        self.loop.pass_time(seconds)
        if self._run.done():
            self._run.result()
        if self.errors:
            raise self.errors[0]

    def in_loop(self, call: Any, *arguments: Any) -> None:
        self.loop.call_soon(call, *arguments)
        self.pass_time(0)

    def beat(self) -> None:
        self.messages += [member.beat() for member in self.members]
        while self.messages:
            self.deliver(0)

    def publish(self, number: int, fate: str) -> None:
        """This member leads: it catches up, and tells it."""
        for batch in self.members[number].catch_up():
            contents: list[Contents] = []
            outline: LogBatch | None = batch
            if self.by_topic:
                outline, parts = apart(batch)
                outline = outline._replace(
                    absent={topic_hash: size_of(changes) for topic_hash, changes in parts.items()}
                )
                contents = [Contents(batch.epoch, batch.after, batch.upto, changes) for changes in parts.values()]
            if fate in {"told", "contents late"}:
                for each in [] if fate == "contents late" else contents:
                    self.receive(each)
                self.receive(outline)
            if fate == "pull":
                outline = None
            self.messages += {
                "told": (),
                "lost": (),
                "contents late": contents,
                "contents lost": (outline,),
            }.get(fate, (*contents, outline))

    def receive(self, message: LogBatch | Contents | Beat | None) -> None:
        match message:
            case Contents():
                if self.interest.is_wanted(batch_module.hash_of(message.changes[0].topic)):
                    self.in_loop(self.feed.receive_contents, message)
            case Beat():
                self.in_loop(self.feed.record_beat, message)
            case _:
                self.in_loop(self.feed.receive, message)

    def deliver(self, place: int, *, again: bool = False) -> None:
        if self.messages:
            message = self.messages[place % len(self.messages)]
            if not again:
                self.messages.remove(message)
            self.receive(message)

    def settle(self) -> None:
        """No fault lasts: in the end the gateway is where the log is, and everybody has had everything."""
        self.reader.is_down = self.refresh_fails = False
        self.reader.seconds = 0.0
        while self.messages:
            self.deliver(0)
        for number in range(2):  # only beats show that there is more
            self.publish(number, "lost")
        for _ in range(int(SETTLED / 0.5)):
            self.beat()
            self.pass_time(0.5)
        if self.live.position != self.log.head:
            raise Violation(f"at {self.live.position}, and the log is at {self.log.head}")
        if self.feed.problems() or self.feed.age > 1.0:
            raise Violation(f"not proven for {self.feed.age} s: {self.feed.problems()}")
        for client in self.clients:
            if client.follows:
                client.check(self.live.position)
        self._check_cache()
        self.pass_time(0)

    def _check_cache(self) -> None:
        """What is deleted has no content in the cache any more."""
        end = self.live.position.seq
        self.cache.covers = None
        found = self.loop.create_task(self.cache.read_topics(TOPICS, self.cache._floor, end, 10**6))
        self.pass_time(0)
        gone = [row for entry in self.log.entries for row in gone_in(entry.changes) or ()]
        for change in found.result():
            if change.record and any(row.key == change.key and row.upto >= change.seq for row in gone):
                self.blame(f"content of a row that is gone: {change}")


WRITES = st.tuples(
    st.just("write"),
    st.sampled_from(("insert", "insert", "insert", "delete", "limit", "end")),
    st.sampled_from(TOPICS),
    st.integers(1, 3),
    st.sampled_from(
        ("told", "told", "told", "late", "lost", "lost", "pull", "unnumbered", "contents late", "contents lost")
    ),
)
STEPS = st.one_of(
    WRITES,
    WRITES,
    WRITES,
    st.tuples(st.just("publish"), st.integers(0, 1)),
    st.tuples(st.just("catch_up"), st.integers(0, 1)),
    st.tuples(st.just("forget"), st.integers(0, 1)),
    st.tuples(st.just("deliver"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("lose"), st.integers(0, 5)),
    st.tuples(st.just("beat"), st.integers(0, 1)),
    st.tuples(st.just("pass_time"), st.sampled_from((0.01, 0.1, 0.5, 3.0))),
    st.tuples(st.just("ask"), st.integers(0, 1), st.sampled_from((0.0, 0.02, 0.3))),
    st.tuples(st.just("down"), st.booleans()),
    st.tuples(st.just("refresh_fails"), st.booleans()),
    st.tuples(st.just("term"), st.integers(0, 2)),
    st.tuples(st.just("epoch")),
    st.tuples(st.just("drop_old")),
    st.tuples(st.just("join"), st.integers(0, 3)),
    st.tuples(st.just("leave"), st.integers(0, 3)),
    st.tuples(st.just("resume"), st.integers(0, 3)),
    st.tuples(st.just("by_topic"), st.booleans()),
    st.tuples(st.just("linger")),
)  # fmt: skip


def take(world: World, step: Sequence[Any]) -> None:
    """Do one step of a history."""
    match step:
        case ("write", kind, topic, row, fate):
            world.log.write(kind, topic, row)
            if fate != "unnumbered":
                world.publish(0, fate)
        case ("publish", number):
            world.publish(number, "late")
        case ("catch_up", number):
            world.members[number].catch_up()
        case ("forget", number):
            world.members[number].forget()
        case ("deliver", place, again):
            world.deliver(place, again=again)
        case ("lose", place):
            if world.messages:
                del world.messages[place % len(world.messages)]
        case ("beat", number):
            world.messages.append(world.members[number].beat())
        case ("pass_time", seconds):
            world.pass_time(seconds)
        case ("ask", number, seconds):
            world.reader.asked, world.reader.seconds = number, seconds
        case ("down", is_down):
            world.reader.is_down = is_down
        case ("refresh_fails", fails):
            world.refresh_fails = fails
        case ("term", losing):
            world.log.begin_term(losing)
        case ("epoch",):
            world.log.begin_epoch()
        case ("drop_old",):
            world.log.drop_old()
        case ("join", number):
            if not world.clients[number].follows:
                world.in_loop(world.clients[number].join)
        case ("leave", number):
            if world.clients[number].follows:
                world.in_loop(world.clients[number].leave)
        case ("resume", number):
            task = world.loop.create_task(world.clients[number].resume())
            task.add_done_callback(lambda done: done.cancelled() or done.result())
        case ("by_topic", by_topic):
            world.by_topic = by_topic
        case ("linger",):
            world.pass_time(LINGER + 0.1)
            world.interest.sweep()


def live_through(design: type[Feed], steps: Sequence[Any], *, by_topic: bool) -> None:
    """Raises Violation if a gateway of this design breaks a promise in this history."""
    world = World(design, by_topic=by_topic)
    with patch.object(feed_module, "time", SimpleNamespace(monotonic=world.loop.time)):
        try:
            world.begin()
            for step in steps:
                take(world, step)
            world.settle()
        finally:
            world.close()


@pytest.mark.parametrize("mode", ["inline", "by topic", "all topics with the same hash"])
@settings(max_examples=120, deadline=None)
@given(steps=st.lists(STEPS, max_size=40))
@example(  # a term undoes what is asked for
    [
        ("write", "insert", TOPICS[0], 1, "late"),
        ("term", 1),
        ("publish", 0),
        ("write", "insert", TOPICS[0], 1, "late"),
    ]
)
@example([("ask", 1, 0.0), ("write", "insert", TOPICS[0], 1, "told"), ("epoch",)])  # who has the contents has gone
def test_a_gateway_skips_and_repeats_nothing_whatever_arrives(mode: str, steps: list[Any]) -> None:
    with ExitStack() as stack:
        for module in (batch_module, contents_module, feed_module) if "hash" in mode else ():
            stack.enter_context(patch.object(module, "hash_of", lambda _: 7))
        live_through(Feed, steps, by_topic=mode != "inline")


class NoUpto(Feed):
    """Anybody may say that the position is valid, however far behind."""

    async def _check_continuity(self, upto: Position) -> bool:
        return await super()._check_continuity(self._live.position)


class NoProof(Feed):
    """Beats from before the position count as a sign that nothing is missing."""

    @property
    def age(self) -> float:
        return 0.0


class NoRefresh(Feed):
    """Other tables may be served from a batch on, and nobody looks."""

    def _needs_refresh(self, batch: LogBatch) -> bool:
        return False


class NoCoverage(Feed):
    """The cache is believed to have what was never here."""

    def _publish(self, batch: LogBatch) -> None:
        since = self._interest._whole_since
        super()._publish(batch)
        self._interest._whole_since = since


MUTANTS: dict[type[Feed], int] = {
    NoPrev: 1,
    NoFill: 1,
    NoEnds: 1,
    NoGone: 1,
    NoJumpCheck: 1,
    NoUpto: 1,
    NoProof: 1,
    NoRefresh: 1,
    NoMissing: 1,
}
"""Each with the seed of a search that finds a history that it does not survive."""

A, B = TOPICS
NOBODY_FOLLOWS_A = ("leave", 0), ("leave", 2)
NOBODY_FOLLOWS_B = ("leave", 1), ("leave", 3)
BEGIN_BY_TOPIC = ("write", "insert", A, 1, "told")
HISTORIES: dict[type[Feed], Sequence[Any]] = {
    WantedSeenOnce: [  # who follows B joins while the contents of A are being asked for
        BEGIN_BY_TOPIC,
        *NOBODY_FOLLOWS_B,
        ("linger",),
        ("ask", 0, 0.3),
        ("write", "insert", A, 2, "contents lost"),
        ("deliver", 0, False),
        ("join", 1),
    ],
    NoLingerRule: [  # a replay comes back to what was lost while nobody followed
        BEGIN_BY_TOPIC,
        *NOBODY_FOLLOWS_A,
        ("write", "insert", A, 1, "contents lost"),
        ("deliver", 0, False),
        ("resume", 0),
    ],
    NoCoverage: [  # a replay comes back to what was never sent here
        BEGIN_BY_TOPIC,
        *NOBODY_FOLLOWS_A,
        ("linger",),
        ("write", "insert", A, 1, "told"),
        ("resume", 0),
    ],
}
"""Each with a history that it does not survive, and the feed does."""


@pytest.mark.parametrize("design", HISTORIES, ids=lambda design: design.__name__)
def test_each_rule_of_contents_by_topic_is_needed_in_a_history(design: type[Feed]) -> None:
    live_through(Feed, HISTORIES[design], by_topic=True)
    with pytest.raises(Violation):
        live_through(design, HISTORIES[design], by_topic=True)


@pytest.mark.parametrize("design", MUTANTS, ids=lambda design: design.__name__)
def test_a_gateway_without_one_of_its_safeguards_breaks_a_promise(design: type[Feed]) -> None:
    @seed(MUTANTS[design])
    @settings(max_examples=1000, deadline=None, database=None, phases=[Phase.generate], report_multiple_bugs=False)
    @given(st.lists(STEPS, max_size=40))
    def search(steps: list[Any]) -> None:
        live_through(design, steps, by_topic=design is NoMissing)

    with pytest.raises(Violation):
        search()
