"""What clients share beside the log, for tests: in memory, or nothing."""

import time
from collections.abc import Callable, Collection, Mapping
from typing import TypedDict

from daemon.core.change import Position, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.core.ports import AckStore, Broadcast, PeopleStore, SignalRights
from daemon.core.presence import Key, People, Person
from daemon.delivery.acks import Acks
from daemon.delivery.presence import Presence
from daemon.delivery.signals import Signals


class SharedPeople:
    """What the processes of one database know, in memory: their people by process."""

    def __init__(self) -> None:
        self.processes: dict[str, dict[tuple[Topic, Key], Person]] = {}
        self.online: set[str] = set()
        self.called: list[tuple[list[str], list[str]]] = []


class MemoryPeople:
    """The PeopleStore of one process. While it is `broken`, nothing works; with `has_broken_hooks`, all but they."""

    def __init__(self, shared: SharedPeople, process: str) -> None:
        self.broken = False
        self.has_broken_hooks = False
        self._shared = shared
        self._process = process

    async def store(self, present: Mapping[tuple[Topic, Key], Person], gone: Collection[tuple[Topic, Key]]) -> bool:
        self._work()
        is_intact = self._process in self._shared.processes
        people = self._shared.processes.setdefault(self._process, {})
        people.update(present)
        for place in present:
            knowing = [others for others in self._shared.processes.values() if place in others]
            if not all(others[place].leaves for others in knowing):
                for others in knowing:
                    if others[place].leaves:
                        del others[place]
        for place in gone:
            people.pop(place, None)
        return is_intact

    async def others(self, topics: Collection[Topic]) -> dict[Topic, list[People]]:
        self._work()
        others = [people for name, people in self._shared.processes.items() if name != self._process]
        return {
            topic: [{key: one for (at, key), one in people.items() if at == topic} for people in others]
            for topic in topics
        }

    async def call_hooks(self) -> bool:
        self._work()
        if self.has_broken_hooks:
            raise LogUnavailable("broken")
        present = {key.user for people in self._shared.processes.values() for _, key in people}
        came, went = present - self._shared.online, self._shared.online - present
        if came or went:
            self._shared.called.append((sorted(came), sorted(went)))
        self._shared.online = present
        return bool(present)

    def _work(self) -> None:
        if self.broken:
            raise LogUnavailable("broken")


class MemoryAcks:
    """An AckStore in memory."""

    def __init__(self) -> None:
        self.acks: dict[Key, Position] = {}
        self.writes = 0

    async def store(self, acks: Mapping[Key, Position]) -> None:
        self.writes += 1
        self.acks.update(acks)

    async def stored(self, device: Key) -> Position | None:
        return self.acks.get(device)


class ReadersMaySignal:
    """SignalRights that nobody has to ask."""

    def concerns(self, topic: Topic) -> bool:
        return False

    async def may_signal(self, user: str, topic: Topic) -> bool:
        raise AssertionError(topic)


class Sharing(TypedDict):
    """The fields of a ClientContext."""

    signals: Signals
    presence: Presence
    acks: Acks


async def nowhere(pieces: Collection[str]) -> None:
    """A Broadcast that reaches nobody."""


def encode(payload: bytes) -> bytes:
    """One line for each frame."""
    return payload + b"\n"


def sharing(
    hub: Hub,
    *,
    process: str = "here",
    broadcast: Broadcast = nowhere,
    people: PeopleStore | None = None,
    acks: AckStore | None = None,
    rights: SignalRights | None = None,
    clock: Callable[[], float] | None = None,
) -> Sharing:
    """Its parts do not run."""
    signals = Signals(process, hub, encode, broadcast, rights or ReadersMaySignal())
    people = people or MemoryPeople(SharedPeople(), process)
    presence = Presence(people, encode, signals.announce, clock or time.monotonic, has_hooks=True)
    signals.on_present = presence.changed_elsewhere
    return {"signals": signals, "presence": presence, "acks": Acks(acks or MemoryAcks())}
