"""Questions to a node, and their answers: bytes for bytes.

A question is one message to the node's subject. The answer comes to a subject of its own, in numbered parts:

    question  version 1 | milliseconds that the asker waits 4 | length of the name 1 | name | payload
    part      version 1 | kind 1 | number 4 | bytes
              kind: more parts follow, the last part, an error (code and text in JSON), or still at work

NATS may lose any of them. An asker that hears nothing of a question for SILENCE seconds therefore gives up, and so it
does if a part is missing. A node that is still at work says so every SIGN_INTERVAL seconds, so that only a node that
is gone falls silent, and a slow answer is not asked for twice. Still, a question may be answered twice: its answerer
must be able to bear that.

At most MAX_ANSWERS questions are answered at a time, and MAX_OF_A_KIND of one name, so that slow ones leave room for
others. MAX_QUEUED more wait for their turn, unless their askers gave up; the others are refused with the code
`overloaded`.
"""

import asyncio
import itertools
import json
import random
import struct
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NamedTuple, Protocol

from daemon.core.batch import FRESH
from daemon.logs import get_logger
from daemon.relay.errors import AnswerError, OtherVersion, RelayUnavailable

VERSION: Final = 1
MAX_PART: Final = 256 * 1024  # bytes of a part; also of a question
MAX_ANSWER: Final = 64 * 1024 * 1024  # bytes
MAX_AHEAD: Final = 1024 * 1024  # bytes that may wait to be written before the next part; other messages pass between
SILENCE: Final = 1.0  # seconds without a sign of the node after which an asker gives up
SIGN_INTERVAL: Final = 0.4  # seconds between the signs of a node that is still at work
PACE: Final = 0.01  # seconds until it is looked again whether the next part can be written
MAX_ANSWERS: Final = 64  # at a time
MAX_OF_A_KIND: Final = 16  # at a time, with the same name
MAX_QUEUED: Final = 256  # questions that wait for their turn
ASK_TIMEOUT: Final = 10.0  # seconds for the answer of any member, if a question has no time of its own
ELSEWHERE: Final = frozenset({"overloaded", "version", "unknown_question"})
"""Codes of refusals after which another member is asked."""

MORE: Final = 0
LAST: Final = 1
ERROR: Final = 2
WORKING: Final = 3

_QUESTION: Final = struct.Struct(">BIB")
_PART: Final = struct.Struct(">BBI")

Answer = Callable[[str, bytes], Awaitable[bytes]]
"""Answers a question, given its name and its payload. An AnswerError reaches the asker as it is."""

log = get_logger()


