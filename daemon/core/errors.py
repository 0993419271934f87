"""The tree of errors. A docstring is the message, facts are attributes, the type says whose fault it is."""

from typing import ClassVar


class RowcastError(Exception):
    """Something went wrong."""

    def __str__(self) -> str:
        return (self.__doc__ or "").strip().format_map(vars(self))


class ClientFault(RowcastError):
    """The client broke the protocol: it gets an `error` frame, and nothing is logged as an error.

    `code` and `retry` go into the frame; `close` is the close code if the connection ends as well. `frame` is the id
    of the client's frame, if it was read before it was found to be wrong.
    """

    frame: str | int | None = None
    code: ClassVar[str]
    retry: ClassVar[bool] = False
    close: ClassVar[int | None] = None


class BadJson(ClientFault):
    """A frame must be one JSON object in UTF-8."""

    code = "bad_json"


class UnknownOp(ClientFault):
    """The value of "op" is not an operation of rowcast.v1."""

    code = "unknown_op"


class BadFrame(ClientFault):
    """{problem}"""

    code = "bad_frame"

    def __init__(self, problem: str) -> None:
        self.problem = problem


class BadPosition(ClientFault, ValueError):
    """must be a position like "<epoch>:<seq>", as the server sent it"""

    code = "bad_frame"


class BadSnapshot(ClientFault, ValueError):
    """must be true or an object with a "limit", without a "since" beside it"""

    code = "bad_frame"


class BadFilter(ClientFault):
    """{member}: {problem}"""

    code = "bad_filter"

    def __init__(self, member: str, problem: str) -> None:
        self.member, self.problem = member, problem


class FilterTooLarge(ClientFault):
    """{member}: a filter has at most {most} {what}: ask for more rows, and look through them yourself."""

    code = "filter_too_large"

    def __init__(self, member: str, most: int, what: str) -> None:
        self.member, self.most, self.what = member, most, what


class HelloExpected(ClientFault):
    """The first frame must be a hello."""

    code = "hello_expected"
    close = 4400


class HelloTimeout(ClientFault):
    """No hello arrived in time."""

    code = "hello_timeout"
    retry = True
    close = 4401


class BadToken(ClientFault):
    """The token is not valid: get a new one."""

    code = "token"
    close = 4401


class AlreadyGreeted(ClientFault):
    """This connection has already sent a hello."""

    code = "already_greeted"


class AlreadySubscribed(ClientFault):
    """This connection already follows the topic."""

    code = "already_subscribed"


class NoSuchTopic(ClientFault):
    """There is no such topic, or you may not read it."""

    code = "no_such_topic"


class TooManyTopics(ClientFault):
    """A connection may follow at most {limit} topics."""

    code = "too_many_topics"

    def __init__(self, limit: int) -> None:
        self.limit = limit


class TooManyFrames(ClientFault):
    """Too many unanswered frames: wait for the answers."""

    code = "too_many_frames"
    retry = True
    close = 4429


class TooManyConnections(ClientFault):
    """You have too many connections: close another one first."""

    code = "too_many_connections"
    retry = True
    close = 4409


class Overloaded(ClientFault):
    """All connections are taken: try again later."""

    code = "overload"
    retry = True
    close = 1013


class NotSubscribed(ClientFault):
    """You do not follow this topic: subscribe first."""

    code = "not_subscribed"


class MayNotSignal(ClientFault):
    """You may not send signals in this topic."""

    code = "may_not_signal"


class SignalTooLarge(ClientFault):
    """The data of a signal may have at most {limit} bytes."""

    code = "signal_too_large"

    def __init__(self, limit: int) -> None:
        self.limit = limit


class TooManySignals(ClientFault):
    """A connection may send at most {limit} signals a second: this one was dropped."""

    code = "too_many_signals"
    retry = True

    def __init__(self, limit: int) -> None:
        self.limit = limit


class PresenceTooLarge(ClientFault):
    """The data of a presence may have at most {limit} bytes."""

    code = "presence_too_large"

    def __init__(self, limit: int) -> None:
        self.limit = limit


class PresenceFull(ClientFault):
    """At most {limit} devices, and {limit_of_user} of one user, can be present in a topic: follow it without."""

    code = "presence_full"

    def __init__(self, limit: int, limit_of_user: int) -> None:
        self.limit = limit
        self.limit_of_user = limit_of_user


class SnapshotTooLarge(ClientFault):
    """The topic has too many rows (over {rows}, or {size} bytes): ask for fewer, with "limit" or "where"."""

    code = "too_large"

    def __init__(self, rows: int, size: int) -> None:
        self.rows, self.size = rows, size


class SnapshotTooSlow(ClientFault):
    """The snapshot was not read in time: ask again, or for fewer rows, with "limit"."""

    code = "too_slow"


class Unavailable(ClientFault):
    """The database does not answer at the moment: try again."""

    code = "unavailable"
    retry = True


class IdentityUnavailable(ClientFault):
    """Who you are cannot be looked up at the moment: try again."""

    code = "unavailable"
    retry = True
    close = 1013


class LogUnavailable(RowcastError):
    """The log cannot be read: {reason}."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class LogTruncated(RowcastError):
    """The log no longer reaches back that far."""


class GrantsUnavailable(RowcastError):
    """Permissions cannot be checked: {reason}."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class OperatorFault(RowcastError):
    """The operator can fix this: one line says what is wrong and what to do, and the process ends."""

    exit_code: ClassVar[int] = 1


def fault_in(error: BaseException) -> OperatorFault | None:
    """The operator's fault in an error, or in an exception group; None if there is none."""
    if isinstance(error, ExceptionGroup):
        return next(filter(None, map(fault_in, error.exceptions)), None)
    return error if isinstance(error, OperatorFault) else None


class LogUnreadable(OperatorFault):
    """Cannot read the log ({reason}). If Rowcast is not installed in this database, run `daemon --apply-ddl`."""

    exit_code: ClassVar[int] = 36

    def __init__(self, reason: str) -> None:
        self.reason = reason
