"""Named SQL: the statements of a .sql file, each below a line `-- name: NAME`."""

import re
from functools import cached_property
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


def split_statements(text: str) -> dict[str, str]:
    """The statements in `text` by name. What comes before the first `-- name:` line is left out."""
    return {name: body.strip() for name, body in _BLOCK.findall(text)}


class Queries:
    """The statements of one file. Call it with a name to get the text; the file is read at the first call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def statements(self) -> dict[str, str]:
        """Every statement by name."""
        return split_statements(self._file.read_text(encoding="utf-8"))

    def __call__(self, name: str) -> str:
        """The text of one statement. Raises KeyError for a name that the file does not have."""
        return self.statements[name]
