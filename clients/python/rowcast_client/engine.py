"""The rules of docs/protocol.md without I/O: what came in, what to send, and when to try again.

The JavaScript client has the same engine, and both pass the cases of clients/behaviour.
"""

import json
import random as random_module
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, Final, Protocol

Frame = dict[str, Any]
Change = dict[str, Any]
Row = dict[str, Any]
Snapshot = bool | dict[str, int]
Filter = Mapping[str, Any]
"""What is asked for of a topic: the members `where` and `columns` of `subscribe`, if they are."""
People = dict[str, list[dict[str, Any]]]

ANSWER_TIMEOUT: Final = 10.0  # seconds
MAX_BACKOFF: Final = 30.0  # seconds
LATE: Final = 2.0  # seconds; a timer that fires so late was held up: the machine slept, or the program was busy

LATER: Final = frozenset({1011, 1013, 4409, 4429})
"""Close codes after which to reconnect later: see "Close codes" in the protocol."""

NEVER: Final = frozenset({1002, 1003, 1007, 1009, 4400, 4403})
"""Close codes after which to give up. After other codes, reconnect at once, with jitter."""


class RowcastError(Exception):
    """Any error of this client."""


class TopicEnded(RowcastError):
    """A topic is not followed any more: `code` is `revoked`, or the code of the error that refused it."""

    def __init__(self, topic: str, code: str, message: str) -> None:
        super().__init__(f"{topic}: {message}")
        self.topic = topic
        self.code = code


