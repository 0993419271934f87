"""Why recent connections were closed, for clients that reconnect: a close frame behind a backlog never arrives."""

from collections import OrderedDict
from typing import Final

from daemon.core.close_codes import Close

MAX_ENTRIES: Final = 4096


class CloseHistory:
    """The last `limit` connections that this side closed, by session."""

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._limit = limit
        self._closed: OrderedDict[str, tuple[str, Close]] = OrderedDict()

    def record(self, session: str, user: str, close: Close) -> None:
        """Remember why this user's session was closed. The oldest entry is dropped when there are too many."""
        self._closed[session] = user, close
        if len(self._closed) > self._limit:
            self._closed.popitem(last=False)

    def lookup(self, session: str, user: str) -> Close | None:
        """Why it was closed. None if it was not, if that is too long ago, or if it was another user's session."""
        owner, close = self._closed.get(session, ("", None))
        return close if owner == user else None
