"""Rowcast: a realtime daemon for Postgres."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from daemon.commands.set_up import setup_database

__all__ = ["__version__", "setup_database"]

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> object:
    """`setup_database`, which is imported only if it is used."""
    if name == "setup_database":
        from daemon.commands.set_up import setup_database  # noqa: PLC0415

        return setup_database
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
