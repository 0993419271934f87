"""Capture with a safeguard removed. A property test that does not notice proves nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from daemon.postgres.connect import Connection


@dataclass(frozen=True)
class Mutant:
    """A replacement in the text of a function of capture, and the theme whose cases notice it."""

    theme: str
    function: str
    before: str
    after: str


MUTANTS: Final[dict[str, Mutant]] = {}


@asynccontextmanager
async def mutated(admin: Connection, mutant: Mutant) -> AsyncIterator[None]:
    original = await admin.fetchval("select pg_get_functiondef($1::regproc)", mutant.function)
    assert mutant.before in original, f"{mutant.function} does not contain {mutant.before!r}"
    await admin.execute(original.replace(mutant.before, mutant.after))
    try:
        yield
    finally:
        await admin.execute(original)
