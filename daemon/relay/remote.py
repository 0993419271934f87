"""The ports of a gateway, which has no database: each asks a member. core/ports.py documents their methods."""

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final, Generic

from daemon.core.batch import LogBatch
from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.core.filters import Tables
from daemon.core.own_tables import OwnTable
from daemon.core.ports import Batch
from daemon.core.presence import Key, People, Person
from daemon.core.snapshot import Rows, Wanted
from daemon.relay import codec
from daemon.relay import port_questions as questions
from daemon.relay.codec import Stored
from daemon.relay.errors import BadMessage
from daemon.relay.port_questions import MAX_ASKED, NOT_YET, A, Ask, B, Question

MAX_CONCURRENT_QUESTIONS: Final = 4  # of one kind
MAX_STORED: Final = 50  # people, positions or topics in one question: it must fit into one message


class _Gathered(Generic[A, B]):
    """Asks one question about many things: all those of a turn of the loop, or that came up while others were asked.

    At most `most` questions wait for their answers at the same time.
    """

    def __init__(
        self,
        ask: Ask,
        question: Question[Any, Sequence[B]],
        about: Callable[[Sequence[A]], object] = list,
        *,
        most: int = MAX_CONCURRENT_QUESTIONS,
    ) -> None:
        """`about` makes what is asked of what is wanted."""
        self._ask = ask
        self._question = question
        self._about = about
        self._most = most
        self._waiting: list[tuple[A, asyncio.Future[B]]] = []
        self._workers: set[asyncio.Task[None]] = set()

    async def __call__(self, wanted: A) -> B:
        """What the answer says about this one. Raises what the question raises."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[B] = loop.create_future()
        self._waiting.append((wanted, answer))
        # One that is done may still be in the set, if its answer is what led to this call.
        if sum(not worker.done() for worker in self._workers) < self._most:
            worker = loop.create_task(self._work())  # begins in the next turn of the loop
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)
        return await answer

    async def _work(self) -> None:
        """Ask until nothing waits."""
        while self._waiting:
            asked = [each for each in self._waiting[:MAX_ASKED] if not each[1].done()]
            del self._waiting[:MAX_ASKED]
            if asked:
                await self._put(asked)

    async def _put(self, asked: Sequence[tuple[A, "asyncio.Future[B]"]]) -> None:
        try:
            answers = await self._answers([wanted for wanted, _ in asked])
        except Exception as error:  # noqa: BLE001 - who waits decides what it means
            for _, answer in asked:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), found in zip(asked, answers, strict=True):
            if not answer.done():
                answer.set_result(found)

    async def _answers(self, wanted: Sequence[A]) -> Sequence[B]:
        answers = await self._question.put(self._ask, self._about(wanted))
        if len(answers) != len(wanted):
            raise self._question.unavailable("a member has not answered everything")
        return answers


_Lookup = _Gathered[tuple[str, str], tuple[int | None] | str]
"""Looks up rights: each of a user to a topic."""


def _granted(found: tuple[B] | str) -> B:
    """The answer. Raises GrantsUnavailable with the reason why there is none."""
    if isinstance(found, str):
        raise GrantsUnavailable(found or "no answer in time")
    return found[0]


class RemoteLogReader:
    """The log of the members. `position` is how far the gateway is: numbers of another epoch mean nothing to it."""

    def __init__(self, ask: Ask, position: Callable[[], Position]) -> None:
        self._ask = ask
        self._position = position

    def epoch(self) -> str:
        """The epoch of the gateway."""
        return self._position().epoch

    async def head(self) -> Position:
        """See LogReader."""
        return await questions.HEAD.put(self._ask, None)

    async def read(self, after: Seq, limit: int) -> Batch:
        """See LogReader."""
        return await questions.READ.put(self._ask, (self.epoch(), after, limit))

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """See LogReader. The member has validated what this returns."""
        return await questions.READ_TOPICS.put(self._ask, (self.epoch(), list(topics), after, upto, limit))

    async def continuity(self, since: Position, upto: Position | None = None) -> str | None:
        """See LogReader, and BatchReader. Without `upto`, the member knows the log as far as this gateway."""
        return await questions.CONTINUITY.put(self._ask, (since, upto or self._position()))

    async def batches(self, after: Position) -> tuple[Position, list[LogBatch]]:
        """The head of the log as the member knows it, and the batches that follow a position; none if it ends there.

        Raises LogUnavailable, and LogTruncated.
        """
        head, batches = await questions.BATCHES.put(self._ask, after)
        try:
            return head, [codec.LOG_BATCH.decode(batch) for batch in batches]
        except BadMessage as error:
            raise LogUnavailable(str(error)) from error

    async def contents(self, after: Position, upto: Seq, hashes: Collection[int]) -> Batch:
        """See BatchReader."""
        return await questions.CONTENTS.put(self._ask, (after, upto, list(hashes)))


class RemoteGrants:
    """The rights that the members look up, in the epoch of the gateway, which `epoch` returns.

    `own_table_of` returns the table that serves a topic without a pack: if one of these is slow, only what is asked
    about the same table waits for it. Nor do others wait for a right that was granted a moment ago: it is asked about
    apart from them.
    """

    def __init__(
        self, ask: Ask, epoch: Callable[[], str], own_table_of: Callable[[Topic], str | None] = lambda _: None
    ) -> None:
        self._ask = ask
        self._epoch = epoch
        self._own_table_of = own_table_of
        self._look_up = self._gathered(questions.RIGHTS)
        self._look_up_slow = self._gathered(questions.SLOW_RIGHTS)
        self._look_up_own: dict[str, _Lookup] = {}

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """See Grants."""
        table = self._own_table_of(topic)
        if table is None:
            found = await self._look_up((user, topic))
            if found == NOT_YET:
                found = await self._look_up_slow((user, topic))
        else:
            if table not in self._look_up_own:
                self._look_up_own[table] = self._gathered(questions.SLOW_RIGHTS, most=1)
            found = await self._look_up_own[table]((user, topic))
        begin = _granted(found)
        return None if begin is None else Seq(begin)

    def _gathered(self, question: Question[Any, Any], most: int = MAX_CONCURRENT_QUESTIONS) -> _Lookup:
        return _Gathered(self._ask, question, lambda lookups: (self._epoch(), lookups), most=most)


class RemoteSignalRights:
    """The rights to signal that the members look up. `concerns` says whether the pack of a topic has to be asked."""

    def __init__(self, ask: Ask, concerns: Callable[[Topic], bool]) -> None:
        self.concerns = concerns
        self._look_up = _Gathered[tuple[str, str], tuple[bool] | str](ask, questions.MAY_SIGNAL)

    async def may_signal(self, user: str, topic: Topic) -> bool:
        """See SignalRights."""
        return _granted(await self._look_up((user, topic)))


class RemoteUsers:
    """The users whom the members know by the subjects of another issuer."""

    def __init__(self, ask: Ask) -> None:
        self._look_up = _Gathered[str, tuple[str | None] | str](ask, questions.USERS)

    async def user_of(self, subject: str) -> str | None:
        """The user whom this subject means; None if there is none. Raises GrantsUnavailable."""
        return _granted(await self._look_up(subject))


class RemoteOwnTables:
    """The tables that the members serve without a pack."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def read(self) -> Sequence[OwnTable]:
        """See OwnTableReader."""
        return await questions.OWN_TABLES.put(self._ask, None)


