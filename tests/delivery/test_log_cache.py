"""`LogCache`: which reads it answers, which it leaves to the log, and how much memory it takes."""

import asyncio
import json
import tracemalloc
from collections.abc import Collection, Sequence

import pytest

from daemon.core.batch import OVERHEAD, LogBatch, gone_in
from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.ports import Batch
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import Invalid, PackRouter
from daemon.packs import Pack, Row
from daemon.relay import codec

HERE, THERE = Topic("room:1"), Topic("room:2")


class LogWasRead(Exception):
    """The log behind the cache was read."""


class UnreadableLog:
    """A log behind the cache; every read of it raises LogWasRead."""

    async def head(self) -> Position:
        raise LogWasRead

    async def read(self, after: Seq, limit: int) -> Batch:
        raise LogWasRead

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        raise LogWasRead

    async def continuity(self, since: Position) -> str | None:
        raise LogWasRead


class SlowLog(UnreadableLog):
    """A log behind the cache that answers, when `answer` has a result, from which position it can be continued."""

    def __init__(self) -> None:
        self.asked: list[Position] = []
        self.answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    async def continuity(self, since: Position) -> str | None:
        self.asked.append(since)
        return await asyncio.shield(self.answer)


class Note(Row):
    id: int
    text: str


SERVED = PackRouter({"app": Pack("app", {"notes": Note}, (r"room:\d+",))})


def a_change(seq: int, topic: Topic = HERE, kind: Kind = Kind.INSERT, *, row: int = 0, tx: int = 0) -> Change:
    """A change of row `row`, in a transaction of its own unless `tx` is given."""
    row = row or seq
    record = json.dumps({"id": row, "text": str(seq)}) if kind in (Kind.INSERT, Kind.UPDATE, Kind.RESTORE) else None
    return Change(Seq(seq), str(tx or seq), "", "app", "notes", topic, kind, json.dumps({"id": row}), record)


def a_cache(max_bytes: int = 2**20, at: int = 0) -> LogCache:
    cache = LogCache(UnreadableLog(), max_bytes)
    cache.restart(Position("e", Seq(at)))
    return cache


