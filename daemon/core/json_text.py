"""JSON objects as Postgres wrote them: their values are replaced in the text, and what is inside is not parsed.

A parser of JSON has limits that the types json, jsonb and numeric do not have: levels, digits, surrogates.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

_TEXT: Final = r'"(?:[^"\\]++|\\.)*+"'
_FLAT: Final = rf"(?:[^\"\[\]{{}}]++|{_TEXT})*+"
_NAME: Final = re.compile(rf"\s*({_TEXT})\s*:\s*", re.DOTALL)
_SCALAR: Final = re.compile(rf"{_TEXT}|[^\s,\"\[\]{{}}]++", re.DOTALL)
_NEXT: Final = re.compile(r"\s*([,}])")
# The next run of brackets, past what nests no further: most of a value is skipped in few steps.
_BRACKETS: Final = re.compile(rf"(?:{_FLAT}(?:\[{_FLAT}\]|\{{{_FLAT}\}}))*+{_FLAT}([\[{{]++|[\]}}]++)", re.DOTALL)
_TEXT_OR_NUMBER: Final = re.compile(rf"{_TEXT}|(-?[0-9][0-9.eE+-]*+)", re.DOTALL)
_TEXTS: Final = re.compile(_TEXT, re.DOTALL)


def replace_values(text: str, replacements: Mapping[str, Callable[[str], str]]) -> str:
    """The object with the values of these members replaced; everything else is copied.

    Raises ValueError if the text is visibly no JSON object. It is not validated.
    """
    if not replacements:
        return text
    parts: list[str] = []
    copied = 0
    for name, start, end in _members(text):
        replace = replacements.get(name)
        if replace is not None:
            parts += text[copied:start], replace(text[start:end])
            copied = end
    return "".join(parts) + text[copied:] if parts else text


def members(text: str) -> dict[str, str]:
    """The text of each member of the object. Raises ValueError if the text is visibly no JSON object."""
    return {name: text[start:end] for name, start, end in _members(text)}


def quoted_numbers(value: str) -> str:
    """A number as a string with exactly its digits. In an array, each number."""
    return _TEXT_OR_NUMBER.sub(lambda found: f'"{found[1]}"' if found[1] else found[0], value)


def emptied(value: str) -> str:
    """A value of the same type without its content. Raises ValueError for NaN and Infinity: JSON has neither."""
    if ("NaN" in value or "Infinity" in value) and re.search("NaN|Infinity", _TEXTS.sub("", value)):
        raise ValueError("not a JSON number")
    empty = {"{": "{}", "[": "[]", '"': '""'}.get(value[0])
    return empty if empty is not None else value if value in {"true", "false", "null"} else "0"


def _members(text: str) -> Iterator[tuple[str, int, int]]:
    """The name of each member of the object, and where its value begins and ends."""
    opening = re.match(r"\s*\{\s*", text)
    if opening is None:
        raise ValueError("not a JSON object")
    place = opening.end()
    if text.startswith("}", place):
        return
    while True:
        name = _match(_NAME, text, place)
        end = _value_end(text, name.end())
        yield json.loads(name[1]), name.end(), end
        separator = _match(_NEXT, text, end)
        place = separator.end()
        if separator[1] == "}":
            return


def _value_end(text: str, start: int) -> int:
    if not text.startswith(("{", "["), start):
        return _match(_SCALAR, text, start).end()
    depth, place = 1, start + 1
    while True:
        brackets = _match(_BRACKETS, text, place)
        number, place = len(brackets[1]), brackets.end()
        if brackets[1][0] in "[{":
            depth += number
        elif number < depth:
            depth -= number
        else:
            return place - number + depth


def _match(pattern: re.Pattern[str], text: str, place: int) -> re.Match[str]:
    found = pattern.match(text, place)
    if found is None:
        raise ValueError("not a JSON object")
    return found
