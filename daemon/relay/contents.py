"""Subscriptions to the contents of topics, of which a gateway may have a hundred thousand."""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

from daemon.relay.link import Link
from daemon.relay.publisher import CONTENT

SLICE: Final = 500  # topics after which others get their turn


class ContentSubscriptions:
    """Subscribes to what is wanted, a slice at a time, and to all of it again on another connection.

    `is_wanted` says whether the contents of a hash are, and whoever knows that this has changed calls `update`.
    `receive` gets the contents. A subscription may come late: whatever is missed is noticed when its batch arrives.
    """

    def __init__(self, link: Link, is_wanted: Callable[[int], bool], receive: Callable[[bytes], None]) -> None:
        self.receive = receive
        self._link = link
        self._is_wanted = is_wanted
        self._due: deque[int] = deque()  # hashes of which it may have changed
        self._news = asyncio.Event()
        self._subscribed: set[int] = set()
        link.numbered = self

    def __len__(self) -> int:
        return len(self._subscribed)

    def update(self, hashes: Iterable[int]) -> None:
        """These may be wanted by now, or not any more."""
        self._due.extend(hashes)
        self._news.set()

    def renew(self) -> None:
        """See Numbered."""
        subscribed, self._subscribed = self._subscribed, set()
        self.update(subscribed)

    async def run(self) -> None:
        """Subscribe and unsubscribe until cancelled."""
        while True:
            await self._news.wait()
            await self._link.connected.wait()
            self._take_slice()
            if not self._due:
                self._news.clear()
            await asyncio.sleep(0)

    def _take_slice(self) -> None:
        due = {self._due.popleft() for _ in range(min(SLICE, len(self._due)))}
        wanted = set(filter(self._is_wanted, due))
        added, removed = wanted - self._subscribed, (due - wanted) & self._subscribed
        self._link.subscribe_numbered((each, f"{CONTENT}.{each:016x}") for each in added)
        self._link.unsubscribe_numbered(removed)
        self._subscribed |= added
        self._subscribed -= removed