@pytest.fixture(params=["of this node", "of another node"], autouse=True)
def arrives(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with batches as a member makes them, and as they arrive at a gateway."""
    if request.param == "of another node":
        batch_of = SERVED.batch_of

        def sent(after: Position, changes: Sequence[Change]) -> tuple[LogBatch, list[Invalid]]:
            batch, invalid = batch_of(after, changes)
            return codec.LOG_BATCH.decode(codec.LOG_BATCH.encode(batch)), invalid

        monkeypatch.setattr(SERVED, "batch_of", sent)


def add(cache: LogCache, *changes: Change) -> None:
    cache.add(SERVED.batch_of(cache._end, changes)[0])


async def read_seqs(cache: LogCache, after: int, upto: int, *topics: Topic, limit: int = 1000) -> list[int]:
    changes = await cache.read_topics(topics or (HERE, THERE), Seq(after), Seq(upto), limit)
    return [change.seq for change in changes]


async def first_held(cache: LogCache, upto: int) -> int:
    """The first position from which the cache answers."""
    for after in range(upto + 1):
        try:
            await read_seqs(cache, after, upto)
        except LogWasRead:
            continue
        return after
    raise AssertionError("the cache answers nothing, not even from the head")


async def test_added_changes_are_read_from_the_cache_between_any_two_positions() -> None:
    cache = a_cache(at=10)
    add(cache, a_change(11), a_change(12, THERE), a_change(13))
    add(cache, a_change(14, THERE))
    assert [11, 12, 13, 14] == await read_seqs(cache, 10, 14)
    assert [12, 14] == await read_seqs(cache, 10, 14, THERE)
    assert [13] == await read_seqs(cache, 11, 13, HERE)
    assert [] == await read_seqs(cache, 14, 14)
    assert {None} == {await cache.continuity(Position("e", Seq(seq))) for seq in range(10, 15)}


@pytest.mark.parametrize("since", [Position("e", Seq(9)), Position("e", Seq(12)), Position("f", Seq(11))])
async def test_positions_outside_the_cache_are_looked_up_in_the_log(since: Position) -> None:
    cache = a_cache(at=10)
    add(cache, a_change(11))
    with pytest.raises(LogWasRead):
        await cache.continuity(since)
    for after, upto in ((9, 11), (10, 12)):
        with pytest.raises(LogWasRead):
            await read_seqs(cache, after, upto)


async def test_clients_that_come_back_from_one_position_ask_the_log_once() -> None:
    log = SlowLog()
    cache, since = LogCache(log, 0), Position("e", Seq(3))
    cache.restart(Position("e", Seq(9)))
    coming = [asyncio.create_task(cache.continuity(since)) for _ in range(3)]
    leaving = asyncio.create_task(cache.continuity(since))
    while not log.asked:
        await asyncio.sleep(0)
    coming[0].cancel()  # the one that asked
    leaving.cancel()
    log.answer.set_result(None)
    assert [None, None] == await asyncio.gather(*coming[1:])
    assert await cache.continuity(since) is None
    assert [since] == log.asked


@pytest.mark.parametrize("reason", ["crash", None])
async def test_what_may_change_is_asked_again(reason: str | None) -> None:
    log = SlowLog()
    log.answer.set_result(reason)
    cache, ahead = LogCache(log, 0), Position("e", Seq(10))
    cache.restart(Position("e", Seq(9)))
    since = ahead if reason is None else Position("e", Seq(3))
    assert [reason, reason] == [await cache.continuity(since) for _ in range(2)]
    assert [since, since] == log.asked


async def test_an_answer_from_before_a_discontinuity_or_the_end_of_retention_is_forgotten() -> None:
    log = SlowLog()
    cache, since = LogCache(log, 0), Position("e", Seq(3))
    cache.restart(Position("e", Seq(9)))
    asking = asyncio.create_task(cache.continuity(since))
    while not log.asked:
        await asyncio.sleep(0)
    cache.restart(Position("e", Seq(20)))
    log.answer.set_result(None)
    assert await asking is None
    for count in (2, 3):
        assert [None, None] == [await cache.continuity(since) for _ in range(2)]
        assert count == len(log.asked)
        cache.forget(Seq(5))


async def test_a_question_that_failed_is_asked_again() -> None:
    cache, since = LogCache(UnreadableLog(), 0), Position("e", Seq(3))
    cache.restart(Position("e", Seq(9)))
    for _ in range(2):
        answers = await asyncio.gather(*(cache.continuity(since) for _ in range(2)), return_exceptions=True)
        assert [LogWasRead, LogWasRead] == [type(answer) for answer in answers]


async def test_the_newest_changes_of_all_topics_come_in_their_order() -> None:
    cache = a_cache(max_bytes=64 * OVERHEAD)
    assert [] == cache.newest(3)
    for seq in range(1, 10):
        add(cache, a_change(seq, HERE if seq % 2 else THERE))
    assert [7, 8, 9] == [change.seq for change in cache.newest(3)]


async def test_only_the_numbers_between_two_terms_are_looked_up_in_the_log() -> None:
    cache = a_cache(at=10)
    add(cache, a_change(11))
    add(cache, a_change(101), a_change(102))
    for seq in (12, 99, 100):
        with pytest.raises(LogWasRead):
            await cache.continuity(Position("e", Seq(seq)))
    assert {None} == {await cache.continuity(Position("e", Seq(seq))) for seq in (10, 11, 101, 102)}
    assert [11, 101, 102] == await read_seqs(cache, 10, 102)


async def test_a_discontinuity_empties_the_cache() -> None:
    cache = a_cache()
    add(cache, a_change(1))
    cache.restart(Position("e", Seq(100)))
    add(cache, a_change(101))
    with pytest.raises(LogWasRead):
        await read_seqs(cache, 0, 101)
    with pytest.raises(LogWasRead):
        await cache.continuity(Position("e", Seq(1)))
    assert [101] == await read_seqs(cache, 100, 101)


async def test_a_too_large_transaction_evicts_all_changes_before_it() -> None:
    cache = a_cache()
    # The transaction at 50 may have deleted any row.
    add(cache, a_change(1), a_change(50, THERE, Kind.LIMIT), a_change(51))
    with pytest.raises(LogWasRead):
        await read_seqs(cache, 0, 51)
    add(cache, a_change(52))
    assert [52] == await read_seqs(cache, 51, 52)


async def test_a_transaction_is_read_whole_whatever_the_limit() -> None:
    cache = a_cache(max_bytes=100_000)
    for tx in range(100):
        add(cache, *(a_change(tx * 3 + place, tx=tx + 1) for place in (1, 2, 3)))
    floor = await first_held(cache, 300)
    for after in range(floor, 300):
        for limit in (1, 2, 3, 4):
            changes = await cache.read_topics([HERE], Seq(after), Seq(300), limit)
            assert 0 == changes[-1].seq % 3
            assert limit <= len(changes) < limit + 3 or changes[-1].seq == 300


async def test_the_content_of_a_deleted_row_is_hidden_in_every_topic() -> None:
    cache = a_cache()
    add(
        cache, a_change(1, row=7), a_change(2, row=8), a_change(3, HERE, Kind.LEAVE, row=7), a_change(4, THERE, row=7)
    )
    add(cache, a_change(5, THERE, Kind.UPDATE, row=7))
    assert [1, 2, 3, 4, 5] == await read_seqs(cache, 0, 5)
    add(cache, a_change(6, THERE, Kind.DELETE, row=7))
    assert [2, 3, 6] == await read_seqs(cache, 0, 6)
    add(cache, a_change(7, THERE, Kind.RESTORE, row=7), a_change(8, THERE, Kind.UPDATE, row=7))
    assert [2, 3, 6, 7, 8] == await read_seqs(cache, 0, 8)


async def test_an_invalid_delete_still_hides_the_rows_earlier_content() -> None:
    cache = a_cache()
    add(cache, a_change(1, row=7), a_change(2, row=8))
    invalid = Change(Seq(3), "3", "", "app", "notes", HERE, Kind.DELETE, '{"id": 7}', record="unexpected")
    add(cache, invalid)
    found = await cache.read_topics([HERE], Seq(0), Seq(3), 10)
    assert [(2, Kind.INSERT), (3, Kind.INVALID)] == [(change.seq, change.kind) for change in found]


async def test_content_between_two_deletes_stays_hidden_after_the_first_delete_is_evicted() -> None:
    cache = a_cache(max_bytes=20_000)
    add(cache, a_change(1, kind=Kind.DELETE, row=7))
    for seq in range(2, 11):
        add(cache, a_change(seq))
    add(cache, a_change(11, kind=Kind.RESTORE, row=7), a_change(12, kind=Kind.DELETE, row=7))
    seq = 12
    while await first_held(cache, seq) < 2:
        seq += 1
        add(cache, a_change(seq))
    assert 11 not in await read_seqs(cache, await first_held(cache, seq), seq)
    while await first_held(cache, seq) < 12:
        seq += 1
        add(cache, a_change(seq))


@pytest.mark.parametrize("max_bytes", range(4 * OVERHEAD, 7 * OVERHEAD, 100))
async def test_a_small_cache_holds_every_change_after_its_first_position(max_bytes: int) -> None:
    cache = a_cache(max_bytes)
    for seq in range(1, 40):
        add(cache, a_change(seq, kind=Kind.LEAVE) if seq % 5 else a_change(seq, kind=Kind.DELETE))
        held = await first_held(cache, seq)
        assert list(range(held + 1, seq + 1)) == await read_seqs(cache, held, seq)


async def test_a_change_whose_content_is_already_removed_is_evicted_like_any_other() -> None:
    cache = a_cache(max_bytes=10_000)
    add(cache, a_change(1)._replace(record=None), a_change(2, kind=Kind.DELETE, row=1))
    for seq in range(3, 30):
        add(cache, a_change(seq))
    assert [29] == await read_seqs(cache, 28, 29)
    assert 2 < await first_held(cache, 29)


async def test_changes_from_the_cache_are_not_validated_again() -> None:
    cache = a_cache()
    invalid = Change(Seq(1), "1", "", "app", "notes", HERE, Kind.INSERT, "{}", "{}")
    cache.add(LogBatch("e", Seq(0), Seq(1), [invalid]))
    answer = await cache.read_topics([HERE], Seq(0), Seq(1), 10)
    assert [invalid] == SERVED.deliverable(answer)
    sendable, refused = SERVED.validate([invalid])
    assert [Kind.INVALID] == [change.kind for change in sendable]
    assert [(invalid, "app")] == [(dead_letter.change, dead_letter.pack) for dead_letter in refused]


async def test_the_oldest_changes_are_evicted_first() -> None:
    cache = a_cache(max_bytes=50_000)
    for seq in range(1, 501):
        add(cache, a_change(seq))
        assert cache.size <= 50_000
    floor = await first_held(cache, 500)
    assert 400 < floor < 480
    assert list(range(floor + 1, 501)) == await read_seqs(cache, floor, 500)
    with pytest.raises(LogWasRead):
        await cache.continuity(Position("e", Seq(floor - 1)))


async def test_evicting_a_delete_does_not_bring_back_the_rows_content() -> None:
    cache = a_cache(max_bytes=0)
    add(cache, a_change(1, row=9), a_change(2), a_change(3, kind=Kind.DELETE, row=9))
    assert 3 == await first_held(cache, upto=3)


async def test_a_cache_of_zero_bytes_knows_only_the_head() -> None:
    cache = a_cache(max_bytes=0)
    add(cache, a_change(1), a_change(2))
    assert 2 == await first_held(cache, 2)
    assert 0 == cache.size


@pytest.mark.parametrize("kinds", [(Kind.INSERT,), (Kind.INSERT, Kind.DELETE)])
@pytest.mark.parametrize("schema", ["app", "not served"])
@pytest.mark.parametrize("character", ["x", "\N{GREEK SMALL LETTER ALPHA}", "\N{ROCKET}"])
def test_the_cache_takes_no_more_memory_than_its_limit(kinds: tuple[Kind, ...], schema: str, character: str) -> None:
    max_bytes = 2**20
    cache = a_cache(max_bytes)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for seq in range(1, 6001):
        kind, row = kinds[seq % len(kinds)], f'{{"id": {seq // len(kinds)}}}'
        record = json.dumps({"id": seq, "text": character * 50}, ensure_ascii=False) if kind is Kind.INSERT else None
        # No two changes share a string, as when they come from the driver.
        names = schema.encode().decode(), b"notes".decode()
        topic, at = Topic(f"room:{seq}"), f"2026-01-10T12:00:00.{seq:06}Z"
        change = Change(
            Seq(seq), f"{10**9 + seq}", at, *names, topic, kind, row, record, ("id", f"c{seq}"), f"u{seq}"
        )
        gone = gone_in([change])
        cache.add(LogBatch("e", Seq(seq - 1), Seq(seq), [change] if schema == "app" else [], gone=gone))
    del change, gone
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held < max_bytes


async def test_changes_dropped_from_the_log_are_not_read_from_the_cache() -> None:
    cache = a_cache()
    for seq in range(1, 11):
        add(cache, a_change(seq))
    cache.forget(Seq(6))
    assert 6 == await first_held(cache, 10)
    assert [7, 8, 9, 10] == await read_seqs(cache, 6, 10)
    with pytest.raises(LogWasRead):
        await cache.continuity(Position("e", Seq(5)))
    cache.forget(Seq(3))
    assert 6 == await first_held(cache, 10)


async def test_a_row_that_is_deleted_and_written_again_in_one_transaction_keeps_its_new_content() -> None:
    cache = a_cache()
    add(cache, a_change(1, row=7))
    # The topics of a transaction follow each other: the new content stands before the other topic's deletion.
    add(cache, a_change(2, HERE, row=7, tx=9), a_change(3, THERE, Kind.DELETE, row=7, tx=9))
    found = await cache.read_topics((HERE, THERE), Seq(0), Seq(3), 1000)
    assert [2] == [change.seq for change in found if change.record is not None]
