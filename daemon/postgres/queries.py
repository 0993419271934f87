"""Named SQL: the statements of a .sql file, each below a line `-- name: NAME`."""

import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from daemon import metrics

if TYPE_CHECKING:
    from asyncpg.connection import LoggedQuery

_BLOCK = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)

_names: dict[str, str] = {}  # by the text of the statement


def split_statements(text: str) -> dict[str, str]:
    """The statements in `text` by name. Text before the first `-- name:` line is ignored."""
    return {name: body.strip() for name, body in _BLOCK.findall(text)}


def named(text: str, name: str) -> str:
    """The same text, whose duration is measured under this name. It may contain names of schemas, but no values."""
    _names[text] = name
    return text


def measure(statement: "LoggedQuery") -> None:
    """Observe the duration of a statement, if it has a name."""
    if name := _names.get(statement.query):
        metrics.QUERY_SECONDS.labels(query=name).observe(statement.elapsed)


class Queries:
    """The statements of one file. Call it with a name to get the text. The file is read on the first call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def statements(self) -> dict[str, str]:
        """Every statement by name."""
        found = split_statements(self._file.read_text(encoding="utf-8"))
        return {name: named(text, name) for name, text in found.items()}

    def __call__(self, name: str) -> str:
        """The text of one statement. Raises KeyError if the file has no such name."""
        return self.statements[name]
