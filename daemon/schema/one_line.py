"""Puts SQL on one line, so that a statement is part of a message and can still be run."""

import re
from typing import Final

_PART: Final = re.compile(
    r"""
      (?P<escaped> [eE]'(?:[^'\\]|\\.|'')*' )
    | (?P<literal> '(?:[^']|'')*' )
    | (?P<name>    "(?:[^"]|"")*" )
    | (?P<body>    (?P<tag> \$(?:[^\W\d]\w*)?\$ ) (?P<inside> .*? ) (?P=tag) )
    | (?P<space>   \s+ )
    """,
    re.VERBOSE | re.DOTALL,
)


def one_line(sql: str) -> str:
    """The same statements without line breaks. SQL that the server printed has no comments outside of bodies."""
    return _PART.sub(_flat, sql).strip()


def _flat(part: re.Match[str]) -> str:
    if part["space"]:
        return " "
    text: str = part[0]
    if "\n" not in text or part["name"]:
        return text
    if part["escaped"]:
        return text.replace("\n", "\\n")
    inside = text[1:-1].replace("''", "'") if part["literal"] else part["inside"]
    escaped = inside.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n").replace("\r", "\\r")
    return f"E'{escaped}'"