class ConnectionStopped(RowcastError):
    """The connection ended for a reason that reconnecting would not change. `code` is the close code, or 0."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"The connection ended and cannot be resumed: {reason or code}.")
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Position:
    """A position in the log: "<epoch>:<seq>". Only numbers of the same epoch can be compared."""

    epoch: str
    seq: int

    @classmethod
    def parse(cls, text: str) -> "Position":
        """Read what the server sent."""
        epoch, _, seq = text.rpartition(":")
        return cls(epoch, int(seq))

    def is_beyond(self, other: "Position | None") -> bool:
        """Whether it is after the other, or of another epoch."""
        return other is None or self.epoch != other.epoch or self.seq > other.seq

    def __str__(self) -> str:
        return f"{self.epoch}:{self.seq}"


def _greatest(before: Position | None, position: Position) -> Position:
    return position if before is None or position.is_beyond(before) else before


def _values(key: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(key[column] for column in sorted(key))


class TopicRows:
    """The rows of a topic: by table, and by key."""

    def __init__(self) -> None:
        self._tables: dict[str, dict[str, tuple[tuple[Any, ...], Row]]] = {}

    def of(self, table: str) -> dict[str, tuple[tuple[Any, ...], Row]]:
        """The values of each key, and the row."""
        return self._tables.setdefault(table, {})

    def apply(self, table: str, kind: str, key: Mapping[str, Any], record: Row | None) -> None:
        """Store a row, or remove it."""
        if kind == "delete" or record is None:
            self.of(table).pop(identity(key), None)
        else:
            self.of(table)[identity(key)] = (_values(key), record)

    def clear(self) -> None:
        """Forget all rows."""
        self._tables.clear()


def identity(key: Mapping[str, Any]) -> str:
    """A key as text."""
    return json.dumps(_values(key))


class Sink(Protocol):
    """What follows a topic.

    `shown`: what others who are present see of the user; None: nothing, and the user does not see them.
    """

    keeps_rows: bool
    source: TopicRows | None
    shown: dict[str, Any] | None

    def receive(self, changes: list[Change]) -> None:
        """Changes, or one reset."""

    def receive_signal(self, frame: Frame) -> None:
        """Another client has sent a signal."""

    def receive_people(self, people: People) -> None:
        """Who is present has changed."""

    def set_ready(self, ready: bool, /) -> None:
        """Whether everything has been received."""

    def end(self, error: RowcastError | None) -> None:
        """The topic is not followed any more; None: the client was closed."""


class Outputs(Protocol):
    """What the engine asks for."""

    def open(self, *, fresh: bool) -> None:
        """Fetch a token, another one than the last if `fresh`, and connect.

        The answers are `dialing()`, `opened()` and `closed()`.
        """

    def renew(self) -> None:
        """Fetch another token for the open connection. The answer is `renew()`."""

    def send(self, frame: Frame) -> None:
        """Send a frame on the open connection."""

    def close(self) -> None:
        """End the connection, without an answer."""

    def emit(self, name: str, value: Any) -> None:  # noqa: ANN401
        """Tell the application."""


@dataclass(eq=False, slots=True)
class Topic:
    """One topic.

    It is `idle` without a connection, `asked` until the server answers `subscribe`, `replaying` from then until
    `resumed`, and `live` afterwards. `loaded`: its last snapshot is complete, or it needs none. `at`: how far it has
    been processed. `since` and `id` are those of its last subscribe. `retry_at`: when to subscribe again. `shown`:
    what the server was told to show of the user. `people`: who is present, by user.
    """

    snapshot: Snapshot | None
    loaded: bool
    filter: Filter
    phase: str = "idle"
    at: Position | None = None
    since: str | None = None
    id: int | None = None
    retry_at: float | None = None
    rows: TopicRows | None = None
    shown: dict[str, Any] | None = None
    people: People = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)


class Engine:
    """The rules of the protocol.

    Its invariant: every topic has been processed up to `position`. The position therefore stands still while any
    topic is pending: topics catch up one after another, and a number from the middle would skip what the others miss.
    """

    def __init__(
        self,
        outputs: Outputs,
        *,
        numbers: str | None = None,
        device: str | None = None,
        stored: bool = False,
        now: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        self.position: Position | None = None
        self.status = "idle"
        self.stale = False
        self._out = outputs
        self._numbers = numbers
        self._device = device
        self._stored = stored  # begin where this device has acknowledged
        self._unsent_ack: Position | None = None
        self._now = now
        self._random = random
        self._topics: dict[str, Topic] = {}
        self._session: str | None = None  # sent in the next hello: its welcome says why the server closed this one
        self._hello_since: str | None = None
        self._last_id = 0
        self._failures = 0
        self._token_refused = False
        self._bye_delay: float | None = None
        self._retry_at: float | None = None
        self._silence_at: float | None = None  # when the connection counts as lost
        self._max_silence = ANSWER_TIMEOUT
        self._expires_at = inf
        self._renew_at: float | None = None  # when to ask for a newer token

    @property
    def deadline(self) -> float | None:
        """When `tick` must be called, in seconds of the clock; None: not at all."""
        times = (
            self._retry_at,
            self._silence_at,
            self._renew_at,
            *(topic.retry_at for topic in self._topics.values()),
        )
        return min((moment for moment in times if moment is not None), default=None)

    # What the application wants

    def start(self) -> None:
        """Connect."""
        if self.status == "idle":
            self._connect()

    def close(self) -> None:
        """Disconnect for good."""
        self._disconnect()
        self._set_status("closed")
        self._end_topics(None)

    def pause(self) -> None:
        """Disconnect until `unpause`: the application does not keep up."""
        if self.status not in {"idle", "paused", "stopped", "closed"}:
            self._disconnect()
            self._set_status("paused")

    def unpause(self) -> None:
        """Connect again."""
        if self.status == "paused":
            self._connect()

    def wake(self) -> None:
        """The network is back, or the machine awake: reconnect now, or find out whether we are connected."""
        if self.status == "waiting":
            self._connect()
        elif self._is_welcomed:
            self._out.send({"op": "ping"})
            self._silence_at = self._now() + ANSWER_TIMEOUT

    def follow(
        self, name: str, sink: Sink, snapshot: Snapshot | None = None, filter_: Filter = MappingProxyType({})
    ) -> None:
        """Follow a topic.

        Raises RowcastError if it is followed without a snapshot or with another filter, or the client closed.
        """
        if self.status in {"stopped", "closed"}:
            raise RowcastError("This client is closed.")
        topic = self._topics.get(name)
        if topic and snapshot and not topic.snapshot:
            raise RowcastError(f"{name} is already followed without a snapshot: ask for it in the first call.")
        if topic and topic.filter != filter_:
            raise RowcastError(f"{name} is already followed with another filter: use the same, or another Rowcast.")
        if topic is None:
            topic = self._topics[name] = Topic(snapshot or None, loaded=not snapshot, filter=filter_)
        if topic.rows is None and (sink.keeps_rows or topic.snapshot):
            topic.rows = TopicRows()
        sink.source = topic.rows
        topic.sinks.append(sink)
        if topic.phase == "live":
            sink.set_ready(True)
        if topic.people:
            sink.receive_people(topic.people)
        self._show(name, topic)
        if topic.phase == "idle" and self._is_welcomed:
            self._subscribe(name, topic)
        self._settle()

    def present(self, name: str, sink: Sink) -> None:
        """What a sink shows has changed."""
        topic = self._topics.get(name)
        if topic is not None and sink in topic.sinks:
            self._show(name, topic)

    def signal(self, name: str, signal: str, data: Any) -> bool:  # noqa: ANN401
        """Send a signal to the other followers of a topic. False if there is no connection: then nobody gets it."""
        topic = self._topics.get(name)
        if topic is None or topic.phase == "idle" or not self._is_welcomed:
            return False
        self._out.send({"op": "signal", "topic": name, "name": signal, "data": data})
        return True

    def ack(self) -> None:
        """Let the server keep the position for this device, now or once there is a connection."""
        self._unsent_ack = self.position
        self._send_ack()

    def unfollow(self, name: str, sink: Sink) -> None:
        """End what `follow` began; without effect if it has ended."""
        topic = self._topics.get(name)
        if topic is None or sink not in topic.sinks:
            return
        topic.sinks.remove(sink)
        if topic.sinks:
            self._show(name, topic)
            return
        del self._topics[name]
        if self._is_welcomed:
            self._out.send({"op": "unsubscribe", "topic": name})
        self._settle()

    # What happens to the connection

    def dialing(self) -> None:
        """The token is there, and the connection is being opened."""
        self._silence_at = self._now() + ANSWER_TIMEOUT

    def opened(self, token: str) -> None:
        """The connection is open: say hello."""
        self._max_silence = ANSWER_TIMEOUT
        self._silence_at = self._now() + ANSWER_TIMEOUT
        self._hello_since = str(self.position) if self.position else "stored" if self._stored else None
        frame = {
            "op": "hello", "token": token, "since": self._hello_since, "seen": self._seen, "session": self._session,
            "device": self._device, "numbers": self._numbers,
        }  # fmt: skip
        self._out.send({name: value for name, value in frame.items() if value is not None})

    def renew(self, token: str | None) -> None:
        """There is another token for this connection; None: not yet."""
        if not self._is_welcomed:
            return
        if token is None:
            self._schedule_renewal()
        else:
            self._out.send({"op": "token", "token": token})

    def closed(self, code: int, reason: str) -> None:
        """The connection is lost: reconnect as the close code demands."""
        self._disconnect()
        if code in NEVER or (code == 4401 and self._token_refused):
            self.stop(code, reason)
            return
        self._token_refused = self._token_refused or code == 4401
        if code in LATER:
            self._failures = max(self._failures, 3)
        # Full jitter: clients that were disconnected together must not reconnect together.
        delay = self._random() * min(MAX_BACKOFF, 2.0**self._failures)
        self._failures = min(self._failures + 1, 5)
        self._retry_at = self._now() + (delay if self._bye_delay is None else self._bye_delay)
        self._bye_delay = None
        self._set_status("waiting")

    def stop(self, code: int, reason: str) -> None:
        """Give up."""
        self._disconnect()
        self._set_status("stopped")
        error = ConnectionStopped(code, reason)
        self._end_topics(error)
        self._out.emit("error", error)

    def tick(self) -> None:
        """The deadline has passed."""
        now = self._now()
        for name, topic in list(self._topics.items()):
            if topic.retry_at is not None and topic.retry_at <= now:
                self._subscribe(name, topic)
        if self._renew_at is not None and self._renew_at <= now:
            self._renew_at = None
            self._out.renew()
        if self._retry_at is not None and self._retry_at <= now:
            self._connect()
        elif self._silence_at is not None and self._silence_at <= now:
            # If this call is late, so may be the frames that have arrived.
            if self._is_welcomed and now - self._silence_at > LATE:
                self.wake()
            else:
                self.closed(1006, "silence")

    def receive(self, frame: Frame) -> None:
        """A frame has arrived. Frames of unknown kinds are ignored."""
        self._silence_at = self._now() + self._max_silence
        match frame["op"]:
            case "welcome":
                self._on_welcome(frame)
            case "renewed":
                self._on_token(frame)
            case "subscribed":
                self._on_subscribed(frame)
            case "snapshot":
                self._on_snapshot(frame)
            case "changes":
                self._on_changes(frame)
            case "resumed":
                self._on_resumed(frame)
            case "reset":
                self._on_reset(frame)
            case "revoked":
                self._end_topic(frame["topic"], "revoked", "The right to read this topic has ended.")
                self._out.emit("revoked", {"topic": frame["topic"]})
            case "head":
                if "pos" in frame:
                    self._advance(Position.parse(frame["pos"]))
                self._set_stale(bool(frame.get("stale")))
            case "signal":
                topic = self._followed(frame)
                for sink in list(topic.sinks) if topic else ():
                    sink.receive_signal(frame)
            case "presence":
                self._on_presence(frame)
            case "error":
                self._on_error(frame)
            case "bye":
                self._bye_delay = frame["retry_ms"] / 1000
        self._settle()

    # Frames

    def _on_welcome(self, frame: Frame) -> None:
        if self._numbers == "string" and frame.get("numbers") != "string":
            self.stop(0, "numbers")
            return
        self._session = frame["session"]
        self._token_refused = False
        self._bye_delay = None
        self._max_silence = frame["heartbeat"] * 1.5 + LATE
        self._silence_at = self._now() + self._max_silence
        self._on_token(frame)
        if self._hello_since == "stored":
            self._hello_since = frame.get("since")
        self.position = self.position or Position.parse(self._hello_since or frame["pos"])
        self._set_status("resuming")
        self._out.emit("welcome", frame)
        for name, topic in list(self._topics.items()):
            if topic.phase == "idle":
                self._subscribe(name, topic)
        self._send_ack()

    def _on_token(self, frame: Frame) -> None:
        self._expires_at = self._now() + frame.get("expires_in", inf)
        self._schedule_renewal()

    def _schedule_renewal(self) -> None:
        """Renew the token when most of its time is over, unless nearly all is. Clients spread over a fifth of it."""
        now = self._now()
        left = self._expires_at - now
        self._renew_at = None if left < 1 or left == inf else now + left * (0.7 + 0.2 * self._random())

    def _on_subscribed(self, frame: Frame) -> None:
        topic = self._topics.get(frame["topic"])
        if topic is None or topic.id != frame.get("id"):
            return
        position = Position.parse(frame["pos"])
        if frame.get("snapshot"):
            for sink in topic.sinks:
                sink.set_ready(False)  # until the last frame of the snapshot
            if topic.rows is not None:
                topic.rows.clear()
            again = topic.at is not None  # a loop has missed what happened before this snapshot
            topic.at = position
            topic.phase = "replaying"
            if again:
                _deliver(topic.sinks, [{"kind": "reset", "topic": frame["topic"], "reason": "snapshot"}])
            return
        topic.at = _greatest(topic.at, position)
        # Live from here, unless it is replayed. If it was to start earlier, a reset follows.
        if frame["pos"] == topic.since:
            topic.phase = "replaying"
        else:
            self._make_live(topic)

    def _on_snapshot(self, frame: Frame) -> None:
        topic = self._followed(frame)
        if topic is None:
            return
        if topic.rows is not None:
            for row in frame["rows"]:
                topic.rows.apply(frame["table"], "insert", row["key"], row["record"])
        if not frame["more"]:
            for sink in topic.sinks:
                sink.set_ready(True)

    def _on_changes(self, frame: Frame) -> None:
        topic = self._followed(frame)
        if topic is None:
            return
        if topic.phase == "live" and Position.parse(frame["prev"]).is_beyond(topic.at):
            self.closed(1006, "gap")  # leave this frame: the position is still before the gap
            return
        position, at = Position.parse(frame["pos"]), topic.at
        fresh = [change for change in frame["changes"] if Position(position.epoch, change["seq"]).is_beyond(at)]
        topic.at = _greatest(at, position)
        if topic.rows is not None:
            for change in fresh:
                topic.rows.apply(change["table"], change["kind"], change["key"], change.get("record"))
        if fresh:
            _deliver(topic.sinks, fresh)
        self._advance(position)

    def _on_resumed(self, frame: Frame) -> None:
        position = Position.parse(frame["pos"])
        for topic in self._topics.values():
            if topic.phase == "replaying":
                self._make_live(topic)
            if topic.phase == "live":
                topic.at = _greatest(topic.at, position)  # also those of a slow client
        self._advance(position)

    def _on_reset(self, frame: Frame) -> None:
        topic = self._followed(frame)
        if topic is None:
            return
        name, reason = frame["topic"], frame["reason"]
        topic.at = Position.parse(frame["pos"])
        if topic.rows is not None:
            topic.rows.clear()
        _deliver(topic.sinks, [{"kind": "reset", "topic": name, "reason": reason}])
        self._out.emit("reset", {"topic": name, "reason": reason})
        if topic.snapshot and self._topics.get(name) is topic and self._is_welcomed:
            topic.loaded = False
            for sink in topic.sinks:
                sink.set_ready(False)
            self._out.send({"op": "unsubscribe", "topic": name})
            self._subscribe(name, topic)

    def _on_presence(self, frame: Frame) -> None:
        topic = self._followed(frame)
        if topic is None or topic.shown is None:
            return
        people = frame.get("state", topic.people)
        for one in (*frame.get("left", ()), *frame.get("updated", ()), *frame.get("joined", ())):
            rest = [other for other in people.get(one["user"], ()) if other["device"] != one["device"]]
            people = {name: devices for name, devices in people.items() if name != one["user"]}
            if "data" in one:
                rest.append({name: value for name, value in one.items() if name != "user"})
            if rest:
                people[one["user"]] = rest
        self._set_people(topic, people)

    def _on_error(self, frame: Frame) -> None:
        for name, topic in list(self._topics.items()):
            if topic.id is None or topic.id != frame.get("id"):
                continue
            if frame["retry"]:
                topic.retry_at = self._now() + 1 + 2 * self._random()
            else:
                self._out.emit("error", self._end_topic(name, frame["code"], frame["message"]))

    # The rest

    @property
    def _is_welcomed(self) -> bool:
        return self.status in {"live", "resuming"}

    @property
    def _all_live(self) -> bool:
        return all(topic.phase == "live" for topic in self._topics.values())

    @property
    def _seen(self) -> str | None:
        """How far any topic is ahead of the position, because another was pending."""
        here = self.position
        places = [topic.at for topic in self._topics.values() if topic.at]
        reached = [at.seq for at in places if here and at.epoch == here.epoch]
        return str(Position(here.epoch, max(reached))) if here and max(reached, default=-1) > here.seq else None

    def _followed(self, frame: Frame) -> Topic | None:
        """The topic of a frame, unless the frame was sent before the server received our last unsubscribe."""
        topic = self._topics.get(frame["topic"])
        return topic if topic and topic.phase in {"replaying", "live"} else None

    def _subscribe(self, name: str, topic: Topic) -> None:
        self._last_id += 1
        topic.phase, topic.id, topic.retry_at, topic.since = "asked", self._last_id, None, None
        frame: Frame = {"op": "subscribe", "id": topic.id, "topic": name, **topic.filter}
        if topic.snapshot and not topic.loaded:
            frame["snapshot"] = topic.snapshot
        elif self._hello_since is not None:
            topic.since = str(self.position)
            if topic.since != self._hello_since:  # otherwise it starts where the hello said
                frame["since"] = topic.since
        if topic.shown is not None:
            frame["presence"] = {"data": topic.shown}
        self._out.send(frame)

    def _show(self, name: str, topic: Topic) -> None:
        """Be present with what the last sink that wants it says, and tell the server if that is new."""
        wanted = [sink.shown for sink in topic.sinks if sink.shown is not None]
        shown = wanted[-1] if wanted else None
        if shown == topic.shown:
            return
        topic.shown = shown
        if topic.phase != "idle" and self._is_welcomed:
            self._out.send({"op": "presence", "topic": name, "data": shown})
        if shown is None:
            self._set_people(topic, {})

    def _set_people(self, topic: Topic, people: People) -> None:
        topic.people = people
        for sink in list(topic.sinks):
            sink.receive_people(people)

    def _send_ack(self) -> None:
        if self._unsent_ack is not None and self._is_welcomed:
            self._out.send({"op": "ack", "pos": str(self._unsent_ack)})
            self._unsent_ack = None

    def _make_live(self, topic: Topic) -> None:
        topic.phase, topic.loaded = "live", True
        for sink in topic.sinks:
            sink.set_ready(True)

    def _advance(self, position: Position) -> None:
        """Move the position, unless a topic is pending."""
        if self._is_welcomed and self._all_live:
            self.position = position

    def _settle(self) -> None:
        if self._is_welcomed:
            if self._all_live:
                self._failures = 0
            self._set_status("live" if self._all_live else "resuming")

    def _end_topic(self, name: str, code: str, message: str) -> TopicEnded:
        error = TopicEnded(name, code, message)
        topic = self._topics.pop(name, None)
        for sink in topic.sinks if topic else ():
            sink.end(error)
        return error

    def _end_topics(self, error: RowcastError | None) -> None:
        topics, self._topics = self._topics, {}
        for topic in topics.values():
            for sink in topic.sinks:
                sink.end(error)

    def _connect(self) -> None:
        self._retry_at = None
        self._set_status("connecting")
        self._out.open(fresh=self._token_refused)

    def _disconnect(self) -> None:
        self._retry_at = self._silence_at = self._renew_at = None
        for topic in self._topics.values():
            topic.phase, topic.retry_at = "idle", None
        self._out.close()
        self._set_stale(False)

    def _set_stale(self, stale: bool, /) -> None:
        if self.stale != stale:
            self.stale = stale
            self._out.emit("stale", stale)

    def _set_status(self, status: str) -> None:
        if self.status != status:
            self.status = status
            self._out.emit("status", status)


def _deliver(sinks: Iterable[Sink], changes: list[Change]) -> None:
    for sink in list(sinks):
        sink.receive(changes)
