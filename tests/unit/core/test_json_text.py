"""Values are replaced in the text of a JSON object, and nothing else of it changes."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.core.json_text import emptied, quoted_numbers, replace_values

TEXTS = st.text(st.sampled_from('ab\\"[]{},: \n\x00é€0-'), max_size=8) | st.text(max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(
    members=st.dictionaries(TEXTS, VALUES, max_size=5),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    data=st.data(),
)
def test_only_the_named_values_are_replaced(
    members: dict[str, Any], ascii_only: bool, indent: int | None, data: st.DataObject
) -> None:
    text = json.dumps(members, ensure_ascii=ascii_only, indent=indent)
    assert replace_values(text, {"elsewhere than in these members": emptied}) == text
    names = data.draw(st.sets(st.sampled_from(sorted(members)))) if members else set()
    found: list[Any] = []

    def replace(value: str) -> str:
        found.append(json.loads(value))
        return "{}"

    replaced = replace_values(text, dict.fromkeys(names, replace))
    assert json.loads(replaced) == members | {name: {} for name in names}
    assert found == [value for name, value in members.items() if name in names]


@given(VALUES)
def test_an_emptied_value_keeps_its_type(value: Any) -> None:
    empty = json.loads(emptied(json.dumps(value)))
    assert (type(empty) in {int, float}) if type(value) is float else type(empty) is type(value)
    assert not empty or empty is True


@given(st.recursive(st.integers() | st.none() | TEXTS, lambda inner: st.lists(inner, max_size=5)))
def test_numbers_are_quoted_and_texts_are_not(value: Any) -> None:
    def quoted(part: Any) -> Any:
        if isinstance(part, list):
            return [quoted(item) for item in part]
        return str(part) if isinstance(part, int) else part

    assert json.loads(quoted_numbers(json.dumps(value))) == quoted(value)


@pytest.mark.parametrize("number", ["0", "-0", "1.50", "12e300", "-1.5E-10", "1e+5", "9" * 5000])
def test_every_digit_is_kept(number: str) -> None:
    assert f'"{number}"' == quoted_numbers(number)
    assert f'["{number}", "{number}"]' == quoted_numbers(f"[{number}, {number}]")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"a"',
        "{",
        '{"a"',
        '{"a":',
        '{"a":}',
        '{"a":1',
        '{"a":1,',
        '{"a":[',
        '{"a":[1}',
        '{"a" 1}',
        '{"a":1]',
    ],
)
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="JSON"):
        replace_values(text, {"b": emptied})
