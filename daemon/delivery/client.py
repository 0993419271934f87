"""One client's life: performs what its session decides, using the hub, the rights, the log and the socket."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

from daemon import metrics
from daemon.core import filters, wire
from daemon.core.change import Numbers, Position, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.close_history import CloseHistory
from daemon.core.errors import (
    BadFilter,
    ClientFault,
    FilterTooLarge,
    GrantsUnavailable,
    LogUnavailable,
    MayNotSignal,
    NoSuchTopic,
    PresenceFull,
    SnapshotTooLarge,
    SnapshotTooSlow,
    TooManyFrames,
    TooManySignals,
    Unavailable,
)
from daemon.core.filters import MAX_FILTER, View
from daemon.core.hub import Discontinuity, Hub
from daemon.core.ports import Age, ColumnReader, Encode, LogReader, Socket
from daemon.core.presence import Key
from daemon.core.session import (
    Acknowledge,
    Action,
    Authenticate,
    BePresent,
    CloseConnection,
    Follow,
    Phase,
    Say,
    SendSignal,
    Session,
    Unfollow,
)
from daemon.core.snapshot import Wanted
from daemon.delivery.acks import Acks
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.presence import Presence
from daemon.delivery.replay import Replay, ReplayReader, Turns
from daemon.delivery.rights import Rights
from daemon.delivery.signals import Signals
from daemon.delivery.snapshots import Snapshots
from daemon.health import Refusals
from daemon.logs import get_logger

log = get_logger()

QUEUED_FRAMES: Final = 2  # frames of one client that wait for an answer, for each topic that it may follow
REFUSAL_CHARGE: Final = 20  # frames that a refused subscribe counts as: each one is a question to the database
RIGHT: Final = 0.000_7  # seconds of CPU, of Postgres and of this process, to look up one right
SNAPSHOT_CHARGE: Final = 20  # frames that a snapshot counts as
FILTER_CHARGE: Final = 20  # frames that a filter counts as: it takes milliseconds to check
SNAPSHOT_TIMEOUT: Final = 60.0  # seconds that the peer may take to read one: it stays in memory until then
MAX_SPREAD_MS: Final = 5000  # over which the clients of a daemon that stops reconnect
SIGNAL_CHARGE: Final = 20  # frames that a signal counts as: many may get it
HELLO_TIMEOUT: Final = 5.0  # seconds
EXPIRY_NOTICE: Final = 2.0  # seconds before a token expires at which a timer is set; more than two ticks are apart
STALE_DELAY: Final = 5.0  # seconds that changes may wait for delivery until clients are told that they may be behind


NeedsDatabase = Follow | Authenticate | SendSignal
"""The actions that may have to wait for the database."""


class Claims(Protocol):
    """What a valid token says."""

    @property
    def user(self) -> str:
        """Who this is."""

    @property
    def expires(self) -> float:
        """Until when, in seconds since 1970."""


@dataclass(frozen=True)
class ClientContext:
    """What all clients share.

    `replay_reader` is what replays read. `wait_until_delivered` waits until the hub has delivered everything up to a
    position. `delivery_age` decides when clients are told that they may be behind. A client may follow `max_topics`,
    have filters of `max_filter` characters in all, and send `signal_rate` signals in a second, or at once. It falls
    behind when more than `queue_bytes` are queued for it. `schema` returns the hash of the payload
    contracts. `authenticate` returns None if `identify` has to be awaited instead.
    `replays` are those that run, by user.
    """

    hub: Hub
    log_reader: LogReader
    replay_reader: ReplayReader
    rights: Rights
    snapshots: Snapshots
    columns: ColumnReader
    signals: Signals
    presence: Presence
    acks: Acks
    router: PackRouter
    authenticate: Callable[[str], Claims | None]
    wait_until_delivered: Callable[[Seq], Coroutine[Any, Any, None]]
    encode: Encode
    delivery_age: Age
    close_history: CloseHistory
    clock: Callable[[], float]
    heartbeat: float
    schema: Callable[[], str]
    max_topics: int
    frame_bytes: int
    queue_bytes: int
    max_filter: int = MAX_FILTER
    signal_rate: int = 10
    chunk: int = 1000
    replays: dict[str, Turns] = field(default_factory=dict)
    refusals: Refusals = field(default_factory=Refusals)
    identify: Callable[[str], Coroutine[Any, Any, Claims]] | None = None

    def open_client(self, socket: Socket) -> "Client":
        """A client whose handshake has succeeded."""
        return Client(self, socket)


class Client:
    """The ClientHandler of one socket, the hub's Follower and the ReplayTarget.

    Frames are answered in order. A frame that needs nothing awaited is answered at once, without a task. A subscribe
    starts a task, which ends when every queued frame is answered. A replay is a task of its own.

    A topic is either live, where the hub delivers, or in `_replay`. A client that does not read what is live is
    *slow*: nothing is live, every topic is in the replay, and the replay waits for the peer to read. To the client
    this is the same stream.
    """

    __slots__ = (
        "_context",
        "_expiry",
        "_head_due",
        "_inbox",
        "_is_slow",
        "_replay",
        "_session",
        "_socket",
        "_spent_signals",
        "_stale",
        "_subscribing",
        "outlet",
    )

    def __init__(self, context: ClientContext, socket: Socket) -> None:
        self._context = context
        self._socket = socket
        self.outlet = socket.outlet
        self._session = Session(context.clock() + HELLO_TIMEOUT, context.max_topics, context.max_filter)
        self._inbox: deque[bytes] | None = None  # made when a frame has to wait: an empty one takes 760 bytes
        self._subscribing: asyncio.Task[None] | None = None
        self._replay: Replay | None = None
        self._is_slow = False
        self._spent_signals = 0.0  # of those allowed since the clock began; the last second's can be unspent
        self._expiry: asyncio.TimerHandle | None = None  # set shortly before the token expires
        self._stale = False  # what the last `head` frame said
        # Spread over the first interval, so that clients that came together do not get their heads together.
        self._head_due = context.clock() + context.heartbeat * random.uniform(0.5, 1.0)  # noqa: S311

    # Called by the gateway.

    def message_received(self, text: bytes) -> None:
        """Answer one message, or queue it behind those that wait for an answer."""
        if self._subscribing is not None:
            if self._inbox is None:
                self._inbox = deque()
            if len(self._inbox) < QUEUED_FRAMES * self._context.max_topics:
                self._inbox.append(text)
            else:
                self._perform(self._fault(TooManyFrames()))
            return
        rest = self._answer(text)
        if rest is not None:
            self._subscribing = asyncio.create_task(self._complete_and_answer(rest))

    def tick(self, now: float) -> None:
        """Close at the session's deadline, and send a `head` frame when one is due."""
        if now >= self._session.deadline:
            self._perform(self._session.tick(now))
        self._watch_expiry(now)
        stale = self._context.delivery_age() > STALE_DELAY
        if now < self._head_due and stale == self._stale:
            return
        # A peer with something left to read needs no sign of life.
        if self._session.phase is Phase.LIVE and not self._socket.queued():
            self._head_due = now + self._context.heartbeat
            self._stale = stale
            self.send(wire.head(None if self._replay else self._context.hub.position, stale=stale))

    def connection_lost(self, close: Close | None) -> None:
        """The connection has ended."""
        if close is not None and self._session.user:
            self._context.close_history.record(self._socket.session, self._session.user, close)
        self._session.end(1006, "lost")
        self._cancel_expiry()
        # Neither task is kept: it refers to this client, and both would wait for the garbage collector.
        if self._subscribing is not None:
            self._subscribing.cancel()
            self._subscribing = None
        if self._replay is not None:
            self._socket.spend(self._replay.unpaid)
            self._replay.stop()
            self._replay = None
        for topic in self._session.topics:
            self._context.hub.unfollow(topic, self)
            self._context.presence.leave(topic, self, disconnected=True)
        self._session.topics.clear()
        self._set_slow(slow=False)

    # Called by the hub.

    @property
    def user(self) -> str:
        """The user whose rights count."""
        return self._session.user

    @property
    def numbers(self) -> Numbers:
        """The form of the int8 and numeric values in its frames."""
        return self._session.numbers

    def deliver(self, frames: bytes) -> None:
        """Write live frames. If too much had waited for the peer before, nothing more is live.

        What waits only because it is large says nothing about the peer.
        """
        waited = self._socket.queued()
        self._socket.write(frames)
        if waited > self._context.queue_bytes:
            self._fall_behind(self._context.hub.discontinuity)

    def signal(self, frame: bytes) -> None:
        """Write a signal, unless the peer has fallen behind, or nearly so."""
        if not self._write_if_read(frame):
            metrics.SIGNALS_DROPPED.labels(reason="slow").inc()

    def revoked(self, topic: Topic) -> None:
        """The right to this topic has ended; the hub has told the peer."""
        self._session.forget(topic)
        self._context.presence.leave(topic, self)
        self._leave_replay(topic)

    def discontinued(self) -> None:
        """Numbers have been lost: every live topic begins anew."""
        self._fall_behind(None)

    # Called by the presence.

    def send_presence(self, frame: bytes) -> bool:
        """See Watcher."""
        return self._write_if_read(frame)

    # Called by the replay.

    def send(self, payload: bytes) -> None:
        """Write one frame."""
        self._socket.write(self._context.encode(payload))

    def send_encoded(self, frame: bytes) -> None:
        """Write one frame that is encoded already."""
        self._socket.write(frame)

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was sent."""
        await self._socket.drained()

    def spend(self, seconds: float) -> None:
        """Count CPU towards the share of the user."""
        self._socket.spend(seconds)

    def lend(self, seconds: float) -> None:
        """See ReplayTarget."""
        self._socket.lend(seconds)

    def has_credit(self) -> bool:
        """See ReplayTarget."""
        return self._socket.has_credit()

    def delay(self) -> float:
        """See ReplayTarget."""
        return self._socket.delay()

    def view(self, topic: Topic) -> View | None:
        """See ReplayTarget."""
        return self._session.topics[topic].view

    def join(self, topic: Topic) -> None:
        """The topic is at the head: follow it live."""
        self._context.hub.follow(topic, self, self.view(topic))

    def too_slow(self, topic: Topic) -> None:
        """See ReplayTarget."""
        follow = self._session.topics[topic]
        self._refuse(follow, SnapshotTooSlow())

    async def readable_topics(self) -> dict[Topic, Seq]:
        """See ReplayTarget."""
        readable: dict[Topic, Seq] = {}
        for topic in self._replay or ():
            while self._is_replaying(topic) and topic not in readable:
                follow = self._session.topics[topic]
                try:
                    start = await self._readable_from(follow)
                except GrantsUnavailable as error:
                    log.debug("log_unavailable", session=self._socket.session, reason=error.reason)
                    await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311
                    continue
                if start is not None:
                    readable[topic] = start
                elif self._is_current(follow):
                    self.send(wire.revoked(topic, self._context.hub.position))
                    self._context.hub.unfollow(topic, self)
                    self.revoked(topic)
        return readable

    # Answers.

    def _write_if_read(self, frame: bytes) -> bool:
        """Write what can be left out, unless it would push what cannot be into the log."""
        if self._is_slow or self._socket.queued() > self._context.queue_bytes // 2:
            return False
        self._socket.write(frame)
        return True

    def _answer(self, text: bytes) -> NeedsDatabase | None:
        """Answer one frame, as far as nothing has to be awaited; what is left of it to do."""
        try:
            actions = self._session.receive(wire.parse(text))
        except ClientFault as fault:
            actions = self._fault(fault, fault.frame)
        return self._perform(actions)

    def _fault(self, fault: ClientFault, frame: wire.FrameId | None = None) -> list[Action]:
        metrics.ERRORS.labels(code=fault.code).inc()
        return self._session.fault(fault, frame)

    def _perform(self, actions: Sequence[Action]) -> NeedsDatabase | None:
        """Perform actions up to one that needs the database, which is the last of them and is returned."""
        for action in actions:
            match action:
                case Say(payload):
                    self.send(payload)
                case CloseConnection(code, reason):
                    self._socket.close(code, reason)
                case Unfollow(topic):
                    self._leave_replay(topic)
                    self._context.hub.unfollow(topic, self)
                    self._context.presence.leave(topic, self)
                case SendSignal(topic, name, data):
                    if not self._spend_signal():
                        self._perform(self._fault(TooManySignals(self._context.signal_rate), action.frame))
                        continue
                    self._socket.charge(SIGNAL_CHARGE)
                    if self._context.signals.needs_right(topic):
                        return action
                    self._context.signals.send(topic, name, data, self)
                case BePresent(topic, None):
                    self._context.presence.leave(topic, self)
                case BePresent(topic, str() as data, frame):
                    if not self._context.presence.enter(topic, self._device, data, self):
                        self._perform(self._fault(PresenceFull(*self._context.presence.room), frame))
                case Acknowledge(position):
                    self._context.acks.record(self._device, position)
                case Authenticate():
                    return self._authenticate(action)
                case Follow():
                    return action
        return None

    def _spend_signal(self) -> bool:
        """Count a signal. False if there were too many."""
        rate = self._context.signal_rate
        allowed = self._context.clock() * rate
        spent = max(self._spent_signals, allowed - rate) + 1
        if spent > allowed:
            metrics.SIGNALS_DROPPED.labels(reason="rate").inc()
            return False
        self._spent_signals = spent
        return True

    async def _send_signal_if_allowed(self, action: SendSignal) -> None:
        """Send a signal in a topic for which the right to read is not enough."""
        try:
            is_allowed = await self._context.signals.may_send(self.user, action.topic)
        except GrantsUnavailable as error:
            self._log_refusal(error)
            self._perform(self._fault(Unavailable(), action.frame))
            return
        if not is_allowed:
            self._perform(self._fault(MayNotSignal(), action.frame))
        elif action.topic in self._session.topics:  # else the right to read has ended meanwhile
            self._context.signals.send(action.topic, action.name, action.data, self)

    @property
    def _device(self) -> Key:
        return Key(self._session.user, self._session.device or self._socket.session)

    def _authenticate(self, action: Authenticate) -> Authenticate | None:
        """Accept or refuse a token at once; the same action if that has to be awaited."""
        try:
            claims = self._context.authenticate(action.frame.token)
        except ClientFault as fault:
            self._perform(self._fault(fault, action.frame.id))
            return None
        if claims is None or (isinstance(action.frame, wire.Hello) and action.frame.since == wire.STORED):
            return action
        self._perform(self._accept(action.frame, claims))
        return None

    async def _identify(self, action: Authenticate) -> None:
        """The same, awaited, with the position that the client's device acknowledged, if it resumes from that."""
        if self._session.phase is Phase.GREETING:  # the hello has arrived, so it is not late any more
            self._session.deadline = self._context.clock() + 2 * HELLO_TIMEOUT
        frame, recalled = action.frame, None
        try:
            claims = self._context.authenticate(frame.token)
            if claims is None:
                assert self._context.identify is not None
                claims = await self._context.identify(frame.token)
        except ClientFault as fault:
            self._perform(self._fault(fault, frame.id))
            return
        if isinstance(frame, wire.Hello) and frame.since == wire.STORED:
            recalled = await self._context.acks.recall(Key(claims.user, frame.device or frame.session or ""))
            frame = frame.model_copy(update={"since": recalled})
        self._perform(self._accept(frame, claims, recalled))

    def _accept(
        self, frame: wire.Hello | wire.Renew, claims: Claims, recalled: Position | None = None
    ) -> list[Action]:
        """Answer a frame with a valid token."""
        if self._session.phase is Phase.ENDED:
            return []
        remaining = claims.expires - time.time()
        expires = self._context.clock() + remaining
        if isinstance(frame, wire.Renew):
            actions = self._session.renewed(frame, claims.user, expires, round(remaining, 3))
        else:
            actions = self._greet(frame, claims.user, expires, round(remaining, 3), recalled)
        self._cancel_expiry()
        self._watch_expiry(self._context.clock())
        return actions

    def _greet(
        self, hello: wire.Hello, user: str, expires: float, expires_in: float, recalled: Position | None
    ) -> list[Action]:
        try:
            self._socket.authenticated(user)
        except ClientFault as fault:
            return self._fault(fault, hello.id)
        self._session.welcomed(user, hello, expires)
        return [
            Say(
                wire.welcome(
                    hello.id,
                    session=self._socket.session,
                    user=user,
                    pos=self._context.hub.position,
                    heartbeat=self._context.heartbeat,
                    schema=self._context.schema(),
                    limits={"topics": self._context.max_topics, "frame_bytes": self._context.frame_bytes},
                    expires_in=expires_in,
                    numbers=hello.numbers,
                    since=recalled,
                    last_close=self._context.close_history.lookup(hello.session or "", user),
                )
            )
        ]

    def _watch_expiry(self, now: float) -> None:
        """See to it that nothing is sent once the token has expired: the next tick may be too late for that."""
        remaining = self._session.deadline - now
        if self._session.phase is Phase.LIVE and self._expiry is None and remaining <= EXPIRY_NOTICE:
            self._expiry = asyncio.get_running_loop().call_later(max(0.0, remaining), self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self._perform(self._session.tick(self._context.clock()))

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None

    # Subscribing.

    async def _complete_and_answer(self, rest: NeedsDatabase | None) -> None:
        """Do what needs the database, then answer the frames that were queued meanwhile."""
        try:
            while True:
                if isinstance(rest, Follow):
                    await self._subscribe(rest)
                elif isinstance(rest, Authenticate):
                    await self._identify(rest)
                elif rest is not None:
                    await self._send_signal_if_allowed(rest)
                else:
                    await asyncio.sleep(0)  # answers that need no database must not keep other clients waiting
                if not self._inbox:
                    break
                rest = self._answer(self._inbox.popleft())
        except Exception:
            log.exception("internal_error", session=self._socket.session)
            self._socket.close(1011, "internal error")
        finally:
            self._subscribing = None
            self._inbox = None

    async def _subscribe(self, follow: Follow) -> None:
        """Follow the topic if the user may read it: live at once, or through a replay from `since`."""
        self._socket.spend(RIGHT)
        try:
            # Asked first: between the answer about the right and its use, nothing is awaited.
            tables = await self._context.columns.columns(follow.topic) if follow.asked is not None else {}
            start = await self._readable_from(follow)
            if self._session.phase is not Phase.LIVE:
                return  # the connection is being closed
            if start is None:
                self._socket.charge(REFUSAL_CHARGE)
                self._refuse(follow, NoSuchTopic())
                return
            if follow.asked is not None:
                follow = self._session.checked(follow, filters.view(follow.asked, tables))
                self._socket.charge(FILTER_CHARGE)
            if follow.snapshot is not None:
                await self._begin_with_snapshot(follow, follow.snapshot, start)
            elif follow.since is None:
                self._follow_live(follow)
            else:
                await self._resume(follow, follow.since, start)
            if follow.presence is not None and self._is_current(follow):
                self._perform([BePresent(follow.topic, follow.presence, None)])
        except (BadFilter, FilterTooLarge) as fault:
            self._socket.charge(REFUSAL_CHARGE)
            self._refuse(follow, fault)
        except (GrantsUnavailable, LogUnavailable) as error:
            self._log_refusal(error)
            self._refuse(follow, Unavailable())

    def _log_refusal(self, error: GrantsUnavailable | LogUnavailable) -> None:
        count = self._context.refusals.add(error.reason)
        if count is not None:
            log.warning("log_unavailable", session=self._socket.session, reason=error.reason, refused=count)

    async def _readable_from(self, follow: Follow) -> Seq | None:
        return await self._context.rights.readable_from(follow.topic, self, lambda: self._is_current(follow))

    def _is_current(self, follow: Follow) -> bool:
        """Whether this is still the client's subscription to the topic."""
        return self._session.topics.get(follow.topic) is follow

    def _refuse(self, follow: Follow, fault: ClientFault) -> None:
        """A topic that does not exist and one that is forbidden look the same."""
        self._context.hub.unfollow(follow.topic, self)
        self._context.presence.leave(follow.topic, self)
        self._session.forget(follow.topic)
        self._perform(self._fault(fault, follow.frame))

    def _follow_live(self, follow: Follow) -> None:
        """Follow the topic from the head of the log on."""
        position = self._context.hub.position
        self.send(wire.subscribed(follow.frame, follow.topic, position))
        if self._is_slow and self._replay is not None:  # live, it would be ahead of the client's other topics
            self._replay.add(follow.topic, position.seq)
        else:
            self._context.hub.follow(follow.topic, self, follow.view)

    async def _begin_with_snapshot(self, follow: Follow, wanted: Wanted, start: Seq) -> None:
        """Send the rows of a topic, then replay it from there. The user may read the topic from `start` on."""
        hub = self._context.hub
        self._socket.charge(SNAPSHOT_CHARGE)
        while True:
            discontinuity = hub.discontinuity
            try:
                snapshot = await self._context.snapshots.take(wanted, self.numbers, start)
            except SnapshotTooLarge as fault:
                if self._is_current(follow):
                    self._refuse(follow, fault)
                return
            if hub.discontinuity is discontinuity:
                break
            readable_from = await self._readable_from(follow)
            if readable_from is None:
                self._refuse(follow, NoSuchTopic())
                return
            start = readable_from
        if not self._is_current(follow):
            return  # revoked, or left, meanwhile
        self.send(wire.subscribed(follow.frame, follow.topic, snapshot.position, snapshot=True))
        deadline = asyncio.get_running_loop().time() + SNAPSHOT_TIMEOUT
        self._running_replay(snapshot.discontinuity).add_snapshot(follow.topic, snapshot, deadline)

    async def _resume(self, follow: Follow, since: Position, start: Seq) -> None:
        """Replay a topic from `since` if the log can prove that nothing is missing; else reset it to the head.

        The user may read the topic from `start` on.
        """
        hub, topic = self._context.hub, follow.topic
        while True:
            discontinuity = hub.discontinuity
            reason = await self._reset_reason(since)
            if hub.discontinuity is discontinuity:
                break
            readable_from = await self._readable_from(follow)
            if readable_from is None:
                self._refuse(follow, NoSuchTopic())
                return
            start = readable_from
        if not self._is_current(follow):
            return  # revoked, or left, meanwhile
        if reason is not None:
            metrics.RESETS.labels(reason=reason).inc()
            self._follow_live(follow)
            self.send(wire.reset(topic, reason, hub.position))
            if since == hub.position:  # to the client this looks like a replay, which has an end
                self.send(wire.resumed(since, 0))
            return
        self.send(wire.subscribed(follow.frame, topic, since))
        if since.seq < start - 1:
            since = Position(since.epoch, Seq(start - 1))
            metrics.RESETS.labels(reason="rights").inc()
            self.send(wire.reset(topic, "rights", since))
        self._running_replay(discontinuity).add(topic, since.seq)

    async def _reset_reason(self, since: Position) -> str | None:
        """Why the stream cannot be continued from `since`; None if it can."""
        reason = await self._context.log_reader.continuity(since)
        if reason is None and self._session.seen is not None:  # else the client could get what it has seen again
            reason = await self._context.log_reader.continuity(self._session.seen)
        if reason is None:
            await self._context.wait_until_delivered(since.seq)  # another daemon may be ahead of this one
        return reason

    # Replaying.

    def _fall_behind(self, discontinuity: Discontinuity | None) -> None:
        """Replay every live topic from the hub's position, up to which everything was delivered.

        `discontinuity` is the last one before that; None if the position itself is not continuous.
        """
        hub = self._context.hub
        suspended = hub.suspend(self._session.topics, self)
        if suspended:
            self._set_slow(slow=True)
            replay = self._running_replay(discontinuity)
            for topic, last_frame in suspended.items():
                replay.add(topic, hub.position.seq, last_frame)

    def _running_replay(self, discontinuity: Discontinuity | None) -> Replay:
        """The replay that runs, or a new one, to which topics may be added at once."""
        if self._replay is None:
            self._replay = Replay(
                self,
                self._context.replay_reader,
                self._context.hub,
                self._context.router,
                limit=self._context.chunk,
                discontinuity=discontinuity,
                turns=self._context.replays.setdefault(self.user, Turns()),
            )
            self._context.replays[self.user].running += 1
            self._replay.task = asyncio.create_task(self._run_replay(self._replay))
            self._replay.task.add_done_callback(partial(_count_out, self._context.replays, self.user))
        return self._replay

    async def _run_replay(self, replay: Replay) -> None:
        try:
            await replay.run()
            self.send(wire.resumed(self._context.hub.position, replay.sent))
            if not self._is_slow:
                metrics.RESUMES.labels(outcome="replayed" if replay.sent else "lossless").inc()
            self._set_slow(slow=False)
        except Exception:
            log.exception("internal_error", session=self._socket.session)
            self._socket.close(1011, "internal error")
        finally:
            self._replay = None

    def _is_replaying(self, topic: Topic) -> bool:
        return self._replay is not None and topic in self._replay

    def _leave_replay(self, topic: Topic) -> None:
        if self._replay is not None:
            self._replay.discard(topic)

    def _set_slow(self, *, slow: bool) -> None:
        if slow != self._is_slow:
            self._is_slow = slow
            metrics.CLIENTS_BEHIND.inc(1 if slow else -1)
            metrics.BEHIND.inc(slow)


def _count_out(replays: dict[str, Turns], user: str, _: object) -> None:
    """A replay of this user has ended, perhaps before it began."""
    replays[user].running -= 1
    if not replays[user].running:
        del replays[user]


def bye(reason: str, clients: int) -> bytes:
    """The payload that announces a planned close; `clients` reconnect about one in a millisecond, within seconds."""
    return wire.bye(reason, random.randint(0, min(MAX_SPREAD_MS, 250 + clients)))  # noqa: S311
