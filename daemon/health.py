"""Whether this daemon is ready: the reasons why not, collected from its parts."""

from collections.abc import Callable, Iterable

Check = Callable[[], Iterable[str]]
"""Returns one line for each reason why this daemon is not ready."""


class Readiness:
    """The answer to /readyz and to the watchdog: what its checks say, in their order."""

    def __init__(self, *checks: Check) -> None:
        self._checks = checks

    def reasons(self) -> list[str]:
        """Why this daemon is not ready; empty if it is."""
        return [reason for check in self._checks for reason in check()]
