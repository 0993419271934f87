"""The questions with which gateways use the ports of members: what goes over, what comes back, what may go wrong."""

from collections.abc import Awaitable, Callable
from typing import Final, Generic, Protocol, TypeVar

from pydantic_core import from_json, to_json

from daemon.core.errors import GrantsUnavailable, LogTruncated, LogUnavailable, RowcastError, SnapshotTooLarge
from daemon.relay import codec
from daemon.relay.codec import Message
from daemon.relay.errors import AnswerError, BadMessage, RelayUnavailable

A = TypeVar("A")
B = TypeVar("B")

Ask = Callable[[str, bytes], Awaitable[bytes]]
"""Asks a member: the name of the question, and what it is about. Raises RelayUnavailable and AnswerError."""

MAX_ASKED: Final = 100  # users, topics or subjects in one question
NOT_YET: Final = ""
"""The reason why something has no answer that it may have soon."""

_CODES: Final[dict[str, type[RowcastError]]] = {
    "log_unavailable": LogUnavailable,
    "log_truncated": LogTruncated,
    "grants_unavailable": GrantsUnavailable,
    "snapshot_too_large": SnapshotTooLarge,
}
"""The errors that ports promise, by the code with which they travel. Their attributes are their arguments."""


class Form(Protocol[B]):
    """How answers become bytes: a Message, or something like it."""

    async def pack(self, value: B) -> bytes:
        """The bytes of an answer."""

    async def unpack(self, message: bytes) -> B:
        """The answer of these bytes. Raises BadMessage."""


class Question(Generic[A, B]):
    """A question to a member, by its name.

    `unavailable` is what the port raises that is asked for, if there is no answer, and `also` what else it promises.
    An answer is expected within `timeout` seconds, from whichever member. A member that answers takes less.
    """

    def __init__(
        self,
        name: str,
        asked: Message[A],
        answer: Form[B],
        unavailable: type[LogUnavailable | GrantsUnavailable] = LogUnavailable,
        *also: type[RowcastError],
        timeout: float = 12.0,
    ) -> None:
        self.name = name
        self.asked = asked
        self.answer = answer
        self.timeout = timeout
        self.unavailable = unavailable
        self.raises = (unavailable, *also)

    async def put(self, ask: Ask, about: A) -> B:
        """The answer. Raises what the port promises, whatever went wrong."""
        try:
            return await self.answer.unpack(await ask(self.name, self.asked.encode(about)))
        except RelayUnavailable as error:
            raise self.unavailable(error.reason) from error
        except BadMessage as error:
            raise self.unavailable(str(error)) from error
        except AnswerError as error:
            found = _raised(error)
            raise (found if isinstance(found, self.raises) else self.unavailable(str(error))) from error


def refusal(error: RowcastError) -> AnswerError:
    """An error that a port promises, as it travels."""
    code = next(code for code, type_ in _CODES.items() if isinstance(error, type_))
    return AnswerError(code, to_json(list(vars(error).values())).decode())


def _raised(refused: AnswerError) -> RowcastError | None:
    """The error that travelled; None if it is not one that a port promises."""
    type_ = _CODES.get(refused.code)
    if type_ is None:
        return None
    try:
        return type_(*from_json(refused.text))
    except (ValueError, TypeError):
        return None


HEAD: Final = Question("head", codec.NOTHING, codec.POSITION)
READ: Final = Question("read", codec.AFTER, codec.BATCH, timeout=120.0)
READ_TOPICS: Final = Question(
    "read_topics", codec.TOPICS_UPTO, codec.BATCH, LogUnavailable, LogTruncated, timeout=120.0
)
CONTINUITY: Final = Question("continuity", codec.SINCE_UPTO, codec.OPTIONAL_TEXT)
BATCHES: Final = Question("batches", codec.POSITION, codec.FOLLOWING, LogUnavailable, LogTruncated, timeout=60.0)
CONTENTS: Final = Question(
    "contents", codec.HASHES_UPTO, codec.BATCH, LogUnavailable, LogTruncated, timeout=60.0
)  # fmt: skip
RIGHTS: Final = Question("rights", codec.RIGHTS, codec.FROM, GrantsUnavailable)
SLOW_RIGHTS: Final = Question("slow_rights", codec.RIGHTS, codec.FROM, GrantsUnavailable, timeout=25.0)
ROWS: Final = Question("rows", codec.WANTED, codec.ROWS, LogUnavailable, SnapshotTooLarge, timeout=120.0)
COLUMNS: Final = Question("columns", codec.TEXTS, codec.TABLES)
OWN_TABLES: Final = Question("own_tables", codec.NOTHING, codec.OWN_TABLES)
STORE_PEOPLE: Final = Question("store_people", codec.STORED, codec.BOOLEAN)
OTHERS: Final = Question("others", codec.PROCESS_AND_TOPICS, codec.OTHERS)
CALL_HOOKS: Final = Question("call_hooks", codec.TEXT, codec.BOOLEAN)
STORE_ACKS: Final = Question("store_acks", codec.ACKS, codec.NOTHING)
STORED_ACKS: Final = Question("stored_acks", codec.PAIRS, codec.POSITIONS)
MAY_SIGNAL: Final = Question("may_signal", codec.PAIRS, codec.ALLOWED, GrantsUnavailable)
USERS: Final = Question("users", codec.TEXTS, codec.USERS, GrantsUnavailable)

TIMEOUTS: Final[dict[str, float]] = {
    each.name: each.timeout for each in list(globals().values()) if isinstance(each, Question)
}
"""Within how many seconds an answer to each question is expected."""
