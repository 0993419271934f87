"""Signals between the clients of two processes."""

import asyncio
import json
from collections.abc import Collection
from typing import Any

import pytest

from daemon import metrics
from daemon.core.change import Numbers, Position, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.delivery.signals import Signals
from tests.support.sharing import ReadersMaySignal, encode

A, B = Topic("a"), Topic("b")


class Follower:
    """A follower that records its signals."""

    user = "ada"
    numbers = Numbers.JSON
    outlet = None

    def __init__(self) -> None:
        self.signals: list[dict[str, Any]] = []

    def deliver(self, frames: bytes) -> None:
        raise AssertionError(frames)

    def signal(self, frame: bytes) -> None:
        self.signals.append(json.loads(frame))

    def revoked(self, topic: Topic) -> None:
        raise AssertionError(topic)

    def discontinued(self) -> None:
        raise AssertionError


class Process:
    """A process of which every other one receives what it sends, and it too."""

    everyone: list["Process"]

    def __init__(self, name: str, everyone: list["Process"]) -> None:
        self.hub = Hub(encode, lambda change: change)
        self.hub.move(Position("e", Seq(1)), "epoch")
        self.signals = Signals(name, self.hub, encode, self.broadcast, ReadersMaySignal())
        self.present: list[Collection[Topic]] = []
        self.signals.on_present = self.present.append
        self.sent = 0
        self.broken = False
        self.everyone = everyone
        everyone.append(self)

    async def broadcast(self, pieces: Collection[str]) -> None:
        if self.broken:
            raise LogUnavailable("broken")
        self.sent += 1
        for piece in pieces:
            for process in self.everyone:
                process.signals.receive(piece)

    def follower(self, *topics: Topic) -> Follower:
        follower = Follower()
        for topic in topics:
            self.hub.follow(topic, follower)
        return follower


def dropped(reason: str) -> float:
    return float(metrics.SIGNALS_DROPPED.labels(reason=reason)._value.get())


@pytest.fixture
def processes() -> list[Process]:
    everyone: list[Process] = []
    return [Process("one", everyone), Process("two", everyone)]


async def until_sent(process: Process) -> None:
    """Run the signals of the process until everything that waits has been sent."""
    running, before = asyncio.create_task(process.signals.run()), process.sent
    while process.sent == before:
        await asyncio.sleep(0)
    running.cancel()


async def test_signals_reach_each_follower_of_their_topic_once_and_in_one_message(processes: list[Process]) -> None:
    one, two = processes
    sender, near, far, other = one.follower(A), one.follower(A), two.follower(A), two.follower(B)
    for number in range(3):
        one.signals.send(A, "typing", f'{{"number":{number}}}', sender)
    assert [0, 1, 2] == [signal["data"]["number"] for signal in near.signals]
    assert [] == far.signals
    one.signals.announce([A, B, A])
    await until_sent(one)
    assert near.signals == far.signals
    assert {"op": "signal", "topic": "a", "name": "typing", "data": {"number": 0}, "user": "ada"} == far.signals[0]
    assert ([], []) == (sender.signals, other.signals)
    assert (1, [], [[A, B]]) == (one.sent, one.present, two.present)


async def test_what_is_too_much_for_other_processes_is_dropped_and_the_rest_arrives(processes: list[Process]) -> None:
    one, two = processes
    sender, far, before = one.follower(A), two.follower(A), dropped("full")
    for _ in range(20):
        one.signals.send(A, "n", f'"{"x" * 16_000}"', sender)
    lost = dropped("full") - before
    assert 0 < lost < 20
    await until_sent(one)
    assert 20 - lost == len(far.signals)


async def test_signals_full_of_quotes_fit_into_their_message(processes: list[Process]) -> None:
    one, two = processes
    sender, far, before = one.follower(A), two.follower(A), dropped("malformed")
    for _ in range(20):
        one.signals.send(A, "n", json.dumps('"' * 8000), sender)
    await until_sent(one)
    assert 1 < len(far.signals) < 20
    assert before == dropped("malformed")


async def test_signals_that_the_database_does_not_take_are_counted_and_later_ones_arrive(
    processes: list[Process],
) -> None:
    one, two = processes
    sender, far, before = one.follower(A), two.follower(A), dropped("unsent")
    one.broken = True
    one.signals.send(A, "n", "1", sender)
    running = asyncio.create_task(one.signals.run())
    while dropped("unsent") == before:
        await asyncio.sleep(0)
    one.broken = False
    one.signals.send(A, "n", "2", sender)
    while not far.signals:
        await asyncio.sleep(0.001)
    running.cancel()
    assert [2] == [signal["data"] for signal in far.signals]


def test_garbage_on_the_channel_is_counted_and_ignored(processes: list[Process]) -> None:
    one, _ = processes
    before = dropped("malformed")
    for text in ("", "[]", "{}", "\x00", "x" * 7999):
        one.signals.receive(text)
    assert before + 5 == dropped("malformed")
