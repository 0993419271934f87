"""Random tables, the ways to write to them, and how they are watched."""

import random
from dataclasses import dataclass, field
from typing import Final

from tests.postgres.truth.case import Column, Watched
from tests.postgres.truth.values import ALTERED, BUILT_IN, INTEGER, OWN, TEXT, Type, array_of, identifier

# Names that the parts of a capture function might use themselves, and names that need quotes.
ODD_NAMES: Final = (
    "x", "k", "r", "o", "n", "t", "g", "c", "e", "b", "u", "w", "new", "old", "key", "topic", "topics", "kind",
    "record", "changed", "gives", "live", "step", "rights", "actor", "grants", "revokes", "id", "watch", "new_rows",
    "old_rows", "found", "tg_op", "tg_relid", "tg_argv", "sqlstate", "sqlerrm", "nested", "row", "rows", "value",
    "select", "table", "null", "default", "user", "current_user", "ctid ", "$1", "%s", "%1$s", "%%", "%L", "it's",
    'a"b', "a.b", "$capture$", "$$", "$body$", "\\", "a\\b", "a b", " ", "é€🙂", "x" * 63, "X", "ID", "-- ", "/*",
    ";", "\n", "{a,b}", "NULL", '"', ",",
)  # fmt: skip


@dataclass
class Table:
    """A table of a case. `targets` are the relations to write it through."""

    relation: str
    columns: list[Column]
    key: tuple[Column, ...]
    room: Column | None
    soft_delete: Column | None
    setup: list[str]
    targets: list[str]
    deferrable: bool = False
    views: list[str] = field(default_factory=list)
    part: Column | None = None  # the column by which it is partitioned
    child: str | None = None  # an inheritance child: the keys of parent and child are different ones

    @property
    def written(self) -> list[Column]:
        return [column for column in self.columns if not column.generated]


