"""Presence: who is in a topic, told to those who are.

Each process stores its own people under a lease, and keeps those of the others in mind for the topics in which it has
people itself. The database is the truth: other processes are told which topics to read again, and read all of theirs
every few seconds anyway, so a lost message delays news and loses none.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from daemon import metrics
from daemon.core import wire
from daemon.core.change import Topic
from daemon.core.errors import LogUnavailable
from daemon.core.ports import Encode, PeopleStore
from daemon.core.presence import Key, Person, Room, difference, merged
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

INTERVAL: Final = 0.25  # seconds between two rounds
EVERY: Final = 3.0  # seconds between two renewals of the lease, and between two reads of every topic
GRACE: Final = 10.0  # seconds for which somebody who was disconnected stays present
RETRY: Final = 1.0  # seconds from a failure to the next attempt


class Watcher(Protocol):
    """A client that is present. No method waits or raises."""

    def send_presence(self, frame: bytes) -> bool:
        """Take a frame. False if there is too much to read already: then it is told the whole state later."""


@dataclass(slots=True)
class _Own:
    """Somebody who is present through this process, and with how many connections; at 0 since when."""

    person: Person
    connections: int = 0
    gone_at: float = 0.0


class Presence:
    """Who is present in the topics of this process's clients.

    `announce` tells other processes which topics to read again. `has_hooks`: there are packs that want to know who
    has come and gone. `room` is for those who enter; whoever is present stays. Nothing runs and nothing is asked
    while nobody is present anywhere.
    """

    def __init__(
        self,
        store: PeopleStore,
        encode: Encode,
        announce: Callable[[Collection[Topic]], None],
        clock: Callable[[], float],
        *,
        has_hooks: bool = False,
    ) -> None:
        self.room = Room()
        self._store = store
        self._encode = encode
        self._announce = announce
        self._clock = clock
        self._has_hooks = has_hooks
        self._somebody_known = has_hooks  # to the packs; until they have been asked, perhaps of an earlier process
        self._watchers: dict[Topic, dict[Watcher, Key]] = {}
        self._own: dict[Topic, dict[Key, _Own]] = {}
        self._others: dict[Topic, list[dict[Key, Person]]] = {}  # of topics with watchers, once they have been read
        self._sent: dict[Topic, dict[Key, Person]] = {}  # what the watchers know who are not in `_unaware`
        self._unaware: dict[Topic, dict[Watcher, None]] = {}  # they have to be told the state
        self._unread: dict[Topic, None] = {}
        self._unstored: dict[tuple[Topic, Key], None] = {}
        self._touched: dict[Topic, None] = {}  # what is known may differ from what was told
        self._due = 0.0  # when to renew the lease and read every topic
        self._wakeup = asyncio.Event()
        self._working, self._calling = Progress(), Progress()
        metrics.PRESENT.set_function(lambda: sum(map(len, self._own.values())))
        if has_hooks:
            self._wakeup.set()

    # Called by clients.

    def enter(self, topic: Topic, key: Key, data: str, watcher: Watcher) -> bool:
        """Somebody is present, or says something else of themselves. False if too many are."""
        now = datetime.now(UTC)
        people = self._own.setdefault(topic, {})
        own = people.get(key)
        if own is None:
            known = {*self._sent.get(topic, ()), *people} - {key}
            of_user = sum(other.user == key.user for other in known)
            if len(known) >= self.room.devices or of_user >= self.room.devices_of_user:
                return False
            own = people[key] = _Own(Person(data, now, now))
        own.person = own.person._replace(data=data, updated_at=now, leaves=False)
        watchers = self._watchers.setdefault(topic, {})
        if watcher not in watchers:
            own.connections += 1
            watchers[watcher] = key
            self._unaware.setdefault(topic, {})[watcher] = None
        if topic not in self._others:
            self._unread[topic] = None
        self._changed(topic, key)
        return True

    def leave(self, topic: Topic, watcher: Watcher, *, disconnected: bool = False) -> None:
        """Somebody has gone, or has been disconnected and may come back. Without effect if they are not present."""
        watchers = self._watchers.get(topic, {})
        key = watchers.pop(watcher, None)
        if key is None:
            return
        self._unaware.get(topic, {}).pop(watcher, None)
        if not watchers:
            for known in (self._watchers, self._unaware, self._others, self._sent):
                known.pop(topic, None)
        own = self._own[topic][key]
        own.connections -= 1
        if own.connections == 0:
            own.gone_at = self._clock() + GRACE if disconnected else self._clock()
            own.person = own.person._replace(leaves=True)
            self._changed(topic, key)

    # Called by the signals.

    def changed_elsewhere(self, topics: Collection[Topic]) -> None:
        """Another process has changed who is present in these topics."""
        for topic in topics:
            if topic in self._watchers:
                self._unread[topic] = None
        if self._unread or (self._has_hooks and not self._somebody_known):
            self._somebody_known = self._has_hooks
            self._wakeup.set()

    # The rest.

    async def run(self) -> None:
        """Work in rounds until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self.pause()):
                    await self._wakeup.wait()
            self._wakeup.clear()
            await self.round()
            await asyncio.sleep(INTERVAL)

    def pause(self) -> float | None:
        """For how many seconds there is nothing to do; None: until somebody comes."""
        if not (self._own or self._unstored or self._somebody_known):
            return None
        ends = [own.gone_at for people in self._own.values() for own in people.values() if own.connections == 0]
        return max(0.0, min([self._due, *ends]) - self._clock())

    async def round(self) -> None:
        """Store, read and send what is due."""
        self._end_graces()
        is_due = self._clock() >= self._due
        if is_due:
            self._due = self._clock() + EVERY
            self._unread |= dict.fromkeys(self._watchers)
        try:
            has_changed = bool(self._unstored)
            if has_changed or (is_due and self._own):
                await self._write()
            if self._unread:
                await self._read()
        except LogUnavailable as error:
            self._due = self._clock() + RETRY
            if self._working.fail(error.reason):
                log.warning("sharing_failed", what="presence", reason=error.reason)
            self._send_news()
            return
        self._working.end()
        self._send_news()
        self._somebody_known |= has_changed and self._has_hooks
        if self._somebody_known and not self._unstored and (has_changed or is_due):
            await self._call_hooks()

    async def _call_hooks(self) -> None:
        try:
            self._somebody_known = await self._store.call_hooks()
        except LogUnavailable as error:
            if self._calling.fail(error.reason):
                log.warning("sharing_failed", what="hooks", reason=error.reason)
        else:
            self._calling.end()

    def _end_graces(self) -> None:
        now = self._clock()
        for topic, people in list(self._own.items()):
            for key, own in list(people.items()):
                if own.connections == 0 and own.gone_at <= now:
                    del people[key]
                    self._changed(topic, key)
            if not people:
                del self._own[topic]

    async def _write(self) -> None:
        """Renew the lease, and store what has changed. Raises LogUnavailable."""
        changed = list(self._unstored)
        present = {
            (topic, key): own.person
            for topic, key in changed
            if (own := self._own.get(topic, {}).get(key)) is not None
        }
        is_intact = await self._store.store(present, [place for place in changed if place not in present])
        for topic, key in changed:
            own = self._own.get(topic, {}).get(key)
            if (own and own.person) == present.get((topic, key)):  # else it has changed again meanwhile
                self._unstored.pop((topic, key), None)
            if any(key in people and people[key].leaves for people in self._others.get(topic, ())):
                self._unread[topic] = None  # somebody has come here from another process, which waits no longer
        if not is_intact:
            for topic, people in self._own.items():
                for key in people:
                    if (topic, key) not in present:
                        self._unstored[topic, key] = None
            if self._unstored:
                self._wakeup.set()
        self._announce({topic: None for topic, _ in changed})

    async def _read(self) -> None:
        """Read who is present elsewhere. Raises LogUnavailable."""
        topics = [topic for topic in self._unread if topic in self._watchers]
        self._unread.clear()
        try:
            found = await self._store.others(topics) if topics else {}
        except LogUnavailable:
            self._unread |= dict.fromkeys(topics)
            raise
        for topic in topics:
            if topic in self._watchers:
                self._others[topic] = [dict(people) for people in found.get(topic, ())]
                self._touched[topic] = None
                self._forget_who_came_back(topic)

    def _forget_who_came_back(self, topic: Topic) -> None:
        """Do not wait for those who have come back to another process."""
        back = {key for people in self._others[topic] for key, person in people.items() if not person.leaves}
        for key in back & self._own[topic].keys():
            if self._own[topic][key].connections == 0:
                del self._own[topic][key]

    def _send_news(self) -> None:
        """Tell the watchers what has changed, or the state."""
        touched = {*self._touched, *self._unaware} & self._watchers.keys()
        self._touched.clear()
        for topic in touched:
            unaware = self._unaware.setdefault(topic, {})
            before = self._sent.get(topic, {})
            now = merged([*self._others.get(topic, ()), self._here(topic)])
            changes = difference(before, now)
            self._sent[topic] = now
            if any(changes):
                frame = self._encode(wire.presence_changes(topic, **changes._asdict()))
                self._send(topic, frame, [one for one in self._watchers[topic] if one not in unaware])
            if unaware and topic in self._others:
                frame = self._encode(wire.presence_state(topic, now))
                waiting = list(unaware)
                unaware.clear()
                self._send(topic, frame, waiting)
            if not unaware:
                del self._unaware[topic]

    def _here(self, topic: Topic) -> dict[Key, Person]:
        return {key: own.person for key, own in self._own.get(topic, {}).items()}

    def _send(self, topic: Topic, frame: bytes, watchers: Iterable[Watcher]) -> None:
        for watcher in watchers:
            if not watcher.send_presence(frame):
                self._unaware.setdefault(topic, {})[watcher] = None

    def _changed(self, topic: Topic, key: Key) -> None:
        self._unstored[topic, key] = None
        self._touched[topic] = None
        self._wakeup.set()
