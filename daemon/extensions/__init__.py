"""What packs bring beside their rows: data layers, jobs, commands. Each is one package, which registers itself.

The module `commands` of an extension, if there is one, holds COMMANDS: the click commands that it adds.
"""

import importlib
import pkgutil
from collections.abc import Coroutine, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import click

from daemon.settings import Settings


class CommandOptions(Protocol):
    """What stands before the verb on the command line: the object that click passes to a command."""

    def having(self, **more: Any) -> "CommandOptions":  # noqa: ANN401
        """The same with what an option of a verb says; None says nothing."""

    def quiet(self) -> "CommandOptions":
        """The same with only warnings logged, unless a level was set."""

    @property
    def settings(self) -> Settings:
        """The settings. Raises BadSettings."""

    @property
    def local_settings(self) -> Settings:
        """The same, completed by what a `daemon up` in the same data directory uses."""

    def run(self, settings: Settings, work: Coroutine[Any, Any, object]) -> None:
        """Run what the verb does, logging as the settings say."""


def commands() -> Iterator[click.Command]:
    """The commands of all extensions."""
    for package in pkgutil.iter_modules(__path__, f"{__name__}."):
        if find_spec(f"{package.name}.commands"):
            yield from importlib.import_module(f"{package.name}.commands").COMMANDS