class Tables:
    """Makes tables. `odd` is how likely a name, a type, a shape is an odd one."""

    def __init__(
        self,
        dice: random.Random,
        *,
        names: float,
        types: float,
        keys: float,
        shapes: float,
        among: str,
        shape: str,
        trees: float,
    ) -> None:
        self.dice = dice
        self.names = names
        self.types = types
        self.keys = keys
        self.shapes = shapes
        self.trees = trees
        self.among = {"sensitive": SENSITIVE, "own": OWN, "altered": ALTERED}.get(among, (*BUILT_IN, *OWN))
        self._odd_shapes = (shape,) if shape else ("partitioned", "inherited", "deferrable", "unlogged")
        self._taken: set[str] = set()

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def table(self, number: int, parent: Table | None = None) -> Table:
        self._taken = set()
        name = self._name(f"t{number}") if self.chance(self.names) else f"t{number}"
        relation = f"app.{identifier(f'{name[:50]}{number}' if name != f't{number}' else name)}"
        self._taken = set()
        key = self._key()
        room = Column(self._name("room"), TEXT, ("a", "b", "c"))
        columns = [*key, room]
        soft_delete = None
        if self.chance(0.35):
            soft_delete = Column(
                self._name("gone"), Type("timestamptz", ("2024-01-01 00:00+00",)), ("2024-01-01 00:00+00",)
            )
            columns.append(soft_delete)
        columns += [self._value_column(place) for place in range(self.dice.randint(1, 3 if self.types < 0.5 else 6))]
        table = Table(relation, columns, key, room, soft_delete, [], [relation])
        extra = self._generated(table)
        if parent and self.chance(0.7):
            extra += self._reference(table, parent)
        if self.trees and self.chance(self.trees):
            extra += self._tree(table)
        self.dice.shuffle(columns)
        self._shape(table, extra)
        return table

    def _name(self, plain: str) -> str:
        while True:
            name = self.dice.choice(ODD_NAMES) if self.chance(self.names) else plain
            if name in self._taken:
                name = f"{name[:55]}{len(self._taken)}"
            if name not in self._taken and name not in {"ctid", "xmin", "zq"}:
                self._taken.add(name)
                return name

    def _type(self) -> Type:
        if not self.chance(self.types):
            return self.dice.choice((TEXT, TEXT, INTEGER))
        type_ = self.dice.choice(self.among)
        return array_of(type_) if self.chance(0.2) else type_

    def _value_column(self, place: int) -> Column:
        type_ = self._type()
        return Column(self._name(f"v{place}"), type_, type_.values)

    def _key(self) -> tuple[Column, ...]:
        def column(place: int) -> Column:
            type_ = INTEGER
            while self.chance(self.keys):
                type_ = self.dice.choice(KEY_TYPES) if self.chance(0.7) else self._type()
                # Too large a value cannot be in an index, and not every type has an order.
                if type_.can_be_key and all(len(value) < 1500 for value in type_.values):
                    break
                type_ = INTEGER
            values = (
                list(type_.values)[:4]
                if type_ is INTEGER
                else self.dice.sample(type_.values, min(4, len(type_.values)))
            )
            return Column(self._name("id" if not place else f"id{place}"), type_, tuple(values))

        return tuple(column(place) for place in range(1 + self.chance(self.keys / 3)))

    def _generated(self, table: Table) -> list[str]:
        if not self.chance(0.2) or not table.room:
            return []
        column = Column(self._name("made"), TEXT, (), generated=True)
        table.columns.append(column)
        return [f"{column.quoted} text generated always as ({table.room.quoted} || '!') stored"]

    def _reference(self, table: Table, parent: Table) -> list[str]:
        if len(parent.key) > 1 or parent.deferrable or len(parent.targets) > 1 or "unlogged" in parent.setup[0]:
            return []
        if parent.key[0].type.sql == "own.moody":  # the operators of enumerations take no domain over these
            return []
        column = Column(self._name("ref"), parent.key[0].type, parent.key[0].values)
        table.columns.append(column)
        deletion = self.dice.choice(("cascade", "set null", "cascade", "no action"))
        update = self.dice.choice(("cascade", "set null", "cascade"))
        timing = self.dice.choice(("", "deferrable initially deferred"))
        return [
            f"{column.quoted} {column.type.sql} references {parent.relation} ({parent.key[0].quoted})"
            f" on delete {deletion} on update {update} {timing}"
        ]

    def _tree(self, table: Table) -> list[str]:
        """Rows that refer to rows of the same table, which a change of their keys changes, too."""
        if len(table.key) > 1 or table.key[0].type.sql == "own.moody":  # as in _reference()
            return []
        column = Column(self._name("up"), table.key[0].type, table.key[0].values)
        table.columns.append(column)
        deletion = self.dice.choice(("cascade", "set null", "set default"))
        update = self.dice.choice(("cascade", "cascade", "set null", "set default"))
        timing = self.dice.choice(("", "deferrable initially deferred"))
        return [
            f"{column.quoted} {column.type.sql} references {table.relation} ({table.key[0].quoted})"
            f" on delete {deletion} on update {update} {timing}"
        ]

    def _shape(self, table: Table, extra: list[str]) -> None:
        made = {
            column.name for column in table.columns if any(item.startswith(column.quoted + " ") for item in extra)
        }
        items = [f"{c.quoted} {c.type.sql}" for c in table.columns if c.name not in made] + extra
        key = ", ".join(column.quoted for column in table.key)
        shape = self.dice.choice(self._odd_shapes) if self.chance(self.shapes) else "plain"
        if shape == "inherited" and any(column.type not in (INTEGER, TEXT) for column in table.key):
            shape = "unlogged"
        if shape == "partitioned":
            self._partitions(table, items)
        elif shape == "deferrable":
            table.deferrable = True
            nulls = [f"alter column {column.quoted} set not null" for column in table.key]
            table.setup.append(
                f"create table {table.relation} ({', '.join(items)}, unique ({key}) deferrable initially deferred)"
            )
            table.setup.append(f"alter table {table.relation} {', '.join(nulls)}")
        else:
            unlogged = "unlogged " if shape == "unlogged" else ""
            unique = self.dice.choice(("primary key", "primary key", "not null unique"))
            if unique == "primary key" or len(table.key) > 1:
                items.append(f"primary key ({key})")
            else:
                items = [f"{item} {unique}" if item == f"{key} {table.key[0].type.sql}" else item for item in items]
            table.setup.append(f"create {unlogged}table {table.relation} ({', '.join(items)})")
            if shape == "inherited":
                child = f'{table.relation[:-1]}child"'
                table.setup.append(
                    f"create table {child} (extra text, primary key ({key})) inherits ({table.relation})"
                )
                table.targets.append(child)
                table.child = child
        self._view(table)

    def _partitions(self, table: Table, items: list[str]) -> None:
        """Two levels: a list of parts, and one part by hash of the key."""
        part = Column(self._name("part"), TEXT, ("p", "q", "z"))
        table.columns.append(part)
        table.part = part
        table.key = (*table.key, part) if self.chance(0.5) else (part, *table.key)
        key = ", ".join(column.quoted for column in table.key)
        prefix = table.relation[:-1]
        first = table.key[0] if table.key[0] is not part else table.key[1]
        by_hash = first.type.sql not in {"money", "bit(3)", "varbit", "tsvector", "tsquery"} and first.type in (
            INTEGER,
            TEXT,
        )
        sub = f" partition by hash ({first.quoted})" if by_hash else ""
        table.setup += [
            f"create table {table.relation} ({', '.join(items)}, {part.quoted} text, primary key ({key}))"
            f" partition by list ({part.quoted})",
            f"create table {prefix}p\" partition of {table.relation} for values in ('p')",
            f"create table {prefix}q\" partition of {table.relation} for values in ('q')",
            f'create table {prefix}z" partition of {table.relation} default{sub}',
        ]
        table.targets += [f'{prefix}p"', f'{prefix}q"', f'{prefix}z"']
        if sub:
            for n in range(2):
                table.setup.append(
                    f'create table {prefix}z{n}" partition of {prefix}z" for values with (modulus 2, remainder {n})'
                )
                table.targets.append(f'{prefix}z{n}"')

    def _view(self, table: Table) -> None:
        if self.chance(0.2):
            view = f'{table.relation[:-1]}view"'
            table.setup.append(f"create view {view} as select * from {table.relation}")
            table.targets.append(view)
            table.views.append(view)

    def watched(self, table: Table, *, lookups: float, per_row: float) -> Watched:
        published = [column for column in table.columns if self.chance(0.75)] or [table.columns[0]]
        self.dice.shuffle(published)
        by_child = table.child is not None and self.chance(0.6)
        return Watched(
            table.child if table.child and by_child else table.relation,
            self._topic(table, lookups),
            tuple(published),
            table.key,
            table.soft_delete.name if table.soft_delete and self.chance(0.8) else None,
            self.chance(per_row) or by_child,
        )

    def _topic(self, table: Table, lookups: float) -> str:
        room, other = table.room, self.dice.choice(table.columns)
        assert room is not None
        # Postgres reads `select` and the like as a column only in quotes, which `quoted` has.
        row_room = f"r.{room.quoted}" if self.chance(0.7) else room.quoted
        if self.chance(lookups):
            return self.dice.choice((
                f"(select l.name from app.lookup as l where l.id = {row_room})",
                f"array(select l.name from app.lookup as l where l.id <= {row_room} order by 1)",
            ))  # fmt: skip
        return self.dice.choice((
            "'all'", row_room, row_room, f"'room:' || {row_room}", f"array[{row_room}, 'all', {row_room}]",
            f"case when {row_room} = 'c' then null else {row_room} end", f"'back\\slash:' || {row_room}",
            f"array_remove(array[{row_room}, 'b'], 'c')",
            # A type's own text depends on the writer's settings, unless they are pinned.
            f"'v:' || left(md5(r.{other.quoted}::text), 4)" if "sly" not in other.type.sql else "'all'",
            f"(select {row_room})",
        ))  # fmt: skip


