"""Arguments of the command line."""

from collections.abc import Iterator

import click
import pytest

from daemon.cli.root import cli


def texts(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Parameter]]:
    """The parameters of a command and of those in it that take any text."""
    for parameter in command.params:
        if isinstance(parameter.type, type(click.STRING)):
            yield " ".join((*path, str(parameter.name))), parameter
    if isinstance(command, click.Group):
        for name, part in command.commands.items():
            yield from texts(part, (*path, name))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--apply-ddl", "--grant-to", "caf\udce9"),
        ("reset", "caf\udce9"),
        ("tail", "caf\udce9"),
        ("explain", "users", "--user", "caf\udce9"),
    ],
)
def test_bytes_that_are_not_utf8_are_refused_before_a_command_begins(arguments: tuple[str, ...]) -> None:
    with pytest.raises(click.BadParameter, match="this is not UTF-8"):
        cli.main(list(arguments), standalone_mode=False)


def test_no_argument_takes_bytes_that_are_not_utf8() -> None:
    found = dict(texts(cli))
    assert {"grant_to", "reset target", "tail topic", "explain user", "jobs run name"} <= set(found)
    for name, parameter in found.items():
        with pytest.raises(click.BadParameter, match="this is not UTF-8"):
            parameter.type.convert("caf\udce9", parameter, None)
        assert "café" == parameter.type.convert("café", parameter, None), name
