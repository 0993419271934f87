"""Why connections were ended, for those who come back: a close frame behind a backlog never arrives."""

from collections import OrderedDict
from typing import Final

from daemon.core.close_codes import Close

MOST: Final = 4096


class Farewells:
    """The last `most` connections that this side has ended, by session."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._ended: OrderedDict[str, tuple[str, Close]] = OrderedDict()

    def keep(self, session: str, user: str, close: Close) -> None:
        """Remember why the session of this user was ended; the oldest one is forgotten for it."""
        self._ended[session] = user, close
        if len(self._ended) > self._most:
            self._ended.popitem(last=False)

    def find(self, session: str, user: str) -> Close | None:
        """Why it was ended. None if it was not, if that is too long ago, or if it was somebody else's."""
        whose, close = self._ended.get(session, ("", None))
        return close if whose == user else None
