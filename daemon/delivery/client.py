"""One client's life: performs what its session decides, against the log, the grants and the socket."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from daemon import metrics
from daemon.core import wire
from daemon.core.change import Position, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.close_history import CloseHistory
from daemon.core.errors import (
    ClientFault,
    GrantsUnavailable,
    LogUnavailable,
    TooManyFrames,
    Unavailable,
)
from daemon.core.hub import Hub
from daemon.core.ports import Encode, Grants, LogReader, Socket
from daemon.core.session import (
    MAX_TOPICS,
    Action,
    Authenticate,
    Authorize,
    CloseConnection,
    Follow,
    Phase,
    Say,
    Session,
    Unfollow,
)
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.replay import History, replay
from daemon.logs import get_logger

log = get_logger()

MAX_QUEUED_FRAMES = 2 * MAX_TOPICS  # frames of one client that wait for an answer: enough to subscribe to everything
HELLO_TIMEOUT = 5.0  # seconds
STALE_DELAY = 5.0  # seconds without a read of the log


class Claims(Protocol):
    """What a good token says."""

    @property
    def user(self) -> str:
        """Who this is."""

    @property
    def expires(self) -> float:
        """Until when, in seconds since 1970."""


@dataclass(frozen=True)
class ClientContext:
    """What all clients share.

    `history` is what replays read. `reached` waits until the hub has come to a place in the log. `silence` says how
    many seconds ago the log was last read. A client for whom more than `queue_bytes` wait falls behind.
    """

    hub: Hub
    log_reader: LogReader
    history: History
    grants: Grants
    router: PackRouter
    authenticate: Callable[[str], Claims]
    reached: Callable[[Seq], Coroutine[Any, Any, None]]
    encode: Encode
    silence: Callable[[], float]
    close_history: CloseHistory
    clock: Callable[[], float]
    heartbeat: float
    schema: str
    frame_bytes: int
    queue_bytes: int
    chunk: int = 1000

    def open_client(self, socket: Socket) -> "Client":
        """Begin with a client whose handshake has succeeded."""
        return Client(self, socket)


class Client:
    """The ClientHandler of one socket, and the hub's Follower.

    Frames are answered in order. As long as nothing has to be waited for, no task is made; a question to the
    database makes one, which lives until every waiting frame is answered. A replay is a task of its own.

    A topic is live, where the hub delivers, or in `_behind`, from where the replay goes on. A client that does not
    read what is live is slow: it has nothing live, everything behind, and a replay that waits for it to read. It
    need not know: to it that is the same stream.
    """

    __slots__ = (
        "_behind",
        "_context",
        "_head_due",
        "_inbox",
        "_replay",
        "_session",
        "_slow",
        "_socket",
        "_stale",
        "_told",
        "_worker",
    )

    def __init__(self, context: ClientContext, socket: Socket) -> None:
        self._context = context
        self._socket = socket
        self._session = Session(deadline=context.clock() + HELLO_TIMEOUT)
        self._inbox: deque[bytes] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._replay: asyncio.Task[None] | None = None
        self._behind: dict[Topic, Seq] = {}
        self._told: dict[Topic, Seq] = {}  # of those behind, where the last frame was, if not there
        self._slow = False
        self._stale = False  # what the client was told last
        # Spread over the first beat, so that clients who came together are not all told at once.
        self._head_due = context.clock() + context.heartbeat * random.uniform(0.5, 1.0)  # noqa: S311

    # The gateway calls these.

    def message_received(self, text: bytes) -> None:
        """Answer one message, or queue it behind those that wait for an answer."""
        if self._worker is not None:
            if len(self._inbox) < MAX_QUEUED_FRAMES:
                self._inbox.append(text)
            else:
                self._perform(self._fault(TooManyFrames()))
            return
        waiting = self._perform(self._decide(text))
        if waiting:
            self._worker = asyncio.create_task(self._work(waiting))

    def tick(self, now: float) -> None:
        """Mind the hello's deadline and the heartbeat."""
        if now >= self._session.deadline:
            self._perform(self._session.tick(now))
        stale = self._context.silence() > STALE_DELAY
        if now < self._head_due and stale == self._stale:
            return
        # Whoever has something to read needs no sign of life, and whoever does not read gets no more.
        if self._session.phase is Phase.LIVE and not self._socket.queued():
            self._head_due = now + self._context.heartbeat
            self._stale = stale
            self._say(wire.head(None if self._behind else self._context.hub.position, stale=stale))

    def connection_lost(self, close: Close | None) -> None:
        """The connection has ended."""
        if close is not None and self._session.user:
            self._context.close_history.record(self._socket.session, self._session.user, close)
        self._session.end(1006, "lost")
        for task in (self._worker, self._replay):
            if task is not None:
                task.cancel()
        for topic in self._session.topics:
            self._context.hub.unfollow(topic, self)
        self._session.topics.clear()
        self._behind.clear()
        self._set_slow(slow=False)

    # The hub and the replay call these.

    def deliver(self, frames: bytes) -> None:
        """Hand over live frames; if too much waits for the peer now, nothing more is live."""
        if self._socket.write(frames) > self._context.queue_bytes:
            self._fall_behind(self._context.hub.breaks)

    @property
    def user(self) -> str:
        """Whose rights count."""
        return self._session.user

    def revoked(self, topic: Topic) -> None:
        """The right to this topic has ended; the hub says so to the peer."""
        self._session.forget(topic)
        self._leave_behind(topic)

    def tell(self, payload: bytes) -> None:
        """Hand over what was missed."""
        self._say(payload)

    async def drained(self) -> None:
        """Wait until the peer has taken most of what was sent."""
        await self._socket.drained()

    def moved(self) -> None:
        """Numbers have been lost: begin anew with everything that is live."""
        self._fall_behind(self._context.hub.breaks - 1)

    async def look_up_rights(self) -> dict[Topic, Seq]:
        """Leave what may no longer be read; where the rights to the rest began."""
        rights: dict[Topic, Seq] = {}
        for topic in tuple(self._behind):
            while topic in self._behind and topic not in rights:
                try:
                    begun = await self._readable_from(topic)
                except GrantsUnavailable as error:
                    log.debug("log_unavailable", session=self._socket.session, reason=error.reason)
                    await asyncio.sleep(random.uniform(0.5, 1.5))  # noqa: S311
                    continue
                if begun is not None:
                    rights[topic] = begun
                elif topic in self._behind:
                    self._say(wire.revoked(topic, self._context.hub.position))
                    self._context.hub.unfollow(topic, self)
                    self.revoked(topic)
        return rights

    # What the session decides.

    def _decide(self, text: bytes) -> list[Action]:
        try:
            return self._session.receive(wire.parse(text))
        except ClientFault as fault:
            return self._fault(fault, wire.frame_id(text))

    def _fault(self, fault: ClientFault, frame: wire.FrameId | None = None) -> list[Action]:
        metrics.ERRORS.labels(code=fault.code).inc()
        return self._session.fault(fault, frame)

    def _perform(self, actions: Sequence[Action]) -> list[Authorize | Follow]:
        """Do what needs no waiting; what does, and all behind it, is returned."""
        for place, action in enumerate(actions):
            match action:
                case Say(payload):
                    self._say(payload)
                case CloseConnection(code, reason):
                    self._socket.close(code, reason)
                case Unfollow(topic):
                    self._unfollow(topic)
                case Authenticate():
                    self._perform(self._greet(action))
                case Follow(topic, None, _, frame):
                    self._follow(topic, frame)
                case Authorize() | Follow():
                    return [a for a in actions[place:] if isinstance(a, Authorize | Follow)]
        return []

    async def _work(self, waiting: Sequence[Authorize | Follow]) -> None:
        """Answer what needs the database, then the frames that came in meanwhile."""
        try:
            while True:
                for question in waiting:
                    await self._ask(question)
                if not self._inbox:
                    break
                waiting = self._perform(self._decide(self._inbox.popleft()))
        except Exception:
            log.exception("internal_error", session=self._socket.session)
            self._socket.close(1011, "internal error")
        finally:
            self._worker = None

    async def _ask(self, question: Authorize | Follow) -> None:
        try:
            if isinstance(question, Authorize):
                begun = await self._readable_from(question.topic)
                for follow in self._perform(self._session.granted(question.topic, question.frame, begun)):
                    await self._ask(follow)
            else:
                await self._resume(question)
        except (GrantsUnavailable, LogUnavailable) as error:
            log.warning("log_unavailable", session=self._socket.session, reason=error.reason)
            self._context.hub.unfollow(question.topic, self)
            self._session.forget(question.topic)
            self._perform(self._fault(Unavailable(), question.frame))

    async def _readable_from(self, topic: Topic) -> Seq | None:
        """Where the right to a topic began; from now on the hub minds its end."""
        hub = self._context.hub
        while True:
            breaks = hub.breaks
            # From before the question on: a right that ends behind the answer must not be missed.
            hub.ask(topic, self)
            try:
                begun = await self._context.grants.readable_from(self.user, topic)
                if begun is not None:
                    await self._context.reached(begun)  # what comes before it here is not for this user
            finally:
                ended = hub.answered(topic, self)
            if hub.breaks == breaks:
                break
        if begun is None or ended > begun or topic not in self._session.topics:
            return None
        hub.wait(topic, self)
        return begun

    def _greet(self, action: Authenticate) -> list[Action]:
        hello = action.hello
        try:
            claims = self._context.authenticate(hello.token)
        except ClientFault as fault:
            return self._fault(fault, hello.id)
        remaining = claims.expires - time.time()
        self._session.welcomed(claims.user, hello.since, self._context.clock() + remaining, hello.seen)
        return [
            Say(
                wire.welcome(
                    hello.id,
                    session=self._socket.session,
                    user=claims.user,
                    pos=self._context.hub.position,
                    heartbeat=self._context.heartbeat,
                    schema=self._context.schema,
                    limits={"topics": MAX_TOPICS, "frame_bytes": self._context.frame_bytes},
                    last_close=self._context.close_history.lookup(hello.session or "", claims.user),
                )
            )
        ]

    def _follow(self, topic: Topic, frame: wire.FrameId | None) -> None:
        position = self._context.hub.position
        self._say(wire.subscribed(frame, topic, position))
        if self._slow:  # live, it would be ahead of the others
            self._behind[topic] = position.seq
        else:
            self._context.hub.follow(topic, self)

    def _fall_behind(self, breaks: int) -> None:
        """Have every live topic replayed from where the hub is: up to there all has been delivered.

        `breaks` is what the hub had counted when it was.
        """
        hub = self._context.hub
        told = hub.suspend(self._session.topics, self)
        if told:
            self._told |= told
            self._behind |= dict.fromkeys(told, hub.position.seq)
            self._set_slow(slow=True)
            self._begin_replay(breaks)

    def _set_slow(self, *, slow: bool) -> None:
        if slow != self._slow:
            self._slow = slow
            metrics.CLIENTS_BEHIND.inc(1 if slow else -1)
            metrics.BEHIND.inc(slow)

    async def _resume(self, follow: Follow) -> None:
        """Replay a topic from where the client was, if the log can prove that nothing is missing."""
        since = follow.since
        assert since is not None
        begun = follow.begun
        while True:
            breaks = self._context.hub.breaks
            reason = await self._context.log_reader.continuity(since)
            if reason is None and self._session.seen is not None:  # or else what it has seen could come again
                reason = await self._context.log_reader.continuity(self._session.seen)
            if reason is None:
                await self._context.reached(since.seq)  # another daemon may have been ahead of this one
            if self._context.hub.breaks == breaks:
                break
            found = await self._readable_from(follow.topic)
            if found is None:
                self._context.hub.unfollow(follow.topic, self)
                self._perform(self._session.granted(follow.topic, follow.frame, None))
                return
            begun = found
        if follow.topic not in self._session.topics:
            return  # gone while we asked
        if reason is not None:
            metrics.RESETS.labels(reason=reason).inc()
            self._follow(follow.topic, follow.frame)
            self._say(wire.reset(follow.topic, reason, self._context.hub.position))
            if since == self._context.hub.position:  # to the client this looks like a replay, which has an end
                self._say(wire.resumed(since, 0))
            return
        self._say(wire.subscribed(follow.frame, follow.topic, since))
        if since.seq < begun - 1:
            since = Position(since.epoch, Seq(begun - 1))
            metrics.RESETS.labels(reason="rights").inc()
            self._say(wire.reset(follow.topic, "rights", since))
        self._behind[follow.topic] = since.seq
        self._begin_replay(self._context.hub.breaks)

    def _begin_replay(self, breaks: int) -> None:
        if self._replay is None:
            self._replay = asyncio.create_task(self._catch_up(breaks))

    async def _catch_up(self, breaks: int) -> None:
        """Replay what is behind, and go on live."""
        context = self._context
        try:
            replayed = await replay(
                self._behind,
                self,
                lambda topic: context.hub.follow(topic, self),
                log_reader=context.history,
                hub=context.hub,
                router=context.router,
                chunk=context.chunk,
                told=self._told,
                breaks=breaks,
            )
            self._say(wire.resumed(context.hub.position, replayed))
            if not self._slow:
                metrics.RESUMES.labels(outcome="replayed" if replayed else "lossless").inc()
            self._set_slow(slow=False)
        except Exception:
            log.exception("internal_error", session=self._socket.session)
            self._socket.close(1011, "internal error")
        finally:
            self._replay = None

    def _unfollow(self, topic: Topic) -> None:
        self._leave_behind(topic)
        self._context.hub.unfollow(topic, self)

    def _leave_behind(self, topic: Topic) -> None:
        self._behind.pop(topic, None)
        self._told.pop(topic, None)

    def _say(self, payload: bytes) -> None:
        self._socket.write(self._context.encode(payload))


def bye(reason: str, spread_ms: int = 5000) -> bytes:
    """The payload that announces a planned close; clients come back spread over some seconds."""
    return wire.bye(reason, random.randint(0, spread_ms))  # noqa: S311
