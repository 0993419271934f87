"""LIKE, without Postgres; tests/postgres/test_filters.py compares it with the real one."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.core.patterns import ascii_lower, like


def _by_backtracking(pattern: str) -> re.Pattern[str]:
    parts = re.findall(r"\\.|.", pattern, re.DOTALL)
    wild = {"%": ".*", "_": "."}
    return re.compile("".join(wild.get(part) or re.escape(part[-1]) for part in parts), re.DOTALL)


@given(st.text("ab%_\\\n", max_size=8), st.text("ab%_\n", max_size=10))
def test_a_pattern_matches_what_trying_every_possibility_would(pattern: str, text: str) -> None:
    plain = re.sub(r"\\.", "x", pattern, flags=re.DOTALL)
    if plain.endswith("\\") or re.search(r"%[^%]*[^%_]_+[^%_][^%]*%", plain):
        with pytest.raises(ValueError):
            like(pattern)
    else:
        assert (_by_backtracking(pattern).fullmatch(text) is not None) == like(pattern)(text)


def test_a_pattern_that_would_backtrack_for_years_is_matched_at_once() -> None:
    for pattern in ("%a" * 50 + "%b", "%" + "_" * 98 + "b", "%" + "_" * 48 + "a" * 49 + "b%"):
        matches = like(pattern)
        began = time.process_time()
        assert not matches("a" * 1_000_000)
        assert time.process_time() - began < 10


def test_only_the_capitals_of_ascii_become_small() -> None:
    assert ("abc", "Äß a") == (ascii_lower("AbC"), ascii_lower("Äß A"))
