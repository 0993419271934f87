"""Reads the log in Postgres: the LogReader port."""

import asyncio
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Final

import asyncpg

from daemon.core.change import Change, Kind, Outline, Position, Right, Seq, Topic
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.ports import LARGE_RECORD, MAX_READ_BYTES, Batch
from daemon.log.queries import query
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe, is_about_data

MAX_ENDED_RIGHTS = 5000  # ended rights that are listed one by one for a transaction too large to deliver

ANSWER_TIMEOUT = 10.0  # seconds for a small result
READ_TIMEOUT = 30.0  # seconds for a chunk of changes
TRANSACTION_TIMEOUT = 900.0  # seconds for the rest of a transaction: it may hold millions of changes


@contextmanager
def translated() -> Iterator[None]:
    """Turn database errors raised inside the block into LogUnavailable."""
    try:
        yield
    except (*DATABASE_ERRORS, ValueError) as error:  # ValueError: the driver could not decode a value
        raise LogUnavailable(describe(error)) from error


class PgLogReader:
    """Reads `rowcast.log`. The LogReader port documents its methods."""

    def __init__(
        self,
        pool: Pool,
        transaction_changes: int = 100_000,
        transaction_bytes: int = 2**25,
        max_bytes: int = MAX_READ_BYTES,
        wants: Callable[[Change], bool] | None = None,
    ) -> None:
        """A transaction is read as `limit` if it has more than `transaction_changes`, or bytes of records.

        Records of more than `max_bytes` are left in the log, unless `wants` is true of their change, as it is without
        them.
        """
        self._pool = pool
        self._wants = wants
        self._max_transaction = transaction_changes
        self._max_transaction_bytes = transaction_bytes
        self._max_bytes = max_bytes

    async def head(self) -> Position:
        """The newest position; ("", 0) before the first term. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                row = await connection.fetchrow(query("head"))
        return Position(row["epoch"], Seq(row["seq"])) if row else Position("", Seq(0))

    async def read(self, after: Seq, limit: int) -> Batch:
        """Whole transactions past `after`, oldest first. Raises LogUnavailable."""
        with translated():
            rows, cut = await self._chunk(None, limit, after)
            found = _Found()
            await self._complete(found, rows, None, cut=cut)
            await self._read_large(found)
            await found.convert()
            return Batch(found.changes, more=cut)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """The same for some topics, up to `upto`. Raises LogUnavailable and LogTruncated."""
        wanted, position, bytes_read, cut = list(topics), after, 0, True
        found = _Found()
        with translated():
            while cut and len(found) < limit and bytes_read < self._max_bytes:
                rows, cut = await self._chunk(wanted, limit - len(found), position, upto)
                await self._complete(found, rows, wanted, cut=cut)
                if rows and cut and len(found) < limit:
                    bytes_read += sum(map(_bytes, rows))
                    position = rows[-1]["tx_end"]  # the many rows of a large transaction became few changes
            await self._read_large(found)
            # Checked after reading, because a part of what was read may have been dropped before.
            [[floor]], _ = await asyncio.gather(self._fetch(ANSWER_TIMEOUT, "log_floor"), found.convert())
        if floor > after:
            raise LogTruncated
        return Batch(found.changes, more=cut)

    async def _fetch(self, time_limit: float, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with acquired(self._pool, time_limit) as connection:
            return await connection.fetch(query(name), *arguments)

    async def _chunk(self, topics: list[Topic] | None, limit: int, *places: Seq) -> tuple[list[asyncpg.Record], bool]:
        """The first rows of these topics (None: of all), and whether there may be more.

        Before a change that cannot be read there are fewer rows; then that change comes alone. `places` are `after`
        and, for some topics, `upto`.
        """
        while True:
            try:
                if topics is None:
                    rows = await self._fetch(READ_TIMEOUT, "changes", *places, limit, self._max_bytes, LARGE_RECORD)
                else:
                    rows = await self._fetch(
                        READ_TIMEOUT,
                        "changes_of_topics",
                        *places,
                        topics,
                        limit,
                        self._max_transaction,
                        self._max_bytes,
                        LARGE_RECORD,
                    )
            except Exception as error:
                if not is_about_data(error):
                    raise
            else:
                return rows, len(rows) == limit or sum(map(_bytes, rows)) >= self._max_bytes
            if limit == 1:
                break
            limit //= 2
        name, arguments = ("next_seq", ()) if topics is None else ("next_seq_of_topics", (topics,))
        [[seq]] = await self._fetch(READ_TIMEOUT, name, *places, *arguments)
        return await self._single(seq), True

    async def _single(self, seq: Seq) -> list[asyncpg.Record]:
        """The row of one change or, if it cannot be read, one that stands for it."""
        try:
            return await self._fetch(READ_TIMEOUT, "single_change", seq, self._max_transaction)
        except Exception as error:
            if not is_about_data(error):
                raise
            reason = describe(error)
        try:
            return await self._fetch(READ_TIMEOUT, "unreadable", seq, self._max_transaction, reason, True)
        except Exception as error:
            if not is_about_data(error):
                raise
        return await self._fetch(READ_TIMEOUT, "unreadable", seq, self._max_transaction, reason, False)

    async def _rest(self, after: Seq, upto: Seq, topics: list[Topic] | None) -> list[asyncpg.Record]:
        """The rows of a transaction in this range; the range is halved until what cannot be read is alone."""
        try:
            return await self._fetch(TRANSACTION_TIMEOUT, "rest_of_transaction", after, upto, topics, LARGE_RECORD)
        except Exception as error:
            if not is_about_data(error):
                raise
        if upto - after == 1:
            return await self._single(upto)
        middle = Seq((after + upto) // 2)
        return await self._rest(after, middle, topics) + await self._rest(middle, upto, topics)

    async def _limits(self, first: Seq, last: Seq) -> list[asyncpg.Record]:
        """What stands for a transaction that is too large. If that cannot be read, all topics, and all rights."""
        try:
            return await self._fetch(
                TRANSACTION_TIMEOUT, "limits", first, last, self._max_transaction, MAX_ENDED_RIGHTS
            )
        except Exception as error:
            if not is_about_data(error):
                raise
        return await self._fetch(TRANSACTION_TIMEOUT, "limits", first, last, 0, 0)

    async def _complete(
        self, found: "_Found", rows: list[asyncpg.Record], topics: list[Topic] | None, *, cut: bool
    ) -> None:
        """Find the whole transactions of which these rows are the beginning. `cut`: there may be more rows."""
        plain = found.add([])
        for end, group in groupby(rows, key=_tx_end):
            transaction = list(group)
            first, last = transaction[0], transaction[-1]
            is_heavy = (first["tx_bytes"] or 0) > self._max_transaction_bytes
            if topics is None and (is_heavy or end - first["seq"] >= self._max_transaction):
                # Numbers are dense inside a transaction, so this is how many of its changes follow `after`.
                found.add(await self._limits(first["seq"], end))
                plain = found.add([])
            elif topics is not None and (is_heavy or first["large"]):
                found.add(await self._fetch(READ_TIMEOUT, "limits_of_topics", first["seq"], end, topics))
                plain = found.add([])
            else:
                plain += transaction
                if cut and last is rows[-1] and last["seq"] < end:
                    rest, _ = await asyncio.gather(self._rest(last["seq"], end, topics), found.convert())
                    found.add(rest)

    async def _read_large(self, found: "_Found") -> None:
        """Read what there is to read of large records."""
        if found.has_large():
            await found.convert()
            found.changes = await self._with_large(found.changes, found.large)

    async def _with_large(self, changes: Iterable[Change], large: Mapping[Seq, int]) -> list[Change]:
        """The same changes with the outlines of `large` ones, by their bytes, and with the records that are not left.

        One whose record nests as deep as Postgres can read may have no outline.
        """
        found = {change.seq: change for change in changes}
        for seq, outline in await self._outlines(list(large)):
            found[seq] = found[seq]._replace(outline=outline)
        read = [seq for seq, size in large.items() if not self._leaves(found[seq], size)]
        if not read:
            return list(found.values())
        try:
            rows = await self._fetch(TRANSACTION_TIMEOUT, "records", read)
        except Exception as error:
            if not is_about_data(error):
                raise
            found |= {seq: change_of(row) for seq in read for row in await self._single(seq)}
        else:
            records = {row["seq"]: row["record"] for row in rows}
            for seq in read:
                change = found[seq]._replace(record=records.get(seq))
                found[seq] = change if seq in records else change._replace(outline=None)  # its row is deleted by now
        return list(found.values())

    async def _outlines(self, seqs: list[Seq]) -> list[tuple[Seq, Outline]]:
        """The outlines of large records. What cannot be outlined is told apart by halving."""
        try:
            rows = await self._fetch(TRANSACTION_TIMEOUT, "outlines", seqs)
        except Exception as error:
            if not is_about_data(error):
                raise
            half = len(seqs) // 2
            return await self._outlines(seqs[:half]) + await self._outlines(seqs[half:]) if half else []
        return [(row["seq"], _outline(row)) for row in rows]

    def _leaves(self, change: Change, size: int) -> bool:
        """Whether the record of this size stays in the log."""
        if self._wants is None or size <= self._max_bytes or change.outline is None:
            return False
        return not self._wants(change)

    async def find(self, seq: Seq) -> tuple[Change, bool] | None:
        """The change with this number, and whether its transaction is too large to be delivered change by change.

        None if the log has no such number. Raises LogUnavailable.
        """
        with translated():
            rows = await self._single(seq)
        if not rows:
            return None
        [row] = rows
        is_heavy = (row["tx_bytes"] or 0) > self._max_transaction_bytes
        return change_of(row), bool(is_heavy or row["large"])

    async def floor(self) -> Seq:
        """The number up to which the log has been dropped. Raises LogUnavailable."""
        with translated():
            [[floor]] = await self._fetch(ANSWER_TIMEOUT, "log_floor")
        return Seq(floor)

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot continue from `since`; None if it can. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                row = await connection.fetchrow(query("continuity"), since.seq)
        assert row is not None
        if row["epoch"] != since.epoch:
            return "epoch"
        if since.seq < row["floor"]:
            return "retention"
        if not row["on_record"]:
            if row["crashed"] is None and not row["led"]:
                raise LogUnavailable("no leader")
            return "crash" if row["crashed"] else "epoch"
        return None


_MASK: Final = "\x7f"  # see the statement `outlines`
_bytes = itemgetter("bytes")
_tx_end = itemgetter("tx_end")
_KINDS = {kind.value: kind for kind in Kind}
_COLUMNS = (
    "seq", "tx", "at", "schema_name", "table_name", "topic", "kind", "key", "record", "changed", "actor", "model",
)  # fmt: skip


def _left_out(rows: Sequence[asyncpg.Record]) -> dict[Seq, int]:
    """The bytes of the large records that the rows are without, by their numbers."""
    names = list(rows[0].keys()) if rows else []
    if "bytes" not in names or max(map(itemgetter(names.index("bytes")), rows)) <= LARGE_RECORD:
        return {}
    return {row["seq"]: row["bytes"] for row in rows if row["bytes"] > LARGE_RECORD and row["record"] is None}


class _Found:
    """The changes of a read, and rows that are converted to changes while the next statement runs.

    `large` has the bytes of the records that the rows are without, by the numbers of their changes.
    """

    def __init__(self) -> None:
        self.changes: list[Change] = []
        self.large: dict[Seq, int] = {}
        self._rows: list[list[asyncpg.Record]] = []

    def __len__(self) -> int:
        return len(self.changes) + sum(map(len, self._rows))

    def has_large(self) -> bool:
        """Whether some records are left out."""
        return bool(self.large) or any(map(_left_out, self._rows))

    def add(self, rows: list[asyncpg.Record]) -> list[asyncpg.Record]:
        """Add rows of one statement, and return them."""
        self._rows.append(rows)
        return rows

    async def convert(self) -> None:
        """Convert all rows so far."""
        for rows in self._rows:
            self.changes += changes_of(rows)
            self.large |= _left_out(rows)
        self._rows.clear()


def _outline(row: asyncpg.Record) -> Outline:
    def shown(text: str) -> str:
        if not row["is_masked"]:
            return text
        return text.replace(f"{_MASK}u", "\\u").replace(f"{_MASK}b", "\\\\").replace(f"{_MASK}d", _MASK)

    return Outline(shown(row["text"]), tuple(json.loads(shown(name)) for name in row["emptied"]))


def _time(at: str) -> str:
    """A time in UTC in the form of `rowcast.changes`, from that or from the one in which a session writes it."""
    if at.endswith("Z"):
        return at
    if len(at) == 29:  # no zeros are left out
        return f"{at[:10]}T{at[11:26]}Z"
    day, _, time = at.removesuffix("+00").partition(" ")
    seconds, _, fraction = time.partition(".")
    return f"{day}T{seconds}.{fraction:0<6}Z"


def change_of(row: asyncpg.Record) -> Change:
    """Convert a row of `rowcast.changes`."""
    [change] = changes_of([row])
    return change


def changes_of(rows: Sequence[asyncpg.Record]) -> list[Change]:
    """Convert rows of `rowcast.changes`, of statements that begin with the same columns.

    Where they do not say which rights end, none does.
    """
    if not rows:
        return []
    places = {name: place for place, name in enumerate(rows[0].keys())}
    columns = itemgetter(*(places[name] for name in _COLUMNS))  # by place: by name it takes twice as long
    found: list[Change] = []
    last_at = time = ""
    for values in map(columns, rows):
        seq, tx, at, schema, table, topic, kind, key, record, changed, actor, model = values
        if at != last_at:
            last_at, time = at, _time(at)
        known = _KINDS.get(kind)
        if known is None:  # a stand-in with the reason, or a kind of a newer schema
            reason = record if kind == "unreadable" else f"kind: {kind}"
            known, key, record, changed, actor, model = Kind.LIMIT, "{}", None, None, None, None
        else:
            reason = None
        names = tuple(changed) if changed else ()
        fields = (seq, tx, time, schema, table, topic, known, key, record, names, actor, None, model, reason, None)
        found.append(tuple.__new__(Change, fields))  # Change(*fields) takes twice as long
    if "revokes" in places:
        for place, revokes in enumerate(map(itemgetter(places["revokes"]), rows)):
            if revokes:
                row = rows[place]
                found[place] = found[place]._replace(ends=Right(row["revokes_user"], row["revokes_topic"]))
    return found
