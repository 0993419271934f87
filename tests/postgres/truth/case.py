"""What a generator produces and a trial runs: plain SQL, so that a failing case can be cut down and read."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from tests.postgres.truth.values import Type, identifier, quote

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    name: str
    type: Type
    values: tuple[str, ...]
    generated: bool = False  # the table computes it: it is never written

    @property
    def quoted(self) -> str:
        return identifier(self.name)


@dataclass(frozen=True)
class Watched:
    """A watched table, and what its clients should see of it."""

    relation: str
    topic: str
    published: tuple[Column, ...]
    key: tuple[Column, ...]
    soft_delete: str | None = None
    per_row: bool = False

    @property
    def call(self) -> str:
        published = ", ".join(quote(column.name) for column in self.published)
        key = ", ".join(quote(column.name) for column in self.key)
        return (
            f"select rowcast.watch({quote(self.relation)}, {quote(self.topic)}, array[{published}], array[{key}]"
            + (f", soft_delete => {quote(self.soft_delete)}" if self.soft_delete else "")
            + (", per_row => true" if self.per_row else "")
            + ")"
        )

    @property
    def rows(self) -> str:
        """A query for its rows: their topics, the texts of key and record, and the text of each published column."""
        live = f"r.{identifier(self.soft_delete)} is null" if self.soft_delete else "true"
        return (
            f"select ({self.topic}) as topics, {_json_of(self.key)}::text as key, {_json_of(self.published)}::text as"
            f" record from {self.relation} as r where {live}"
        )


def _json_of(columns: tuple[Column, ...]) -> str:
    """One JSON expression over the row `r`. No column is called `zq`."""

    def value(column: Column) -> str:
        text = f"case when num_nulls(r.{column.quoted}) = 0 then format('%s', r.{column.quoted}) end"
        if column.type.as_texts:
            return f"({text})::text[] as {column.quoted}"
        return f"{text} as {column.quoted}" if column.type.as_text else f"r.{column.quoted}"

    items = ", ".join(map(value, columns))
    return f"(select row_to_json(zq) from (select {items}) as zq)"


@dataclass(frozen=True)
class Transaction:
    statements: tuple[str, ...]
    isolation: str = "read committed"
    commits: bool = True


@dataclass(frozen=True)
class Case:
    """`setup` makes the tables, `nests` what happens when they are written, and `settings` the writer's session.

    With `savepoints` each statement that fails is undone alone; otherwise it ends its transaction.
    """

    name: str
    setup: tuple[str, ...]
    watched: tuple[Watched, ...]
    nests: tuple[str, ...]
    settings: tuple[str, ...]
    transactions: tuple[Transaction, ...]
    savepoints: bool = True

    def parts(self) -> Iterator["Case"]:
        """The case with one part removed, the largest parts first."""
        for place in reversed(range(len(self.transactions))):
            yield replace(self, transactions=_without(self.transactions, place))
        for place in reversed(range(len(self.nests))):
            yield replace(self, nests=_without(self.nests, place))
        for place in range(len(self.settings)):
            yield replace(self, settings=_without(self.settings, place))
        for place, watched in enumerate(self.watched):
            if len(self.watched) > 1:
                yield replace(self, watched=_without(self.watched, place))
            yield from (
                replace(self, watched=(*self.watched[:place], fewer, *self.watched[place + 1 :]))
                for fewer in _published_less(watched)
            )
        for place, transaction in enumerate(self.transactions):
            for part in reversed(range(len(transaction.statements))):
                fewer = replace(transaction, statements=_without(transaction.statements, part))
                yield replace(self, transactions=(*self.transactions[:place], fewer, *self.transactions[place + 1 :]))
        for place in reversed(range(len(self.setup))):
            yield replace(self, setup=_without(self.setup, place))

    def script(self) -> str:
        """The case as a script for psql."""
        lines = [f"-- {self.name}", *(f"{line};" for line in self.setup), *(f"{w.call};" for w in self.watched)]
        lines += [f"{line};" for line in (*self.nests, *self.settings)]
        for transaction in self.transactions:
            lines += [
                f"begin isolation level {transaction.isolation};",
                *(f"    {statement};" for statement in transaction.statements),
                "commit;" if transaction.commits else "rollback;",
            ]
        return "\n".join(lines)


def _without(items: tuple[T, ...], place: int) -> tuple[T, ...]:
    return items[:place] + items[place + 1 :]


def _published_less(watched: Watched) -> Iterator[Watched]:
    if len(watched.published) > 1:
        for place in range(len(watched.published)):
            yield replace(watched, published=_without(watched.published, place))
    if watched.soft_delete:
        yield replace(watched, soft_delete=None)