class RemoteRows:
    """The rows that the members read."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    async def read(self, wanted: Wanted) -> Rows:
        """See RowReader."""
        return await questions.ROWS.put(self._ask, wanted)


class RemoteColumns:
    """The columns that the members know."""

    def __init__(self, ask: Ask) -> None:
        self._look_up = _Gathered[Topic, Tables](ask, questions.COLUMNS, most=1)

    async def columns(self, topic: Topic) -> Tables:
        """See ColumnReader."""
        return await self._look_up(topic)


class RemotePeople:
    """Who is present, as the members know it, for the process of this name."""

    def __init__(self, ask: Ask, process: str) -> None:
        self._ask = ask
        self._process = process

    async def store(self, present: Mapping[tuple[Topic, Key], Person], gone: Collection[tuple[Topic, Key]]) -> bool:
        """See PeopleStore."""
        parts = [Stored(self._process, {}, part) for part in _parts(gone)]
        parts += [Stored(self._process, dict(part), ()) for part in _parts(present.items())]
        is_intact = True
        for part in parts or [Stored(self._process, {}, ())]:
            is_intact &= await questions.STORE_PEOPLE.put(self._ask, part)
        return is_intact

    async def others(self, topics: Collection[Topic]) -> dict[Topic, list[People]]:
        """See PeopleStore."""
        found: dict[Topic, list[People]] = {}
        for part in _parts(topics):
            found |= await questions.OTHERS.put(self._ask, (self._process, part))
        return found

    async def call_hooks(self) -> bool:
        """See PeopleStore."""
        return await questions.CALL_HOOKS.put(self._ask, self._process)


class RemoteAcks:
    """The acknowledged positions that the members keep."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._look_up = _Gathered[Key, Position | None](ask, questions.STORED_ACKS)

    async def store(self, acks: Mapping[Key, Position]) -> None:
        """See AckStore."""
        for part in _parts(acks.items()):
            await questions.STORE_ACKS.put(self._ask, dict(part))

    async def stored(self, device: Key) -> Position | None:
        """See AckStore."""
        return await self._look_up(device)


def _parts(items: Iterable[A]) -> list[list[A]]:
    """The same in parts that fit into one question."""
    whole = list(items)
    return [whole[start : start + MAX_STORED] for start in range(0, len(whole), MAX_STORED)]
