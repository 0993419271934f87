"""Extensions of packs: data layers and commands. Every subpackage is an extension.

An extension that adds verbs to the command line has a module `commands` whose COMMANDS are click commands.
"""

import importlib
import pkgutil
from collections.abc import Coroutine, Iterator
from importlib.util import find_spec
from typing import Any, Protocol

import click

from daemon.settings import Settings


class CommandOptions(Protocol):
    """The options before the verb: the object that click passes to a command."""

    def having(self, **more: Any) -> "CommandOptions":  # noqa: ANN401
        """A copy with these options of the verb added; None leaves an option as it is."""

    def quiet(self) -> "CommandOptions":
        """A copy that logs only warnings, unless a level was set."""

    @property
    def settings(self) -> Settings:
        """The settings. Raises BadSettings."""

    @property
    def local_settings(self) -> Settings:
        """The settings, completed by those that a `daemon up` in the same data directory uses."""

    def run(self, settings: Settings, work: Coroutine[Any, Any, object]) -> None:
        """Run the verb's work, with logging as the settings say."""


def commands() -> Iterator[click.Command]:
    """The commands of all extensions."""
    for package in pkgutil.iter_modules(__path__, f"{__name__}."):
        if find_spec(f"{package.name}.commands"):
            yield from importlib.import_module(f"{package.name}.commands").COMMANDS
