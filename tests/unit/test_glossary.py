"""The names in the code use the words of docs/glossary.md: none contains a word that was retired there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("daemon", "tests", "bench")

RETIRED = {
    "attend": "open",
    "attends": "opens",
    "attended": "opened",
    "attendant": "client handler",
    "bell": "wakeup",
    "bells": "wakeups",
    "buried": "stored as a dead letter",
    "buries": "stores as a dead letter",
    "bury": "store as a dead letter",
    "curtailed": "truncated",
    "deaf": "notify unavailable",
    "desk": "client context",
    "dismiss": "drain",
    "doorbell": "notifier",
    "doorbells": "notifiers",
    "farewell": "close history",
    "farewells": "close history",
    "hear": "receive",
    "heard": "received",
    "hears": "receives",
    "lent": "acquired",
    "letters": "dead letters",
    "rang": "notified",
    "reign": "term",
    "reigns": "terms",
    "ring": "notify, wakeup",
    "ringing": "notifying",
    "rings": "notifies, wakeups",
    "rung": "notified",
    "sift": "validate",
    "sifted": "validated",
    "sifts": "validates",
    "tell": "send",
    "tells": "sends",
    "tend": "tick",
    "tends": "ticks",
    "told": "sent",
    "vigil": "adaptive poller",
    "whoever": "the one who",
}
# Parts of names that contain a retired word and are right.
ALLOWED = re.compile(
    r"dead_?letters?"  # the term
    r"|rowcast_ring|must_ring",  # SQL functions, and a setting that applications use
    re.IGNORECASE,
)
OLD_CONSTANT = re.compile(r"_?(MOST|LEAST)(_[A-Z_]+)?|[A-Z_]+_(WITHIN|AFTER)")


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a module gives: of classes, functions, arguments, variables and attributes, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield node.lineno, name
            case ast.arg(arg=name, lineno=line) | ast.alias(asname=str(name), lineno=line):
                yield line, name
            case (
                ast.Name(id=name, ctx=ast.Store(), lineno=line)
                | ast.Attribute(attr=name, ctx=ast.Store(), lineno=line)
            ):
                yield line, name
            case ast.MatchAs(name=str(name), lineno=line) | ast.ExceptHandler(name=str(name), lineno=line):
                yield line, name


def words(name: str) -> list[str]:
    """The words of a name in snake_case or CamelCase."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def problem(name: str) -> str | None:
    """What is wrong with a name; None if nothing is."""
    if OLD_CONSTANT.fullmatch(name):
        return "use MAX_, MIN_, _TIMEOUT or _DELAY"
    retired = [word for word in words(ALLOWED.sub("", name)) if word in RETIRED]
    return ", ".join(f"{word}: use {RETIRED[word]}" for word in retired) or None


def test_no_name_contains_a_retired_word() -> None:
    problems = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for line, name in [(1, path.stem), *names(tree)]:
            if found := problem(name):
                problems.append(f"{path.relative_to(ROOT)}:{line}: {name} ({found})")
    assert "" == "\n".join(dict.fromkeys(problems))


@pytest.mark.parametrize(
    "code",
    [
        "class Doorbell: ...",
        "def _bury(): ...",
        "def offer(told): ...",
        "for letters in page: ...",
        "self.vigil = 1",
        "import poller as vigil",
        "MOST_FRAMES = 1",
        "_LEAST_DELAY: int = 1",
        "HELLO_WITHIN = 1",
        "RETRY_AFTER = 1",
        "def test_nothing_is_told_twice(): ...",
        "match frame:\n    case Frame(told): ...",
    ],
)
def test_a_retired_word_is_found_in_every_kind_of_name(code: str) -> None:
    assert any(problem(name) for _, name in names(ast.parse(code)))


def test_ordinary_names_and_terms_of_the_glossary_are_allowed() -> None:
    allowed = [
        "UnknownDeadLetter",
        "dead_letters",
        "test_with_rowcast_ring_off",
        "at_most",
        "MAX_FRAMES",
        "after",
        "string",
    ]
    assert [] == [name for name in allowed if problem(name)]
