"""The readiness of this daemon, collected from its parts."""

from collections.abc import Callable, Iterable

Check = Callable[[], Iterable[str]]
"""Returns one line for each reason why this daemon is not ready."""


class Readiness:
    """The readiness for /readyz and the watchdog: the reasons of all checks, in order."""

    def __init__(self, *checks: Check) -> None:
        self._checks = checks

    def reasons(self) -> list[str]:
        """The reasons why this daemon is not ready; empty if it is."""
        return [reason for check in self._checks for reason in check()]
