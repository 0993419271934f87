"""What is read again on SIGHUP: the registry of the parts whose settings can change while the daemon serves."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.settings.model import Settings

log = get_logger()

Reload = Callable[[Settings], Coroutine[Any, Any, int]]
"""Reads a part's files again, and returns how many things it has. Raises an OperatorFault; then nothing changes."""


class Reloads:
    """The parts that can be reloaded, by the name of what they read. `read` returns the settings as they are now."""

    def __init__(self, read: Callable[[], Settings]) -> None:
        self._read = read
        self._parts: dict[str, Reload] = {}

    def register(self, name: str, reload: Reload) -> None:
        """Reload this part too. `name` is the member of the log line that says how many there are."""
        self._parts[name] = reload

    async def run(self) -> None:
        """Reload every part, and log what came of it. Never raises an OperatorFault."""
        try:
            settings = await asyncio.to_thread(self._read)
        except OperatorFault as fault:
            log.warning("reload_failed", reason=_one_line(fault))
            return
        for name, reload in self._parts.items():
            try:
                log.info("reloaded", **{name: await reload(settings)})
            except OperatorFault as fault:
                log.warning("reload_failed", reason=_one_line(fault))


def _one_line(fault: OperatorFault) -> str:
    return " ".join(str(fault).split())
