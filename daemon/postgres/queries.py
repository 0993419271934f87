"""Named SQL: the statements of a .sql file, each below a line `-- name: NAME`."""

import re
from functools import cached_property
from pathlib import Path

_BLOCK = re.compile(r"^-- name: (\w+)\n(.*?)(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)


def split_statements(text: str) -> dict[str, str]:
    """The statements in `text` by name. Text before the first `-- name:` line is ignored."""
    return {name: body.strip() for name, body in _BLOCK.findall(text)}


class Queries:
    """The statements of one file. Call it with a name to get the text. The file is read on the first call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def statements(self) -> dict[str, str]:
        """Every statement by name."""
        return split_statements(self._file.read_text(encoding="utf-8"))

    def __call__(self, name: str) -> str:
        """The text of one statement. Raises KeyError if the file has no such name."""
        return self.statements[name]
