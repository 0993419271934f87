"""Clients that follow the rules of docs/protocol.md and record everything, and the verdict on what they received."""

import asyncio
import json
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from daemon.core.wire import SUBPROTOCOL
from tests.faults.oracle import Write
from tests.support import daemon

CONNECTION_ERRORS = (OSError, EOFError, TimeoutError, WebSocketException)
"""What a broken connection raises."""

Position = tuple[str, int]
"""Epoch and seq."""


def parse(position: str) -> Position:
    """A position of the protocol, EPOCH:SEQ."""
    epoch, _, seq = position.rpartition(":")
    return epoch, int(seq)


@dataclass(frozen=True, slots=True)
class Delivered:
    """One change as a client received it; `since` is the position with which its connection resumed."""

    connection: int
    topic: str
    at: Position
    since: Position | None
    row: str
    version: int
    token: str
    time: float


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset, and the tokens that the client found when it read the topic's state afterwards."""

    connection: int
    topic: str
    reason: str
    at: Position
    known: "asyncio.Task[frozenset[str]]"


@dataclass(frozen=True, slots=True)
class Gap:
    """A `prev` that is ahead of what the client had of the topic."""

    topic: str


@dataclass(eq=False)
class Checker:
    """A client that reconnects by itself. It calls `url` before every connection and `state` after every reset.

    `silence` is how many seconds without a frame it tolerates, `pause` the longest delay before it reconnects.
    `local` is the address that it connects from.
    """

    user: str
    topics: Sequence[str]
    url: Callable[[], str]
    state: Callable[[str], Awaitable[frozenset[str]]]
    silence: float = 30.0
    pause: float = 0.2
    local: str | None = None
    history: list[Delivered | Reset | Gap] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)  # the number of changes replayed, by resume
    refused: set[str] = field(default_factory=set)
    revoked: dict[str, Position] = field(default_factory=dict)
    closes: list[int | None] = field(default_factory=list)
    live: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    stale: bool = False  # what the last `head` said
    warnings: int = 0  # how often a `head` said that
    live_at: float = 0.0
    connection: ClientConnection | None = None

    def __post_init__(self) -> None:
        self._position: str | None = None
        self._positions: dict[str, Position] = {}
        self._pending: set[str] = set()
        self._replaying: set[str] = set()
        self._since: Position | None = None
        self._received: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}
        self._dropped: set[str] = set()
        self._pong = asyncio.Event()

    async def run(self) -> None:
        """Connect, follow, and reconnect until cancelled."""
        while self.topics:
            with suppress(*CONNECTION_ERRORS):
                async with connect(
                    self.url(),
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    max_size=None,
                    ping_interval=None,
                    compression=None,
                    open_timeout=self.silence,
                    close_timeout=0.2,
                    local_addr=(self.local, 0) if self.local else None,
                ) as self.connection:
                    try:
                        await self._follow(self.connection)
                    finally:
                        self.closes.append(self.connection.close_code)
            self.live.clear()
            self.connection = None
            await asyncio.sleep(random.uniform(0, self.pause))

    async def received(self, token: str) -> None:
        """Wait until this write has been received."""
        if token not in self._received:
            await self._waiting.setdefault(token, asyncio.Event()).wait()

    async def settle(self) -> None:
        """Wait until everything that the server has sent so far has arrived."""
        if self.connection is not None:
            self._pong.clear()
            with suppress(*CONNECTION_ERRORS):
                await self.connection.send('{"op":"ping"}')
                await self._pong.wait()

    def retry_lost_topics(self) -> None:
        """At the next connection, subscribe again to topics that were revoked or refused."""
        self.refused.clear()
        self.revoked.clear()
        self._dropped.clear()

    async def _follow(self, connection: ClientConnection) -> None:
        self.connections += 1
        since = self._position
        hello = {"op": "hello", "token": daemon.token(self.user)} | ({"since": since} if since else {})
        await connection.send(json.dumps(hello))
        welcome = await self._next(connection)
        if welcome["op"] != "welcome":
            raise ConnectionResetError
        self._position = since or welcome["pos"]
        self._since = parse(since) if since else None
        self._pending = {topic for topic in self.topics if topic not in self._dropped}
        self._replaying = set()
        for topic in sorted(self._pending):
            await self._subscribe(connection, topic)
        while True:
            await self._handle(await self._next(connection))

    async def _subscribe(self, connection: ClientConnection, topic: str) -> None:
        await connection.send(json.dumps({"op": "subscribe", "topic": topic, "id": topic}))

    async def _next(self, connection: ClientConnection) -> dict[str, Any]:
        async with asyncio.timeout(self.silence):
            frame: dict[str, Any] = json.loads(await connection.recv())
        return frame

    async def _handle(self, frame: dict[str, Any]) -> None:
        match frame["op"]:
            case "changes":
                self._changes(frame)
            case "subscribed":
                topic = frame["topic"]
                if self._since is not None and parse(frame["pos"]) == self._since:
                    self._replaying.add(topic)
                    self._positions.setdefault(topic, parse(frame["pos"]))
                else:
                    self._positions[topic] = parse(frame["pos"])
                    self._pending.discard(topic)
            case "resumed":
                self._pending -= self._replaying
                for topic in self._positions.keys() - self._pending:  # including live topics that had fallen behind
                    self._positions[topic] = max(self._positions[topic], parse(frame["pos"]))
                self._replaying.clear()
                self.resumes.append(frame["replayed"])
                self._move(frame["pos"])
            case "head":
                if "pos" in frame:
                    self._move(frame["pos"])
                self.stale = frame.get("stale", False)
                self.warnings += self.stale
            case "reset":
                self._reset(frame)
            case "revoked":
                self.revoked[frame["topic"]] = parse(frame["pos"])
                self._drop(frame["topic"])
            case "error":
                await self._refused(frame)
            case "pong":
                self._pong.set()
        if not self._pending and not self.live.is_set():
            self.live_at = asyncio.get_running_loop().time()
            self.live.set()

    def _move(self, position: str) -> None:
        if not self._pending:
            self._position = position

    def _changes(self, frame: dict[str, Any]) -> None:
        topic, now = frame["topic"], asyncio.get_running_loop().time()
        epoch, _ = parse(frame["pos"])
        reached = self._positions[topic]
        if topic not in self._pending and parse(frame["prev"])[0] == reached[0] and parse(frame["prev"]) > reached:
            self.history.append(Gap(topic))
        for change in frame["changes"]:
            record = change.get("record")
            if change["table"] != "messages" or record is None or not record["metadata"]:
                continue
            token = record["metadata"]["token"]
            self.history.append(
                Delivered(
                    self.connections,
                    topic,
                    (epoch, change["seq"]),
                    self._since,
                    record["id"],
                    int(record["content"]),
                    token,
                    now,
                )
            )
            self._received.add(token)
            if token in self._waiting:
                self._waiting.pop(token).set()
        self._positions[topic] = max(reached, parse(frame["pos"])) if reached[0] == epoch else parse(frame["pos"])
        self._move(frame["pos"])

    def _reset(self, frame: dict[str, Any]) -> None:
        topic = frame["topic"]
        self._positions[topic] = parse(frame["pos"])
        known = asyncio.create_task(self._read(topic))
        self.history.append(Reset(self.connections, topic, frame["reason"], parse(frame["pos"]), known))

    async def _read(self, topic: str) -> frozenset[str]:
        found = await self.state(topic)
        self._received |= found
        for token in found & self._waiting.keys():
            self._waiting.pop(token).set()
        return found

    async def _refused(self, frame: dict[str, Any]) -> None:
        if "id" not in frame or self.connection is None:
            raise ConnectionResetError
        if frame["retry"]:
            await asyncio.sleep(random.uniform(0, self.pause))
            await self._subscribe(self.connection, frame["id"])
        else:
            self.refused.add(frame["id"])
            self._drop(frame["id"])

    def _drop(self, topic: str) -> None:
        self._dropped.add(topic)
        self._pending.discard(topic)
        self._replaying.discard(topic)


