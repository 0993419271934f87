"""Settings: read once at startup, and validated together."""

from daemon.settings.errors import BadSettings
from daemon.settings.load import VARIABLES, load, load_with_sources
from daemon.settings.model import Settings
from daemon.settings.reload import Reloads, refreshed
from daemon.settings.values import SECRET_BYTES, Address

__all__ = [
    "SECRET_BYTES",
    "VARIABLES",
    "Address",
    "BadSettings",
    "Reloads",
    "Settings",
    "load",
    "load_with_sources",
    "refreshed",
]