class Line(Protocol):
    """What questions need of the connection."""

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written."""

    def send(self, subject: str, payload: bytes, reply: str = "") -> bool:
        """Send at once; False if it is cut off."""


class _Pending:
    """A question on its way, and the parts of its answer."""

    def __init__(self, node: str, deadline: float, limit: asyncio.Timeout) -> None:
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._node = node
        self._deadline, self._limit = deadline, limit
        self._parts: list[bytes] = []
        self._size = 0

    def fail(self, error: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)

    def receive(self, data: bytes) -> None:
        """A part, or a sign, has arrived."""
        version, kind, number = _PART.unpack_from(data)
        if self.answer.done():
            return
        if version != VERSION:
            self.fail(RelayUnavailable(f"{self._node}: {OtherVersion(version)}"))
            return
        if not self._limit.expired():
            self._limit.reschedule(min(self._deadline, asyncio.get_running_loop().time() + SILENCE))
        if kind == ERROR:
            code, text = json.loads(data[_PART.size :])
            self.fail(AnswerError(code, text))
        elif kind in {MORE, LAST}:
            self._add(number, data[_PART.size :], is_last=kind == LAST)

    def _add(self, number: int, part: bytes, *, is_last: bool) -> None:
        if number != len(self._parts):
            self.fail(RelayUnavailable(f"a part of the answer of {self._node} was lost"))
            return
        self._parts.append(part)
        self._size += len(part)
        if self._size > MAX_ANSWER:
            self.fail(RelayUnavailable(f"the answer of {self._node} exceeds {MAX_ANSWER} bytes"))
        elif is_last:
            self.answer.set_result(b"".join(self._parts))


class Asker:
    """Sends questions, and puts their answers together, which come to subjects below `inbox`."""

    def __init__(self, line: Line, inbox: str) -> None:
        self._line, self._inbox = line, inbox
        self._numbers = itertools.count(1)
        self._pending: dict[str, _Pending] = {}

    async def ask(self, node: str, subject: str, question: str, payload: bytes, timeout: float) -> bytes:  # noqa: ASYNC109
        """The answer of a node, which listens on `subject`, within `timeout` seconds.

        Raises RelayUnavailable, or the AnswerError of the other side.
        """
        if len(payload) > MAX_PART:
            raise AnswerError("too_large", f"a question has at most {MAX_PART} bytes")
        name = question.encode()
        message = _QUESTION.pack(VERSION, round(timeout * 1000), len(name)) + name + payload
        number = format(next(self._numbers), "x")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        try:
            async with asyncio.timeout_at(min(deadline, loop.time() + SILENCE)) as limit:
                self._pending[number] = pending = _Pending(node, deadline, limit)
                if not self._line.send(subject, message, f"{self._inbox}.{number}"):
                    raise RelayUnavailable("this node is cut off from NATS")
                return await pending.answer
        except TimeoutError:
            raise RelayUnavailable(f"{node} has not answered in time ({question})") from None
        finally:
            self._pending.pop(number, None)

    def receive(self, subject: str, data: bytes, *, unanswerable: bool) -> None:
        """A message below the inbox has arrived."""
        pending = self._pending.get(subject.rpartition(".")[2])
        if pending is None:
            return  # its asker gave up
        if unanswerable:
            pending.fail(RelayUnavailable("no node of that name listens"))
        else:
            pending.receive(data)

    def fail(self, reason: str) -> None:
        """The connection is lost: no answer will be whole."""
        for pending in self._pending.values():
            pending.fail(RelayUnavailable(reason))


class _Question(NamedTuple):
    name: str
    payload: bytes
    reply: str
    since: float
    until: float


class Answerer:
    """Answers questions, each in a task of its own."""

    def __init__(self, line: Line, answer: Answer) -> None:
        self._line, self._answer = line, answer
        self._queue: deque[_Question] = deque()
        self._tasks: dict[asyncio.Task[None], str] = {}  # and the name of its question
        self._running: Counter[str] = Counter()  # how many of them, by that name
        self._open: dict[str, float] = {}  # since when each question waits for its answer, by its reply subject
        self._signs: asyncio.TimerHandle | None = None

    def receive(self, data: bytes, reply: str) -> None:
        """A question has arrived."""
        version, milliseconds, length = _QUESTION.unpack_from(data)
        if version != VERSION:
            self._refuse(reply, "version", str(OtherVersion(version)))
            return
        name = data[_QUESTION.size : _QUESTION.size + length].decode()
        now = time.monotonic()
        question = _Question(name, data[_QUESTION.size + length :], reply, now, now + milliseconds / 1000)
        if self._has_room(name):
            self._start(question)
        elif len(self._queue) < MAX_QUEUED:
            self._queue.append(question)
        else:
            self._refuse(reply, "overloaded", "this node has too many questions to answer")
            return
        self._open[reply] = now
        if self._signs is None:
            self._signs = asyncio.get_running_loop().call_later(SIGN_INTERVAL, self._give_signs)

    async def close(self) -> None:
        """End the work on all questions."""
        self._queue.clear()
        if self._signs is not None:
            self._signs.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, question: _Question) -> None:
        task = asyncio.create_task(self._work(question))
        self._tasks[task] = question.name
        self._running[question.name] += 1
        task.add_done_callback(self._finish)

    def _has_room(self, name: str) -> bool:
        return len(self._tasks) < MAX_ANSWERS and self._running[name] < MAX_OF_A_KIND

    def _finish(self, task: "asyncio.Task[None]") -> None:
        """A question has its answer: the first one in the queue that now has room is next."""
        name = self._tasks.pop(task)
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]  # names come from outside
        now = time.monotonic()
        for expired in [question for question in self._queue if question.until <= now]:
            self._queue.remove(expired)
            self._open.pop(expired.reply, None)
        question = next((question for question in self._queue if self._has_room(question.name)), None)
        if question is not None:
            self._queue.remove(question)
            self._start(question)

    async def _work(self, question: _Question) -> None:
        try:
            answer = await self._answer(question.name, question.payload)
            if len(answer) > MAX_ANSWER:
                self._refuse(question.reply, "too_large", f"the answer exceeds {MAX_ANSWER} bytes")
            else:
                await self._send(question.reply, answer)
        except AnswerError as error:
            self._refuse(question.reply, error.code, error.text)
        except Exception:  # a bug: the log has its traceback, and the asker should not wait
            log.exception("internal_error", question=question.name)
            self._refuse(question.reply, "internal", "a bug in Rowcast: the log of the node that was asked says more")
        finally:
            self._open.pop(question.reply, None)

    async def _send(self, reply: str, answer: bytes) -> None:
        last = max(0, (len(answer) - 1) // MAX_PART)
        for number in range(last + 1):
            while self._line.waiting > MAX_AHEAD:  # noqa: ASYNC110 - asyncio tells nobody but nats-py of the room
                await asyncio.sleep(PACE)
            part = answer[number * MAX_PART : (number + 1) * MAX_PART]
            if not self._line.send(reply, _PART.pack(VERSION, LAST if number == last else MORE, number) + part):
                return  # its asker hears nothing more, and asks another node

    def _refuse(self, reply: str, code: str, text: str) -> None:
        self._line.send(reply, _PART.pack(VERSION, ERROR, 0) + json.dumps([code, text]).encode())

    def _give_signs(self) -> None:
        self._signs = None
        if not self._open:
            return
        before = time.monotonic() - SIGN_INTERVAL
        for reply, since in self._open.items():
            if since <= before:
                self._line.send(reply, _PART.pack(VERSION, WORKING, 0))
        self._signs = asyncio.get_running_loop().call_later(SIGN_INTERVAL, self._give_signs)


Ask = Callable[[str, str, bytes, float], Awaitable[bytes]]
"""`Link.ask`: the node, the question, its payload, and the seconds that it may take."""


class MemberClient:
    """Asks any member that is alive, as its beats say.

    Members are asked in a random order, until one answers. One that did not answer is left out until its next beat.
    `timeouts` says for how many seconds in total a question is asked, by its name; `may_ask`, which members may be
    asked.
    """

    def __init__(
        self,
        ask: Ask,
        timeouts: Mapping[str, float] = {},
        may_ask: Callable[[str], bool] = lambda _: True,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._timeouts, self._may_ask, self._clock = ask, timeouts, may_ask, clock
        self._beats: dict[str, float] = {}

    def record_beat(self, member: str) -> None:
        """A beat of this member has arrived."""
        self._beats[member] = self._clock()

    @property
    def fresh(self) -> list[str]:
        """The members that are alive and may be asked."""
        since = self._clock() - FRESH
        self._beats = {member: at for member, at in self._beats.items() if at > since}
        return [member for member in self._beats if self._may_ask(member)]

    async def ask(self, question: str, payload: bytes) -> bytes:
        """The answer of a member, in time.

        Raises RelayUnavailable, or the AnswerError of the member that was asked.
        """
        end = self._clock() + self._timeouts.get(question, ASK_TIMEOUT)
        unavailable = RelayUnavailable("this node hears no member over NATS")
        members = self.fresh
        for member in random.sample(members, len(members)):
            if (left := end - self._clock()) <= 0:
                break
            try:
                return await self._ask(member, question, payload, left)
            except RelayUnavailable as error:
                self._beats.pop(member, None)
                unavailable = error
            except AnswerError as error:
                if error.code not in ELSEWHERE:
                    raise
                unavailable = RelayUnavailable(error.text)
        raise unavailable