@dataclass(frozen=True)
class Verdict:
    """How often each guarantee was broken. If any count is not 0, the fault was not survived."""

    lost: int = 0
    duplicate: int = 0
    reordered_row: int = 0
    reordered_seq: int = 0
    reused: int = 0  # numbers that name two changes
    leaked: int = 0
    phantom: int = 0  # sent, not committed, and not followed by a reset
    unexplained_reset: int = 0
    gap: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{f.name} {n}" for f in fields(self) if (n := getattr(self, f.name))) or "clean"


CLEAN = Verdict()


async def judge(
    checkers: Iterable[Checker],
    truth: Mapping[str, Write],
    *,
    resets: Collection[str] = (),
    forbidden: Callable[[Checker, Write], bool] = lambda _, __: False,
    owed: Callable[[Checker, Write], bool] = lambda _, __: True,
) -> Verdict:
    """Compare what the clients received with what committed.

    `resets` are the reset reasons that the fault explains. `forbidden` says which writes of its topics a client must
    not receive, `owed` which it must.
    """
    count: defaultdict[str, int] = defaultdict(int)
    names: dict[Position, str] = {}
    for checker in checkers:
        for topic in checker.topics:
            await _judge(checker, topic, truth, resets, count, names)
            have = await _known(checker, topic)
            due = {write.token for write in truth.values() if write.topic == topic and owed(checker, write)}
            count["lost"] += len(due - have)
            sent = {event.token for event in checker.history if isinstance(event, Delivered) and event.topic == topic}
            count["leaked"] += sum(forbidden(checker, truth[token]) for token in sent & truth.keys())
    return Verdict(**count)


