"""Why connections were ended, for those who come back: a close frame behind a backlog never arrives."""

from collections import OrderedDict
from typing import Final

from daemon.core.close_codes import Close

MAX_ENTRIES: Final = 4096


class CloseHistory:
    """The last `most` connections that this side has ended, by session."""

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._ended: OrderedDict[str, tuple[str, Close]] = OrderedDict()

    def record(self, session: str, user: str, close: Close) -> None:
        """Remember why the session of this user was ended; the oldest one is forgotten for it."""
        self._ended[session] = user, close
        if len(self._ended) > self._limit:
            self._ended.popitem(last=False)

    def lookup(self, session: str, user: str) -> Close | None:
        """Why it was ended. None if it was not, if that is too long ago, or if it was somebody else's."""
        whose, close = self._ended.get(session, ("", None))
        return close if whose == user else None
