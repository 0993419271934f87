"""The patterns of LIKE, matched in a time that grows with the text only, whatever they are."""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple


def ascii_lower(text: str) -> str:
    """The text with A to Z as small letters, which is what ILIKE compares in the collation "C"."""
    return (
        text.lower() if text.isascii() else text.encode(errors="surrogatepass").lower().decode(errors="surrogatepass")
    )


class _Piece(NamedTuple):
    """What stands between two `%`: texts, each with its place, in so many characters; the others are `_`."""

    texts: tuple[tuple[int, str], ...]
    width: int

    def is_at(self, text: str, start: int) -> bool:
        """Whether the text is like this from `start` on, which leaves room for it."""
        return all(text.startswith(part, start + place) for place, part in self.texts)


def like(pattern: str) -> Callable[[str], bool]:
    """Whether a text is like the pattern. Raises ValueError if it is not a pattern, or not one that is matched."""
    first, *others = map(_piece, _pieces(pattern))
    if not others:
        return lambda text: len(text) == first.width and first.is_at(text, 0)
    last = others.pop()
    inner = [_searched(piece) for piece in others]
    width = first.width + last.width

    def matches(text: str) -> bool:
        if len(text) < width or not first.is_at(text, 0):
            return False
        place = first.width
        # The leftmost place of each piece leaves the most room for the next one, so no other has to be tried.
        for before, part, after in inner:
            place = text.find(part, place + before)
            if place < 0:
                return False
            place += len(part) + after
        start = len(text) - last.width
        return start >= place and last.is_at(text, start)

    return matches


def _searched(piece: _Piece) -> tuple[int, str, int]:
    """A piece that can be anywhere: its text, with how many characters before it and after it."""
    if not piece.texts:
        return piece.width, "", 0
    if len(piece.texts) > 1:  # a text of equal letters would be compared with all of it at each of its places
        raise ValueError("must not have a _ between letters that stand between two %")
    [(before, part)] = piece.texts
    return before, part, piece.width - before - len(part)


def _piece(characters: list[str | None]) -> _Piece:
    texts = []
    for is_wild, run in groupby(enumerate(characters), key=lambda at: at[1] is None):
        if not is_wild:
            places, found = zip(*run, strict=True)
            texts.append((places[0], "".join(found)))
    return _Piece(tuple(texts), len(characters))


def _pieces(pattern: str) -> Iterator[list[str | None]]:
    """The characters between the `%`; None for `_`."""
    piece: list[str | None] = []
    is_escaped = False
    for character in pattern:
        if is_escaped or character not in "\\%_":
            piece.append(character)
            is_escaped = False
        elif character == "\\":
            is_escaped = True
        elif character == "_":
            piece.append(None)
        else:
            yield piece
            piece = []
    if is_escaped:
        raise ValueError("must not end with a single backslash, which takes the next character as it is")
    yield piece
