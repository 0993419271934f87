"""Answers the questions of gateways with the ports of this member."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from daemon.core.change import Change, Position, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.core.filters import Tables
from daemon.core.ports import (
    AckStore,
    Batch,
    ColumnReader,
    Grants,
    LogReader,
    OwnTableReader,
    PeopleStore,
    RowReader,
    SignalRights,
)
from daemon.core.presence import Key, People
from daemon.core.snapshot import Rows, Wanted
from daemon.relay import port_questions as questions
from daemon.relay.codec import Following, Stored
from daemon.relay.errors import AnswerError, BadMessage
from daemon.relay.pages import PAGE, PageAnswer, PageCall
from daemon.relay.port_questions import NOT_YET, A, B, Question, refusal

Value = TypeVar("Value")

MAX_FOLLOWING: Final = 2**20  # bytes of batches in one answer, unless the first one has more
SOON: Final = 1.0  # seconds for which a right may keep others waiting that were asked about with it
MAX_BEHIND: Final = 5.0  # seconds that a member may lag behind a gateway that asks it
MAX_CONCURRENT_READS: Final = 4  # of the log; what else needs the database gets a connection too
MAX_CONCURRENT_SNAPSHOTS: Final = 2
MAX_FILTERED_SNAPSHOTS: Final = 1  # of them: a filter may look through many rows and show none
MAX_CONCURRENT_LOOKUPS: Final = 2  # of columns, acknowledged positions, and rights to signal


@dataclass(frozen=True, kw_only=True)
class MemberPorts:
    """What a member has that its gateways use.

    `position` is that of the hub, and `wait_until_delivered` waits until it has reached a number. `deliverable`
    returns what of a batch may be sent, and `checked` the rows that may be. `batches` returns what follows a
    position: batches as they were encoded, oldest first, with nothing left out in between; none if the log ends
    there. It raises LogUnavailable and LogTruncated. `contents` is that of BatchReader, and never waits. `people`
    returns the store of a process by its name. `user_of` is None if no pack knows the users of another issuer. `page`
    answers a request that a gateway passes on.
    """

    position: Callable[[], Position]
    wait_until_delivered: Callable[[Seq], Awaitable[None]]
    log_reader: LogReader
    deliverable: Callable[[Batch], Sequence[Change]]
    batches: Callable[[Position], Awaitable[Following]]
    contents: Callable[[Position, Seq, Collection[int]], Sequence[Change]]
    grants: Grants
    own_tables: OwnTableReader
    rows: RowReader
    checked: Callable[[Rows], Awaitable[Rows]]
    columns: ColumnReader
    people: Callable[[str], PeopleStore]
    acks: AckStore
    signal_rights: SignalRights
    user_of: Callable[[str], Awaitable[str | None]] | None = None
    page: Callable[[PageCall], Awaitable[PageAnswer]] | None = None


class Service:
    """Answers questions, whoever asks: what a gateway asks in the name of a user is believed."""

    def __init__(self, ports: MemberPorts) -> None:
        self._ports = ports
        self._reads = asyncio.Semaphore(MAX_CONCURRENT_READS)
        self._snapshots = asyncio.Semaphore(MAX_CONCURRENT_SNAPSHOTS)
        self._filtered_snapshots = asyncio.Semaphore(MAX_FILTERED_SNAPSHOTS)
        self._lookups = asyncio.Semaphore(MAX_CONCURRENT_LOOKUPS)
        self._answers: dict[str, tuple[Question[Any, Any], Callable[[Any], Awaitable[Any]]]] = {}
        self._answers_with(questions.HEAD, lambda _: ports.log_reader.head())
        self._answers_with(questions.READ, self._read)
        self._answers_with(questions.READ_TOPICS, self._read_topics)
        self._answers_with(questions.CONTINUITY, self._continuity)
        self._answers_with(questions.BATCHES, self._batches)
        self._answers_with(questions.CONTENTS, self._contents)
        self._answers_with(questions.RIGHTS, lambda asked: self._rights(asked, SOON))
        self._answers_with(questions.SLOW_RIGHTS, self._rights)
        self._answers_with(questions.ROWS, self._rows)
        self._answers_with(questions.COLUMNS, self._columns)
        self._answers_with(questions.OWN_TABLES, lambda _: ports.own_tables.read())
        self._answers_with(questions.STORE_PEOPLE, self._store_people)
        self._answers_with(questions.OTHERS, self._others)
        self._answers_with(questions.CALL_HOOKS, lambda process: ports.people(process).call_hooks())
        self._answers_with(questions.STORE_ACKS, ports.acks.store)
        self._answers_with(questions.STORED_ACKS, self._stored_acks)
        self._answers_with(questions.MAY_SIGNAL, lambda asked: _each(self._may_signal, asked))
        self._answers_with(questions.USERS, self._users)
        if ports.page is not None:
            self._answers_with(PAGE, ports.page)

    async def answer(self, question: str, payload: bytes) -> bytes:
        """The answer to a question. Raises AnswerError."""
        if question not in self._answers:
            raise AnswerError("unknown_question", f"this member does not know the question {question[:64]!r}")
        known, answer = self._answers[question]
        try:
            about = known.asked.decode(payload)
        except BadMessage as error:
            raise AnswerError("bad_message", str(error)) from error
        try:
            return await known.answer.pack(await answer(about))
        except known.raises as error:
            raise refusal(error) from error

    def _answers_with(self, question: Question[A, B], answer: Callable[[A], Awaitable[B]]) -> None:
        self._answers[question.name] = question, answer

    @contextmanager
    def _in_epoch(self, epoch: str, unavailable: type[LogUnavailable | GrantsUnavailable]) -> Iterator[None]:
        """The answer is about numbers of this epoch: those of another one mean something else."""

        def check() -> None:
            if self._ports.position().epoch != epoch:
                raise unavailable("the log of the member has another epoch")

        check()
        yield
        check()

    async def _read(self, asked: tuple[str, int, int]) -> Batch:
        epoch, after, limit = asked
        async with self._reads:
            with self._in_epoch(epoch, LogUnavailable):
                return await self._ports.log_reader.read(Seq(after), limit)

    async def _continuity(self, asked: tuple[Position, Position]) -> str | None:
        """Who has not come as far as who asks may hold a position that has been taken back meanwhile."""
        since, upto = asked
        mine = self._ports.position()
        if upto.epoch == mine.epoch:
            await self._until_delivered(upto.seq)
        elif since.epoch == mine.epoch:
            raise LogUnavailable("the log of the member has another epoch")
        return await self._ports.log_reader.continuity(since)

    async def _read_topics(self, asked: tuple[str, Sequence[str], int, int, int]) -> Batch:
        epoch, topics, after, upto, limit = asked
        with self._in_epoch(epoch, LogUnavailable):
            await self._until_delivered(Seq(upto))
            async with self._reads:
                batch = await self._ports.log_reader.read_topics([*map(Topic, topics)], Seq(after), Seq(upto), limit)
        reached = batch.reached if batch.more else None
        return Batch(self._ports.deliverable(batch), more=batch.more, validated=True, reached=reached)

    async def _until_delivered(self, seq: Seq) -> None:
        """Wait until the hub is there: what may be sent of something newer is not known. Raises LogUnavailable."""
        try:
            async with asyncio.timeout(MAX_BEHIND):
                await self._ports.wait_until_delivered(seq)
        except TimeoutError:
            raise LogUnavailable("the member is behind") from None

    async def _rights(
        self, asked: tuple[str, Sequence[tuple[str, str]]], within: float | None = None
    ) -> list[tuple[Seq | None] | str]:
        epoch, lookups = asked
        with self._in_epoch(epoch, GrantsUnavailable):
            return await _each(self._ports.grants.readable_from, lookups, within)

    async def _batches(self, after: Position) -> Following:
        head, batches = await self._ports.batches(after)
        size = 0
        for count, batch in enumerate(batches):
            size += len(batch)
            if size > MAX_FOLLOWING and count:
                return Following(head, batches[:count])
        return Following(head, batches)

    async def _contents(self, asked: tuple[Position, int, Sequence[int]]) -> Batch:
        after, upto, hashes = asked
        with self._in_epoch(after.epoch, LogUnavailable):
            await self._until_delivered(Seq(upto))
        return Batch(self._ports.contents(after, Seq(upto), frozenset(hashes)), validated=True)

    async def _rows(self, wanted: Wanted) -> Rows:
        async with self._filtered_snapshots if wanted.view is not None else nullcontext(), self._snapshots:
            rows = await self._ports.rows.read(wanted)
        await self._until_delivered(rows.upto)
        return await self._ports.checked(rows)

    async def _columns(self, topics: Sequence[str]) -> list[Tables]:
        async with self._lookups:
            return [await self._ports.columns.columns(Topic(topic)) for topic in topics]

    async def _store_people(self, stored: Stored) -> bool:
        return await self._ports.people(stored.process).store(stored.present, stored.gone)

    async def _others(self, asked: tuple[str, Sequence[str]]) -> Mapping[Topic, list[People]]:
        process, topics = asked
        return await self._ports.people(process).others([*map(Topic, topics)])

    async def _stored_acks(self, devices: Sequence[tuple[str, str]]) -> list[Position | None]:
        async with self._lookups:
            return [await self._ports.acks.stored(Key(*device)) for device in devices]

    async def _may_signal(self, user: str, topic: str) -> bool:
        async with self._lookups:
            return await self._ports.signal_rights.may_signal(user, Topic(topic))

    async def _users(self, subjects: Sequence[str]) -> list[tuple[str | None] | str]:
        if self._ports.user_of is None:
            raise GrantsUnavailable("no pack of the member knows the users of another issuer")
        return await _each(self._ports.user_of, [(subject,) for subject in subjects])


async def _each(
    answer: Callable[..., Awaitable[Value]], asked: Iterable[tuple[str, ...]], within: float | None = None
) -> list[tuple[Value] | str]:
    """Each answer, or why there is none; NOT_YET if it takes more than so many seconds."""
    tasks = [asyncio.ensure_future(answer(*each)) for each in asked]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=within)
        return [_outcome(task) for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


def _outcome(task: "asyncio.Future[Value]") -> tuple[Value] | str:
    if not task.done():
        return NOT_YET
    error = task.exception()
    if error is None:
        return (task.result(),)
    if isinstance(error, GrantsUnavailable):
        return error.reason or "no reason is known"
    raise error
