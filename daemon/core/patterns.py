"""The patterns of LIKE, matched in a time that grows with text and pattern only, whatever they are."""

import re
from collections.abc import Callable, Iterator
from string import ascii_lowercase, ascii_uppercase
from typing import Final

_TO_LOWER: Final = str.maketrans(ascii_uppercase, ascii_lowercase)


def ascii_lower(text: str) -> str:
    """The text with A to Z as small letters, which is what ILIKE compares in the collation "C"."""
    return text.lower() if text.isascii() else text.translate(_TO_LOWER)


def like(pattern: str) -> Callable[[str], bool]:
    """Whether a text is like the pattern. Raises ValueError if that ends with the escape character."""
    first, *others = _pieces(pattern)
    if not others:
        return lambda text: first.fullmatch(text) is not None
    last = others.pop()
    width = _width(last)

    def matches(text: str) -> bool:
        found = first.match(text)
        # The leftmost place of each piece leaves the most room for the next one, so no other has to be tried.
        for piece in others:
            if found is None:
                return False
            found = piece.search(text, found.end())
        if found is None:
            return False
        start = len(text) - width
        return start >= found.end() and last.fullmatch(text, start) is not None

    return matches


def _pieces(pattern: str) -> Iterator[re.Pattern[str]]:
    """What stands between the `%`, each piece of a fixed width."""
    piece, escaped = "", False
    for character in pattern:
        if escaped or character not in "\\%_":
            piece, escaped = piece + re.escape(character), False
        elif character == "\\":
            escaped = True
        elif character == "_":
            piece += "."
        else:
            yield re.compile(piece, re.DOTALL)
            piece = ""
    if escaped:
        raise ValueError
    yield re.compile(piece, re.DOTALL)


def _width(piece: re.Pattern[str]) -> int:
    """How many characters a piece matches."""
    return len(re.sub(r"\\(.)", r"\1", piece.pattern, flags=re.DOTALL))
