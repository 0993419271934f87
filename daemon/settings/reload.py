"""What is read again on SIGHUP: which settings can change while the daemon serves, and the parts that use them."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

from daemon.core.errors import OperatorFault
from daemon.logs import get_logger
from daemon.settings.model import Settings

log = get_logger()

KEYS: Final = frozenset(
    {"secret", "secret_file", "more_secrets", "more_secrets_file", "public_keys", "jwks"},
)
CERTIFICATE: Final = frozenset({"tls_certificate", "tls_key"})
DOOR: Final = frozenset(
    {
        "origins",
        "hosts",
        "trusted_proxies",
        "proxy_header",
        "max_clients",
        "max_clients_per_user",
        "max_clients_per_address",
        "max_unauthenticated",
        "max_topics",
        "max_filter",
        "max_present",
        "max_present_per_user",
        "signal_rate",
        "frame_bytes",
        "queue_bytes",
        "user_unread_bytes",
        "user_rate",
        "user_cpu",
        "unauthenticated_cpu",
    }
)

Reload = Callable[[Settings], Coroutine[Any, Any, int]]
"""Reads a part's files again, and returns how many things it has. Raises an OperatorFault; then nothing changes."""


def refreshed(running: Settings, read: Settings) -> Settings:
    """The settings of a daemon that runs, with those that a reload can change as they were read again."""
    fields = KEYS | DOOR
    if running.tls_certificate is not None and read.tls_certificate is not None:  # else TLS would begin, or end
        fields |= CERTIFICATE
    return running.model_copy(update={field: getattr(read, field) for field in fields})


def _changed(before: Settings, after: Settings) -> set[str]:
    return {field for field in type(before).model_fields if getattr(before, field) != getattr(after, field)}


def _variables(settings: Settings, fields: set[str]) -> list[str]:
    return sorted(str(type(settings).model_fields[field].validation_alias) for field in fields)


class Reloads:
    """What can be reloaded in a daemon that was started with these settings.

    `read` returns the settings as they are now. `use_door` lets new connections and requests have the door and the
    limits of the settings that it is given; what changes only that is neither read from files nor able to fail.
    """

    def __init__(self, read: Callable[[], Settings], settings: Settings) -> None:
        self._read = read
        self._settings = settings
        self._parts: dict[str, Reload] = {}
        self.use_door: Callable[[Settings], None] = lambda _: None

    def register(self, name: str, reload: Reload) -> None:
        """Reload this part too. `name` is the member of the log line that says how many there are."""
        self._parts[name] = reload

    async def run(self) -> None:
        """Reload everything that can be, and log what came of it. Never raises an OperatorFault."""
        try:
            read = await asyncio.to_thread(self._read)
        except OperatorFault as fault:
            log.warning("reload_failed", reason=_one_line(fault))
            return
        before, self._settings = self._settings, refreshed(self._settings, read)
        if changed := _changed(before, self._settings) & DOOR:
            self.use_door(self._settings)
            log.info("reloaded", settings=_variables(read, changed))
        for name, reload in self._parts.items():
            try:
                log.info("reloaded", **{name: await reload(self._settings)})
            except OperatorFault as fault:
                log.warning("reload_failed", reason=_one_line(fault))
        if kept := _changed(self._settings, read):
            log.warning("reload_incomplete", settings=_variables(read, kept))


def _one_line(fault: OperatorFault) -> str:
    return " ".join(str(fault).split())
