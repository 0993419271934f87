"""The .sql files of ddl/ and triggers/: read, put into a schema, and checked for statements that are not allowed."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import asyncpg

from daemon.core.errors import OperatorFault

NO_TRANSACTION: Final = "-- no-transaction"
"""The first line of a file whose statements run one by one, each outside a transaction."""


class BadSqlFile(OperatorFault):
    """{file}, line {line}: {problem}."""

    exit_code: ClassVar[int] = 65

    def __init__(self, file: str, line: int, problem: str) -> None:
        self.file, self.line, self.problem = file, line, problem


class BadSchemaName(OperatorFault):
    """The schema name "{name}" is not allowed: {reason}."""

    exit_code: ClassVar[int] = 64

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason


@dataclass(frozen=True, slots=True)
class Statement:
    """A statement: its text, its words outside quotes and comments, and its offset in the file."""

    text: str
    words: tuple[str, ...]
    start: int


@dataclass(frozen=True, slots=True)
class SqlFile:
    """A file that passed the checks. `name` is for messages, e.g. `shop/0001_tables.up.sql`."""

    name: str
    text: str
    statements: tuple[Statement, ...]
    in_transaction: bool

    @property
    def script(self) -> str:
        """The text, terminated so that another statement can follow."""
        closed = not self.statements or self.statements[-1].text.endswith(";")
        return self.text.rstrip() + ("\n" if closed else "\n;\n")

    def place(self, error: asyncpg.PostgresError, statement: Statement | None = None) -> str:
        """The place of an error in the file, or in one statement of it: the name, and the line if known."""
        start = statement.start if statement else 0
        position: str | None = getattr(error, "position", None)  # in characters, from 1
        if position is None and statement is None:
            return f" in {self.name}"
        return f" in {self.name}, line {_line(self.text, start + int(position or 1) - 1)}"


def check_schema_name(name: str, *, own: bool = False) -> None:
    """Raises BadSchemaName for a name that needs quotes or is taken. With `own`, Rowcast's own schema is allowed.

    The name is inserted into files without quotes. Reserved words pass: only the server knows them all.
    """
    if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", name):
        raise BadSchemaName(name, "use at most 63 characters a-z, 0-9 and _, not beginning with a digit")
    if (name == "rowcast" and not own) or name == "information_schema" or name.startswith("pg_"):
        raise BadSchemaName(name, "it belongs to Rowcast or to Postgres")


def read(path: Path, *, pack: str, schema: str) -> SqlFile:
    """Read a pack's file, with every `pack.` replaced by `schema.`. Raises BadSqlFile."""
    name = f"{path.parent.name}/{path.name}"
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise BadSqlFile(name, 1, "it is not UTF-8") from None
    except OSError as error:
        raise BadSqlFile(name, 1, f"it cannot be read ({error.strerror})") from None
    text = re.sub(rf"\b{re.escape(pack)}\.", f"{schema}.", text)
    in_transaction = text.partition("\n")[0].rstrip() != NO_TRANSACTION
    statements = tuple(_statements(text))
    for statement in statements:
        if problem := _problem(statement, in_transaction=in_transaction):
            raise BadSqlFile(name, _line(text, statement.start), problem)
    return SqlFile(name, text, statements, in_transaction)


def _problem(statement: Statement, *, in_transaction: bool) -> str | None:
    """Why a statement must not be part of a revision, or None."""
    match statement.words:
        case ("begin" | "commit" | "rollback" | "abort" | "end" as word, *_):
            return f"{word.upper()} is not allowed: each revision is one transaction"
        case ("start", "transaction", *_) | ("prepare", "transaction", *_):
            return "transaction control is not allowed: each revision is one transaction"
        case ("refresh", *_):
            return None  # a materialized view may be refreshed concurrently inside a transaction
        case words if "concurrently" in words and in_transaction:
            return f'CONCURRENTLY needs a file of its own, with "{NO_TRANSACTION}" as its first line'
    return None


_TOKEN: Final = re.compile(
    r"""
      (?P<comment> --[^\n]* | /\* )
    | (?P<string>  [eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" )
    | (?P<dollar>  \$(?:[^\W\d]\w*)?\$ )
    | (?P<word>    [^\W\d][\w$]* )
    | (?P<open>    \( )
    | (?P<close>   \) )
    | (?P<end>     ; )
    """,
    re.VERBOSE | re.DOTALL,
)


def _statements(text: str) -> Iterator[Statement]:
    """Split at the semicolons that end statements, not those in quotes, comments, parentheses and function bodies."""
    start: int | None = None  # of the statement, at its first token
    words: list[str] = []
    parentheses = bodies = position = 0
    while token := _TOKEN.search(text, position):
        kind, position = token.lastgroup, token.end()
        if kind == "comment":
            if token[0] == "/*":
                position = _end_of_comment(text, position)
            continue
        if kind == "end" and not parentheses and not bodies:
            if start is not None:
                yield _statement(text, start, position, words)
            start, words = None, []
            continue
        start = token.start() if start is None else start
        if kind == "dollar":
            closing = text.find(token[0], position)
            position = len(text) if closing < 0 else closing + len(token[0])
        elif kind == "word":
            words.append(token[0].lower())
            if words[-2:] == ["begin", "atomic"] or (bodies and words[-1] == "case"):
                bodies += 1  # an unquoted function body; `case` has its own `end`
            elif bodies and words[-1] == "end":
                bodies -= 1
        elif kind == "open":
            parentheses += 1
        elif kind == "close":
            parentheses = max(0, parentheses - 1)
    if start is not None:
        yield _statement(text, start, len(text), words)


def _statement(text: str, start: int, end: int, words: list[str]) -> Statement:
    return Statement(text[start:end], tuple(words), start)


def _line(text: str, index: int) -> int:
    return text.count("\n", 0, index) + 1


def _end_of_comment(text: str, position: int) -> int:
    """The offset after a block comment, which may contain others."""
    depth = 1
    for mark in re.compile(r"/\*|\*/").finditer(text, position):
        depth += 1 if mark[0] == "/*" else -1
        if not depth:
            return mark.end()
    return len(text)