async def _judge(
    checker: Checker,
    topic: str,
    truth: Mapping[str, Write],
    resets: Collection[str],
    count: defaultdict[str, int],
    names: dict[Position, str],
) -> None:
    """Judge one client and one topic, in the order of arrival."""
    connection = 0
    last: Position | None = None
    ever: set[tuple[Position, str]] = set()
    sent: set[Position] = set()  # in this connection
    tokens: dict[str, Position] = {}  # since the last reset
    versions: dict[str, int] = {}  # likewise
    suspects: set[str] = set()
    for event in checker.history:
        if event.topic != topic:
            continue
        match event:
            case Gap():
                count["gap"] += 1
            case Reset():
                count["unexplained_reset"] += event.reason not in resets
                tokens.clear()
                versions.clear()
                suspects.clear()
                last = None
            case Delivered():
                if event.connection != connection:
                    connection, last = event.connection, None
                    sent.clear()
                below = event.since is not None and event.since[0] == event.at[0] and event.at <= event.since
                if event.at in sent or below:
                    count["duplicate"] += 1
                    continue
                if last is not None and last[0] == event.at[0] and event.at < last:
                    count["reordered_seq"] += 1
                sent.add(event.at)
                last = event.at
                count["reused"] += names.setdefault(event.at, event.token) != event.token
                if (event.at, event.token) in ever:
                    continue  # rule 5: a client skips what it received while another topic was pending
                ever.add((event.at, event.token))
                count["duplicate"] += event.token in tokens
                tokens[event.token] = event.at
                count["reordered_row"] += event.version <= versions.get(event.row, -1)
                versions[event.row] = event.version
                if event.token not in truth:
                    suspects.add(event.token)
    count["phantom"] += len(suspects)


async def _known(checker: Checker, topic: str) -> set[str]:
    """What a client has of a topic at the end: what it read after its last reset, and what it received since."""
    have: set[str] = set()
    for event in checker.history:
        if event.topic == topic:
            if isinstance(event, Reset):
                have = set(await event.known)
            elif isinstance(event, Delivered):
                have.add(event.token)
    return have
