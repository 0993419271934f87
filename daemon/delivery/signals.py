"""Signals: to the followers in this process at once, to those of other processes in batches."""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Final

from daemon import metrics
from daemon.core import wire
from daemon.core.change import Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Follower, Hub
from daemon.core.ports import Broadcast, Encode, SignalRights
from daemon.core.signals import MAX_MESSAGE, Assembler, Message, Signal, pieces
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

INTERVAL: Final = 0.05  # seconds between two messages to other processes
ANSWER_AGE: Final = 10.0  # seconds for which an answer about a right counts
MAX_ANSWERS: Final = 10_000  # that are remembered
MAX_WAITING: Final = MAX_MESSAGE // 2  # bytes: beyond them, other processes do not get a signal


class Signals:
    """Sends the signals of this process's clients, and delivers those of others.

    `process` is the name of this process. `on_present` is called with topics in which another process says that
    somebody has come, gone or changed their data.
    """

    def __init__(self, process: str, hub: Hub, encode: Encode, broadcast: Broadcast, rights: SignalRights) -> None:
        self.on_present: Callable[[Collection[Topic]], None] = lambda _: None
        self._process = process
        self._hub = hub
        self._encode = encode
        self._broadcast = broadcast
        self._rights = rights
        self._answers: dict[tuple[str, Topic], tuple[bool, float]] = {}  # what was asked, and until when it counts
        self._assembler = Assembler(process)
        self._signals: list[Signal] = []
        self._present: dict[Topic, None] = {}
        self._size = 0  # bytes that wait to be sent
        self._wakeup = asyncio.Event()
        self._sending = Progress()

    def needs_right(self, topic: Topic) -> bool:
        """Whether `may_send` has to be asked for this topic."""
        return self._rights.concerns(topic)

    async def may_send(self, user: str, topic: Topic) -> bool:
        """Whether the user may, or might a few seconds ago. Raises GrantsUnavailable."""
        now = time.monotonic()
        answer, until = self._answers.get((user, topic), (False, 0.0))
        if until < now:
            answer = await self._rights.may_signal(user, topic)
            if len(self._answers) >= MAX_ANSWERS:
                self._answers.clear()
            self._answers[user, topic] = answer, now + ANSWER_AGE
        return answer

    def send(self, topic: Topic, name: str, data: str, sender: Follower) -> None:
        """Send a signal to every live follower of the topic but its sender. `data` is JSON."""
        metrics.SIGNALS.inc()
        self._deliver(topic, wire.signal(topic, name, data, sender.user), sender)
        signal = Signal(topic=topic, name=name, user=sender.user, data=data)
        size = len(signal.model_dump_json().encode())
        if self._size + size > MAX_WAITING:
            metrics.SIGNALS_DROPPED.labels(reason="full").inc()
            return
        self._size += size
        self._signals.append(signal)
        self._wakeup.set()

    def announce(self, topics: Collection[Topic]) -> None:
        """Tell other processes that somebody in these topics has come, gone or changed their data."""
        for topic in topics:
            size = 4 * len(topic)
            if topic not in self._present and self._size + size <= MAX_WAITING:  # else they find out by themselves
                self._present[topic] = None
                self._size += size
                self._wakeup.set()

    def receive(self, text: str) -> None:
        """A notification has arrived on the channel of the signals."""
        try:
            message = self._assembler.add(text)
        except ValueError:
            metrics.SIGNALS_DROPPED.labels(reason="malformed").inc()
            return
        if message is None:
            return
        for signal in message.signals:
            topic = Topic(signal.topic)
            self._deliver(topic, wire.signal(topic, signal.name, signal.data, signal.user), None)
        if message.present:
            self.on_present([Topic(topic) for topic in message.present])

    async def run(self) -> None:
        """Send what waits, until cancelled."""
        number = time.time_ns() // 1000
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            message = Message(signals=self._signals, present=list(self._present))
            self._signals, self._present, self._size = [], {}, 0
            number += 1
            try:
                await self._broadcast(pieces(self._process, number, message))
            except LogUnavailable as error:
                metrics.SIGNALS_DROPPED.labels(reason="unsent").inc(len(message.signals))
                if self._sending.fail(error.reason):
                    log.warning("sharing_failed", what="signals", reason=error.reason)
            else:
                self._sending.end()
            await asyncio.sleep(INTERVAL)

    def _deliver(self, topic: Topic, frame: bytes, sender: Follower | None) -> None:
        followers = self._hub.followers(topic)
        if followers:
            encoded = self._encode(frame)
            for follower in followers:
                if follower is not sender:
                    follower.signal(encoded)