# Types whose values have another text under other settings.
SENSITIVE: Final = tuple(
    t for t in (*BUILT_IN, *OWN) if t.sql in {
        "float4", "float8", "bytea", "interval", "money", "daterange", "tsrange", "tstzrange", "tstzmultirange",
        "point", "box", "circle", "regclass", "regtype", "regprocedure", "own.nest", "own.floats", "own.many_floats",
        "own.pairs", "xml", "timestamptz", "date",
    }
)  # fmt: skip

LONG: Final = Type("text", ("a" * 1200, "a" * 1201, "b" * 900, "é" * 400))

KEY_TYPES: Final = (
    TEXT, INTEGER, LONG, *(t for t in (*BUILT_IN, *OWN) if t.sql in {
        "bytea", "numeric", "timestamptz", "uuid", "float8", "float4", "interval", "bpchar",
        "text collate own.caseless", "name collate own.caseless",
        "jsonb", "date", "tstzrange", "int4range", "inet", '"char"', "name", "money",
        "timetz", "own.exact", "own.pair", "own.sly", "own.moody", "numrange",
    }),
)  # fmt: skip


def lookup(dice: random.Random) -> list[str]:
    """A table that topic expressions read, which the capturing role may or may not read."""
    statements = [
        "create table app.lookup (id text primary key, name text)",
        "insert into app.lookup values ('a', 'room of a'), ('b', 'room of b'), ('c', 'room of b')",
    ]
    if dice.random() < 0.6:
        statements.append(
            "grant usage on schema app to rowcast_capture; grant select on app.lookup to rowcast_capture"
        )
    if dice.random() < 0.3:
        statements.append(f"alter table app.lookup {dice.choice(('enable', 'enable', 'force'))} row level security")
    return statements
