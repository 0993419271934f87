"""Clients that keep the rules of docs/protocol.md and note everything, and the verdict on what they heard."""

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

LINE = (OSError, EOFError, TimeoutError, WebSocketException)
"""What a broken line raises."""

Place = tuple[str, int]
"""Epoch and seq."""


def place(position: str) -> Place:
    epoch, _, seq = position.rpartition(":")
    return epoch, int(seq)


@dataclass(frozen=True, slots=True)
class Told:
    """One change, as a client heard it; `floor` is the `since` of its connection."""

    connection: int
    topic: str
    at: Place
    floor: Place | None
    row: str
    version: int
    token: str
    time: float


@dataclass(frozen=True, slots=True)
class Reset:
    """A reset, and the tokens that the client found when it then read the topic's state."""

    connection: int
    topic: str
    reason: str
    at: Place
    known: "asyncio.Task[frozenset[str]]"


@dataclass(frozen=True, slots=True)
class Gap:
    """A `prev` that is ahead of what the client had of the topic."""

    topic: str


@dataclass(eq=False)
class Checker:
    """A client that comes back by itself. `url` is asked for at every connection, `state` after every reset.

    `silence` is how many seconds without a frame it bears, `pause` the longest time until it comes back.
    """

    user: str
    topics: Sequence[str]
    url: Callable[[], str]
    state: Callable[[str], Awaitable[frozenset[str]]]
    silence: float = 30.0
    pause: float = 0.2
    local: str | None = None
    history: list[Told | Reset | Gap] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)  # of each, how many changes were replayed
    refused: set[str] = field(default_factory=set)
    revoked: dict[str, Place] = field(default_factory=dict)
    closes: list[int | None] = field(default_factory=list)
    live: asyncio.Event = field(default_factory=asyncio.Event)
    connections: int = 0
    stale: bool = False
    live_at: float = 0.0
    line: ClientConnection | None = None

    def __post_init__(self) -> None:
        self._position: str | None = None
        self._places: dict[str, Place] = {}
        self._pending: set[str] = set()
        self._replaying: set[str] = set()
        self._floor: Place | None = None
        self._heard: set[str] = set()
        self._waiting: dict[str, asyncio.Event] = {}
        self._gone: set[str] = set()
        self._pong = asyncio.Event()

    async def run(self) -> None:
        """Connect, follow, and come back, until cancelled."""
        while self.topics:
            with suppress(*LINE):
                async with connect(
                    self.url(),
                    subprotocols=[Subprotocol(SUBPROTOCOL)],
                    max_size=None,
                    ping_interval=None,
                    compression=None,
                    open_timeout=self.silence,
                    close_timeout=0.2,
                    local_addr=(self.local, 0) if self.local else None,
                ) as self.line:
                    try:
                        await self._converse(self.line)
                    finally:
                        self.closes.append(self.line.close_code)
            self.live.clear()
            self.line = None
            await asyncio.sleep(random.uniform(0, self.pause))

    async def has(self, token: str) -> None:
        """Wait until this write has been heard."""
        if token not in self._heard:
            await self._waiting.setdefault(token, asyncio.Event()).wait()

    async def settle(self) -> None:
        """Wait until what was on its way has come."""
        if self.line is not None:
            self._pong.clear()
            with suppress(*LINE):
                await self.line.send('{"op":"ping"}')
                await self._pong.wait()

    def ask_again(self) -> None:
        """Ask for topics that were lost or refused, at the next connection."""
        self.refused.clear()
        self.revoked.clear()
        self._gone.clear()

    async def _converse(self, line: ClientConnection) -> None:
        self.connections += 1
        since = self._position
        hello = {"op": "hello", "token": daemon.token(self.user)} | ({"since": since} if since else {})
        await line.send(json.dumps(hello))
        welcome = await self._next(line)
        if welcome["op"] != "welcome":
            raise ConnectionResetError
        self._position = since or welcome["pos"]
        self._floor = place(since) if since else None
        self._pending = {topic for topic in self.topics if topic not in self._gone}
        self._replaying = set()
        for topic in sorted(self._pending):
            await self._ask(line, topic)
        while True:
            await self._hear(await self._next(line))

    async def _ask(self, line: ClientConnection, topic: str) -> None:
        await line.send(json.dumps({"op": "subscribe", "topic": topic, "id": topic}))

    async def _next(self, line: ClientConnection) -> dict[str, Any]:
        async with asyncio.timeout(self.silence):
            frame: dict[str, Any] = json.loads(await line.recv())
        return frame

    async def _hear(self, frame: dict[str, Any]) -> None:
        match frame["op"]:
            case "changes":
                self._changes(frame)
            case "subscribed":
                topic = frame["topic"]
                if self._floor is not None and place(frame["pos"]) == self._floor:
                    self._replaying.add(topic)
                    self._places.setdefault(topic, place(frame["pos"]))
                else:
                    self._places[topic] = place(frame["pos"])
                    self._pending.discard(topic)
            case "resumed":
                self._pending -= self._replaying
                for topic in self._places.keys() - self._pending:  # of those, too, that were live but slow
                    self._places[topic] = max(self._places[topic], place(frame["pos"]))
                self._replaying.clear()
                self.resumes.append(frame["replayed"])
                self._move(frame["pos"])
            case "head":
                if "pos" in frame:
                    self._move(frame["pos"])
                self.stale = frame.get("stale", False)
            case "reset":
                self._reset(frame)
            case "revoked":
                self.revoked[frame["topic"]] = place(frame["pos"])
                self._lose(frame["topic"])
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
        epoch, _ = place(frame["pos"])
        reached = self._places[topic]
        if topic not in self._pending and place(frame["prev"])[0] == reached[0] and place(frame["prev"]) > reached:
            self.history.append(Gap(topic))
        for change in frame["changes"]:
            record = change.get("record")
            if change["table"] != "messages" or record is None or not record["metadata"]:
                continue
            token = record["metadata"]["token"]
            self.history.append(
                Told(
                    self.connections,
                    topic,
                    (epoch, change["seq"]),
                    self._floor,
                    record["id"],
                    int(record["content"]),
                    token,
                    now,
                )
            )
            self._heard.add(token)
            if token in self._waiting:
                self._waiting.pop(token).set()
        self._places[topic] = max(reached, place(frame["pos"])) if reached[0] == epoch else place(frame["pos"])
        self._move(frame["pos"])

    def _reset(self, frame: dict[str, Any]) -> None:
        topic = frame["topic"]
        self._places[topic] = place(frame["pos"])
        known = asyncio.create_task(self._read(topic))
        self.history.append(Reset(self.connections, topic, frame["reason"], place(frame["pos"]), known))

    async def _read(self, topic: str) -> frozenset[str]:
        found = await self.state(topic)
        self._heard |= found
        for token in found & self._waiting.keys():
            self._waiting.pop(token).set()
        return found

    async def _refused(self, frame: dict[str, Any]) -> None:
        if "id" not in frame or self.line is None:
            raise ConnectionResetError
        if frame["retry"]:
            await asyncio.sleep(random.uniform(0, self.pause))
            await self._ask(self.line, frame["id"])
        else:
            self.refused.add(frame["id"])
            self._lose(frame["id"])

    def _lose(self, topic: str) -> None:
        self._gone.add(topic)
        self._pending.discard(topic)
        self._replaying.discard(topic)


