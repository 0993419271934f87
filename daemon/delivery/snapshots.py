"""Snapshots for clients: the frames with a topic's rows, read once for all who ask at the same moment."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import ref

from daemon import metrics
from daemon.core import wire
from daemon.core.change import Change, Kind, Numbers, Position, Seq
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Discontinuity, Hub
from daemon.core.ports import Encode, RowReader
from daemon.core.snapshot import Rows, Visible, Wanted
from daemon.delivery.pack_router import PackRouter
from daemon.logs import get_logger

log = get_logger()

MAX_CONCURRENT_READS: Final = 2  # of the database; the others wait
MAX_FILTERED_READS: Final = 1  # of them: a filter may look through many rows and show none, for half a minute
MAX_PAGE: Final = 256 * 1024  # bytes of records in one frame, unless a single one is larger
SHARED_FOR: Final = 1.0  # seconds for which a snapshot that was read serves others who ask for the same
ATTEMPTS: Final = 3  # to read a snapshot from which the stream can be continued
CHUNK: Final = 200  # rows that are validated before other clients get their turn


@dataclass(eq=False, slots=True, weakref_slot=True)
class Snapshot:
    """The frames of a snapshot, and how the stream continues from it.

    The hub has delivered everything up to `upto` since `discontinuity`: until there, changes that `visible` shows are
    left out of the stream, because the rows contain them. `frames` is None once it gave way to newer ones.
    """

    position: Position
    visible: Visible
    upto: Seq
    frames: Sequence[bytes] | None
    discontinuity: Discontinuity

    @property
    def size(self) -> int:
        """The bytes of the frames."""
        return sum(map(len, self.frames or ()))


class Snapshots:
    """Reads snapshots for the clients of one hub.

    One that is being read, or was read less than SHARED_FOR seconds ago, also serves others who ask for the same: a
    crowd costs the database few reads. It is right for all whose right began before it: changes since then follow in
    the stream. While clients read them, snapshots are in memory: if that takes more than `max_bytes`, the oldest
    gives way, and whoever has not read it must ask again.
    """

    def __init__(
        self,
        reader: RowReader,
        hub: Hub,
        router: PackRouter,
        encode: Encode,
        wait_until_delivered: Callable[[Seq], Coroutine[Any, Any, None]],
        max_bytes: int = 2**27,
    ) -> None:
        self._reader = reader
        self._hub = hub
        self._router = router
        self._encode = encode
        self._wait_until_delivered = wait_until_delivered
        self._max_bytes = max_bytes
        self._held: list[ref[Snapshot]] = []  # the oldest first
        self._slots = asyncio.Semaphore(MAX_CONCURRENT_READS)
        self._filtered_slots = asyncio.Semaphore(MAX_FILTERED_READS)
        self._reads: dict[tuple[Wanted, Numbers], asyncio.Task[Snapshot]] = {}

    async def take(self, wanted: Wanted, numbers: Numbers, start: Seq) -> Snapshot:
        """A snapshot for a user who may read the topic from `start` on. Raises LogUnavailable and SnapshotTooLarge.

        When this returns, the hub has delivered every change that the snapshot contains, so it knows every right that
        had ended by then.
        """
        for _ in range(ATTEMPTS):
            task = self._reads.get((wanted, numbers)) or self._begin(wanted, numbers)
            snapshot = await asyncio.shield(task)
            hub = self._hub
            is_continuous = (
                snapshot.discontinuity is hub.discontinuity and snapshot.position.epoch == hub.position.epoch
            )
            if is_continuous and snapshot.position.seq >= start and snapshot.frames is not None:
                metrics.SNAPSHOTS.inc()
                return snapshot
            if self._reads.get((wanted, numbers)) is task:
                del self._reads[wanted, numbers]
        raise LogUnavailable("the log has not settled yet")

    def _begin(self, wanted: Wanted, numbers: Numbers) -> asyncio.Task[Snapshot]:
        loop = asyncio.get_running_loop()
        task = self._reads[wanted, numbers] = loop.create_task(self._read(wanted, numbers))

        def forget() -> None:
            if self._reads.get((wanted, numbers)) is task:
                del self._reads[wanted, numbers]

        def ended(task: asyncio.Task[Snapshot]) -> None:
            if task.cancelled() or task.exception() is not None:  # looked at, also if nobody waits for it any more
                forget()
            else:
                loop.call_later(SHARED_FOR, forget)

        task.add_done_callback(ended)
        return task

    async def _read(self, wanted: Wanted, numbers: Numbers) -> Snapshot:
        async with self._filtered_slots if wanted.view is not None else nullcontext(), self._slots:
            discontinuity = self._hub.discontinuity
            with metrics.SNAPSHOT_SECONDS.time():
                rows = await self._reader.read(wanted)
        await self._wait_until_delivered(rows.upto)
        frames = await self._frames(wanted, rows, numbers)
        metrics.SNAPSHOT_ROWS.inc(len(rows.rows))
        snapshot = Snapshot(rows.position, rows.visible, rows.upto, frames, discontinuity)
        self._hold(snapshot)
        return snapshot

    def _hold(self, snapshot: Snapshot) -> None:
        """Keep account of a new snapshot. If there is too little room, the oldest ones that are in use give way."""
        held = [known for reference in self._held if (known := reference()) is not None and known.frames is not None]
        held.append(snapshot)
        size = sum(known.size for known in held)
        while size > self._max_bytes and len(held) > 1:
            oldest = held.pop(0)
            size -= oldest.size
            oldest.frames = None
        self._held = [ref(known) for known in held]

    async def _frames(self, wanted: Wanted, rows: Rows, numbers: Numbers) -> list[bytes]:
        """At least one frame for each table."""
        rows = await checked(rows, self._router)
        valid: dict[str, list[Change]] = {table: [] for table in rows.omitted}
        omitted = dict(rows.omitted)
        for place, row in enumerate(rows.rows, 1):
            shown = row if wanted.view is None else wanted.view.of_row(row)
            is_exact = numbers is Numbers.STRING
            valid[row.table].append(self._router.with_exact_numbers(shown) if is_exact else shown)
            if place % CHUNK == 0:
                await asyncio.sleep(0)
        pages = [(table, page) for table, of_table in valid.items() for page in _pages(of_table)]
        frames = list[bytes]()
        for place, (table, page) in enumerate(pages, 1):
            payload = wire.snapshot(wanted.topic, table, page, omitted=omitted.pop(table, 0), more=place < len(pages))
            frames.append(self._encode(payload))
            await asyncio.sleep(0)
        return frames


async def checked(rows: Rows, router: PackRouter) -> Rows:
    """The rows that may be sent; the others count as omitted."""
    if rows.validated:
        return rows
    valid, omitted = list[Change](), Counter(rows.omitted)
    for first in range(0, len(rows.rows), CHUNK):
        sendable, invalid = router.validate(rows.rows[first : first + CHUNK])
        valid += [row for row in sendable if row.kind is Kind.INSERT]  # else it stands for one that is invalid
        for row, _, reason in invalid:
            omitted[row.table] += 1
            log.warning("snapshot_incomplete", table=row.table, reason=reason)
        await asyncio.sleep(0)
    return replace(rows, rows=valid, omitted=omitted, validated=True)


def _pages(rows: Sequence[Change]) -> list[list[Change]]:
    """The rows in pages of at most MAX_PAGE bytes, or one row; at least one page."""
    pages: list[list[Change]] = [[]]
    size = 0
    for row in rows:
        size += len(row.key) + len(row.record or "")
        if size > MAX_PAGE and pages[-1]:
            pages.append([])
            size = len(row.key) + len(row.record or "")
        pages[-1].append(row)
    return pages