@dataclass(frozen=True)
class Verdict:
    """What must not be: all 0, or the fault was not survived."""

    lost: int = 0
    duplicate: int = 0
    reordered_row: int = 0
    reordered_seq: int = 0
    reused: int = 0  # numbers that name two changes
    leaked: int = 0
    phantom: int = 0  # told, not committed, and no reset followed
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
    """Compare what the clients heard with what committed.

    `resets` are the reasons that the fault explains. `forbidden` says what a client must not hear, `owed` what it
    must: both are asked for writes of its topics.
    """
    count: defaultdict[str, int] = defaultdict(int)
    names: dict[Place, str] = {}
    for checker in checkers:
        for topic in checker.topics:
            await _judge(checker, topic, truth, resets, count, names)
            have = await _have(checker, topic)
            due = {write.token for write in truth.values() if write.topic == topic and owed(checker, write)}
            count["lost"] += len(due - have)
            told = {event.token for event in checker.history if isinstance(event, Told) and event.topic == topic}
            count["leaked"] += sum(forbidden(checker, truth[token]) for token in told & truth.keys())
    return Verdict(**count)


async def _judge(
    checker: Checker,
    topic: str,
    truth: Mapping[str, Write],
    resets: Collection[str],
    count: defaultdict[str, int],
    names: dict[Place, str],
) -> None:
    """One client and one topic, in the order in which it heard."""
    connection = 0
    last: Place | None = None
    ever: set[tuple[Place, str]] = set()
    told: set[Place] = set()  # in this connection
    tokens: dict[str, Place] = {}  # since the last reset
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
            case Told():
                if event.connection != connection:
                    connection, last = event.connection, None
                    told.clear()
                below = event.floor is not None and event.floor[0] == event.at[0] and event.at <= event.floor
                if event.at in told or below:
                    count["duplicate"] += 1
                    continue
                if last is not None and last[0] == event.at[0] and event.at < last:
                    count["reordered_seq"] += 1
                told.add(event.at)
                last = event.at
                count["reused"] += names.setdefault(event.at, event.token) != event.token
                if (event.at, event.token) in ever:
                    continue  # a client leaves out what it had while another topic was pending: rule 5
                ever.add((event.at, event.token))
                count["duplicate"] += event.token in tokens
                tokens[event.token] = event.at
                count["reordered_row"] += event.version <= versions.get(event.row, -1)
                versions[event.row] = event.version
                if event.token not in truth:
                    suspects.add(event.token)
    count["phantom"] += len(suspects)


async def _have(checker: Checker, topic: str) -> set[str]:
    """What a client knows of a topic at the end: since its last reset, and what it read then."""
    have: set[str] = set()
    for event in checker.history:
        if event.topic == topic:
            if isinstance(event, Reset):
                have = set(await event.known)
            elif isinstance(event, Told):
                have.add(event.token)
    return have
