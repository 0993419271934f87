"""Random statements that write to tables, and random triggers and functions that write when others do."""

import random
from collections.abc import Callable, Sequence
from typing import Final

from tests.postgres.truth.case import Column, Transaction, Watched
from tests.postgres.truth.tables import Table
from tests.postgres.truth.values import INTEGER, TEXT, identifier, quote

LOOK: Final = "select rowcast.reset_vanished(); select rowcast.reset_altered()"
DEFERRED: Final = ("deferrable initially deferred", "deferrable", "")
ISOLATION: Final = ("read committed", "read committed", "read committed", "repeatable read", "serializable")


class Writes:
    """Makes statements that write to tables. `calls` is how likely an expression is a function that writes.

    With `shifts` all keys of a table may move at once. `moves` is how likely a row is sent to another partition,
    `forgets` how likely a trigger resets the settings of the session.
    """

    def __init__(
        self,
        dice: random.Random,
        tables: Sequence[Table],
        *,
        calls: float,
        plain: bool = False,
        shifts: bool = False,
        moves: float = 0.0,
        forgets: float = 0.0,
    ) -> None:
        self.dice = dice
        self.tables = tables
        self.calls = calls
        self.plain = plain
        self.shifts = shifts
        self.moves = moves
        self.forgets = forgets
        self._ruled: set[str] = set()  # Postgres refuses upserts, MERGE and writes in WITH there
        self.returning = True

    def chance(self, probability: float) -> bool:
        return self.dice.random() < probability

    def transaction(self) -> Transaction:
        statements = [self.statement() for _ in range(self.dice.choice((1, 1, 2, 3, 5)))]
        if len(statements) > 2 and self.chance(0.2):
            place = self.dice.randrange(len(statements) - 1)
            statements[place:place] = ["savepoint half"]
            statements.insert(self.dice.randrange(place + 1, len(statements) + 1), "rollback to savepoint half")
        if swaps := [table for table in self.tables if table.deferrable and table.key[0].type is INTEGER]:
            statements += self.swap(self.dice.choice(swaps)) if self.chance(0.5) else []
        if self.chance(0.1):
            statements.insert(self.dice.randrange(len(statements) + 1), "set constraints all immediate")
        return Transaction(tuple(statements), self.dice.choice(ISOLATION), commits=self.chance(0.9))

    def gap(self, watched: Sequence[Watched]) -> Transaction:
        """Rows change without a trigger. At the end the table is watched again, or a look finds it."""
        one = self.dice.choice(watched)
        table = next(t for t in self.tables if one.relation in {t.relation, t.child})
        writes = [self.statement_for_code(table) for _ in range(2)]
        parts = [f'{table.relation[:-1]}{part}"' for part in "pq"]
        ways = ["unwatch", "disable", "drop", "column", "alter", "alter", "alter", "alter"]
        if parts[0] in table.targets:
            ways = ["unwatch", "disable", "part", "detach", "part", "detach", "alter", "alter"]
        operation = self.dice.choice(("insert", "update", "delete"))
        part = self.dice.choice(parts)
        match self.dice.choice(ways):
            case "unwatch":
                statements = [f"select rowcast.unwatch({quote(one.relation)})", *writes, one.call]
            case "disable":
                enable = "always" if one.per_row else ""
                statements = [
                    f"alter table {one.relation} disable trigger rowcast_{operation}",
                    *writes,
                    one.call
                    if self.chance(0.5)
                    else f"alter table {one.relation} enable {enable} trigger rowcast_{operation}; {LOOK}",
                ]
            case "drop":
                statements = [f"drop trigger rowcast_{operation} on {one.relation}", *writes, one.call]
            case "column":
                column = self.dice.choice([c for c in table.written if c not in table.key and c is not table.room])
                statements = [
                    f"alter table {table.relation} drop column {column.quoted}",
                    f"alter table {table.relation} add column {column.quoted} {column.type.sql}",
                    one.call,
                ]
            case "alter":
                statements = self.alteration(table, one)
            case "part":
                statements = [f"drop table {part}", *writes, LOOK]
            case _:
                statements = [
                    f"alter table {table.relation} detach partition {part}",
                    f"delete from {part}" if self.chance(0.5) else self.update(table, part),
                    f"alter table {table.relation} attach partition {part} for values in ('{part[-2]}')",
                    LOOK,
                ]
        return Transaction(("; ".join(statements),))  # all or nothing

    def alteration(self, table: Table, watched: Watched) -> list[str]:
        """A statement after which rows read otherwise, and one that notices it."""
        look = self.dice.choice((LOOK, LOOK, watched.call))
        columns = [c for c in table.columns if c not in table.key]
        texts = [c.quoted for c in columns if c.type is TEXT and not c.generated and c is not table.part]
        integers = [c.quoted for c in columns if c.type is INTEGER]
        types = " ".join(column.type.sql for column in watched.published)
        kinds = ["swap", "using", *(["label"] if "app." in types else [])]
        kind = self.dice.choice([*kinds, *(["attribute", "attribute"] if "app.pair" in types else [])])
        if kind == "label":
            # Postgres keeps plans that name the label by its old name.
            rename = f"alter type app.mood rename value '{self.dice.choice(('sad', 'ok'))}' to 'bad'"
            return [f"{rename}; discard plans", look]
        if kind == "attribute":
            does = self.dice.choice(("add attribute z integer", "drop attribute y", "drop attribute k"))
            return [f"alter type app.pair {does}", look]
        alike = [one for one in (texts, integers) if len(one) > 1]
        if kind == "swap" and alike:
            one, other = self.dice.sample(self.dice.choice(alike), 2)
            rename = f"alter table {table.relation} rename column"
            readable = {one, other} <= {column.quoted for column in watched.published}  # by the capture
            return [
                f"{rename} {one} to zq; {rename} {other} to {one}; {rename} zq to {other}",
                look if readable else watched.call,
            ]
        if integers and self.chance(0.5):
            column = self.dice.choice(integers)
            return [f"alter table {table.relation} alter column {column} type integer using {column} + 1", look]
        column = self.dice.choice(texts)
        return [f"alter table {table.relation} alter column {column} type text using {column} || 'a'", look]

    def first_rows(self) -> Transaction:
        """A row for each of the few values of the keys."""
        statements = []
        for table in self.tables:
            columns = self._columns(table)
            rows = {}
            for place in range(4):
                values = [
                    c.type.literal(c.values[place % len(c.values)] if c in table.key else self._pick(c, table))
                    for c in columns
                ]
                rows[tuple(v for v, c in zip(values, columns, strict=True) if c in table.key)] = (
                    f"({', '.join(values)})"
                )
            upserts = not table.deferrable and table.relation not in self._ruled
            statements.append(
                f"insert into {table.relation} ({', '.join(c.quoted for c in columns)})"
                f" values {', '.join(rows.values())}" + (" on conflict do nothing" if upserts else "")
            )
        return Transaction(tuple(statements))

    def swap(self, table: Table) -> list[str]:
        """Two rows exchange their keys in two statements; between these they have the same one."""
        key = table.key[0].quoted
        one, other = self.dice.sample("1234", 2)
        update = f"update {table.relation} set {key} ="
        older = f"(select min(ctid) from {table.relation} where {key} = {other})"
        return [f"{update} {other} where {key} = {one}", f"{update} {one} where {key} = {other} and ctid = {older}"]

    def statement(self, table: Table | None = None) -> str:
        table = table or self.dice.choice(self.tables)
        ways: list[tuple[Callable[[Table, str], str], int]] = [
            (self.insert, 6), (self.update, 8), (self.delete, 3), (self.merge, 8 if self.moves else 2),
            (self.with_writes, 2), (self.copy, 1), (self.pair, 1), (self.block, 1),
            (self.truncate, 0 if self.plain else 1), (self.cursor, 1),
        ]  # fmt: skip
        [way] = self.dice.choices([way for way, _ in ways], [weight for _, weight in ways])
        return way(table, self.dice.choice(table.targets))

    def insert(self, table: Table, target: str) -> str:
        columns = self._columns(table)
        rows, keys = [], set()
        for _ in range(self.dice.choice((1, 1, 2, 4))):
            values = [self._value(table, column, target) for column in columns]
            key = tuple(value for value, column in zip(values, columns, strict=True) if column in table.key)
            if key not in keys:
                keys.add(key)
                rows.append(f"({', '.join(values)})")
        return (
            f"insert into {target} as w ({', '.join(c.quoted for c in columns)}) values {', '.join(rows)}"
            f"{self._conflict(table, target)}{self._returning(table)}"
        )

    def _conflict(self, table: Table, target: str) -> str:
        if table.deferrable or target in table.views or table.relation in self._ruled or self.chance(0.3):
            return ""
        others = [column for column in table.written if column not in table.key]
        if self.chance(0.4) or not others:
            return " on conflict do nothing"
        key = ", ".join(column.quoted for column in table.key)
        column = self.dice.choice(others)
        value = f"excluded.{column.quoted}" if self.chance(0.5) else self._value(table, column, target)
        where = "" if self.chance(0.8) else f" where w.{self.dice.choice(others).quoted} is not null"
        return f" on conflict ({key}) do update set {column.quoted} = {value}{where}"

    def update(self, table: Table, target: str) -> str:
        first = table.key[0]
        if self.shifts and first.type is INTEGER and not table.child and self.chance(0.3):
            step = self.dice.choice(("+ 10", "- 10", "+ 1", "* 7"))
            return f"update {target} set {first.quoted} = {first.quoted} {step}{self._where(table, target)}"
        if table.deferrable and first.type is INTEGER and self.chance(0.5):
            swapped = self.dice.choice((f"5 - {first.quoted}", "1", "2", "3"))
            return f"update {target} set {first.quoted} = {swapped}{self._where(table, target)}"
        if table.part and self.moves and self.chance(self.moves / 2):
            move = self._value(table, table.part, target)
            which = self._where(table, target)
            return f"update {target} set {table.part.quoted} = {move}{which}{self._returning(table)}"
        keyless = table.child or self.chance(0.75)
        candidates = [c for c in table.written if c not in table.key] if keyless else table.written
        columns = self.dice.sample(
            candidates or table.written, min(len(candidates or table.written), self.dice.choice((1, 1, 2)))
        )
        sets = []
        for column in columns:
            value = self._value(table, column, target)
            if column.type is TEXT and self.chance(0.3):
                value = f"left({column.quoted}, 20) || '+'"
            sets.append(f"{column.quoted} = {value}")
        return f"update {target} set {', '.join(sets)}{self._where(table, target)}{self._returning(table)}"

    def delete(self, table: Table, target: str) -> str:
        return f"delete from {target}{self._where(table, target)}{self._returning(table)}"

    def merge(self, table: Table, target: str) -> str:
        if target in table.views or table.relation in self._ruled:
            return self.update(table, target)
        columns = self._columns(table)
        names = ", ".join(column.quoted for column in columns)
        source = ", ".join(
            f"({', '.join(self._value(table, c, target) for c in columns)})" for _ in range(self.dice.randint(1, 2))
        )
        key = " and ".join(f"w.{column.quoted} = s.{column.quoted}" for column in table.key)
        [column] = self.dice.sample([c for c in columns if c not in table.key] or list(columns), 1)
        matched = self.dice.choice((f"update set {column.quoted} = s.{column.quoted}", "delete", "do nothing"))
        condition = "" if self.chance(0.5) else f" and s.{column.quoted} is not null"
        if table.part and self.moves and self.chance(self.moves):
            return self._merge_with_moves(
                table, target, f"merge into {target} as w using (values {source}) as s ({names})"
            )
        return (
            f"merge into {target} as w using (values {source}) as s ({names}) on {key}"
            f" when matched{condition} then {matched}"
            f" when not matched then insert ({names}) values ({', '.join(f's.{c.quoted}' for c in columns)})"
        )

    def _merge_with_moves(self, table: Table, target: str, head: str) -> str:
        """A MERGE whose actions are any, for the rows of each part of the key or for the very rows of `s`."""
        assert table.part
        first = table.key[0] if table.key[0] is not table.part else table.key[1]
        on = self.dice.choice(((first,), table.key))
        actions = [f"update set {table.part.quoted} = {self._value(table, table.part, target)}"]
        if self.chance(0.4):
            actions.append(
                self.dice.choice((f"update set {first.quoted} = {self._value(table, first, target)}", "delete"))
            )
        self.dice.shuffle(actions)
        condition = f"w.{table.part.quoted} = {table.part.type.literal(self._pick(table.part, table, target))}"
        clauses = [f"when matched and {condition} then {action}" for action in actions[:-1]]
        clauses.append(f"when matched then {actions[-1]}")
        if self.chance(0.5):
            names = ", ".join(column.quoted for column in table.key)
            values = ", ".join(f"s.{column.quoted}" for column in table.key)
            clauses.append(f"when not matched then insert ({names}) values ({values})")
        keys = " and ".join(f"w.{column.quoted} = s.{column.quoted}" for column in on)
        return " ".join((head, "on", keys, *clauses))

    def with_writes(self, table: Table, target: str) -> str:
        if table.relation in self._ruled:
            return self.update(table, target)
        other = self.dice.choice(self.tables)
        first = self.dice.choice((self.delete, self.update, self.insert))(table, target).partition(" returning ")[0]
        second = self.dice.choice((self.update, self.delete, self.insert))(other, self.dice.choice(other.targets))
        return f"with first as ({first} returning 1) {second}"

    def copy(self, table: Table, target: str) -> str:
        """COPY reads lines that follow the statement: see `Trial`."""
        if target in table.views:
            return self.insert(table, target)
        columns = self._columns(table)
        keep = [c for c in columns if c.type.input_type is None]

        def text(column: Column) -> str:
            value = self._pick(column, table, target)
            if value is None:
                return "\\N"
            for raw, escaped in (("\\", "\\\\"), ("\n", "\\n"), ("\t", "\\t"), ("\r", "\\r")):
                value = value.replace(raw, escaped)
            return value

        line = "\t".join(text(column) for column in keep)
        return f"copy {target} ({', '.join(c.quoted for c in keep)}) from stdin\n{line}"

    def block(self, table: Table, target: str) -> str:
        body = "; ".join(self.statement_for_code(table) for _ in range(2))
        return f"do $q$ begin {body}; exception when others then null; end $q$"

    def pair(self, table: Table, target: str) -> str:
        """Two statements that the client sends at once."""
        return f"{self.update(table, target)}; {self.update(table, target)}"

    def cursor(self, table: Table, target: str) -> str:
        update = self.update(table, target).partition(" where ")[0].partition(" returning ")[0]
        return (
            f"do $q$ declare spot cursor for select * from {target} for update; begin for found_row in spot loop"
            f" {update} where current of spot; end loop; end $q$"
        )

    def truncate(self, table: Table, target: str) -> str:
        if target in table.views or self.chance(0.6):
            return self.delete(table, target)
        return f"truncate {target} cascade"

    def statement_for_code(self, table: Table | None = None) -> str:
        """A statement that plpgsql can run as it is: it returns no rows."""
        table = table or self.dice.choice(self.tables)
        calls, self.calls, self.returning = self.calls, 0, False
        way = self.dice.choice((self.insert, self.update, self.update, self.delete, self.with_writes))
        statement = way(table, self.dice.choice(table.targets))
        self.calls, self.returning = calls, True
        return statement

    def _columns(self, table: Table) -> list[Column]:
        needed = {*table.key, *([table.room] if table.room else [])}
        return [c for c in table.written if c in needed or self.chance(0.7)]

    def _pick(self, column: Column, table: Table, target: str = "") -> str | None:
        key_of_child = target == table.child and column in table.key
        rare = 0.7 if table.soft_delete is column else 0.12
        if column not in table.key and self.chance(rare):
            return None
        value = self.dice.choice(column.values)
        # Nothing keeps a child's key from being the parent's too.
        return ("7" if column.type is INTEGER else "child ") + value.lstrip("-") if key_of_child else value

    def _value(self, table: Table, column: Column, target: str) -> str:
        literal = column.type.literal(self._pick(column, table, target))
        if column.type is TEXT and self.chance(self.calls):
            return f"app.write{self.dice.randint(0, 1)}({literal})"
        return literal

    def _where(self, table: Table, target: str) -> str:
        if self.chance(0.2):
            return ""
        if table.room and self.chance(0.3):
            return f" where {table.room.quoted} = '{self.dice.choice('abc')}'"
        column = self.dice.choice(table.key)
        values = {column.type.literal(self._pick(column, table, target)) for _ in range(self.dice.randint(1, 2))}
        called = " and app.write0('x') = 'x'" if self.chance(self.calls / 2) else ""
        return f" where {column.quoted} in ({', '.join(sorted(values))}){called}"

    def _returning(self, table: Table) -> str:
        if not self.returning:
            return ""
        if self.chance(self.calls / 2):
            return " returning app.write1('x')"
        return "" if self.chance(0.9) else f" returning {table.key[0].quoted}"

    def functions(self) -> list[str]:
        """`app.write0` and `app.write1` return their argument; before that, they write."""
        return [
            f"create function app.write{number}(given text) returns text language plpgsql volatile as $f$\nbegin\n"
            f"    if pg_trigger_depth() < 3 and app.may_write() then\n        {self.statement_for_code()};\n"
            "    end if;\n    return given;\nend $f$"
            for number in range(2)
        ]

    def rule(self, number: int) -> str:
        """A rule that writes besides, or instead of, what a statement says."""
        table = self.dice.choice(self.tables)
        event = self.dice.choice(("insert", "update", "delete"))
        row = "old" if event == "delete" else "new"
        condition = self.dice.choice(("", f" where {row}.{table.room.quoted} = 'a'" if table.room else ""))
        does = self.dice.choice(("also", "also", "instead"))
        other = self.dice.choice(self.tables)
        which = " and ".join(f"w.{c.quoted} = {row}.{c.quoted}" for c in table.key)
        columns = [c for c in table.written if c not in table.key] or table.written
        column = self.dice.choice(columns)
        same = f"update {table.relation} as w set {column.quoted} = {self._value(table, column, '')} where {which}"
        action = same if event != "update" and self.chance(0.5) else self.statement_for_code(other)
        self._ruled.add(table.relation)
        return f"create rule r{number} as on {event} to {table.relation}{condition} do {does} {action}"

    def trigger(self, number: int) -> str:
        """A trigger of any kind whose function writes, changes the row, or cancels the write."""
        table = self.dice.choice(self.tables)
        name = identifier(
            self.dice.choice(("a", "z", "rowcast_a", "rowcast_z", "Z", "rowcast_insert0")) + str(number)
        )
        row = self.chance(0.7)
        timing = self.dice.choice(("before", "after", "after", "constraint" if row else "after"))
        operations = ["insert", "update", "delete"]
        self.dice.shuffle(operations)
        events = " or ".join(operations[: self.dice.randint(1, 3)])
        target = self.dice.choice([t for t in table.targets if t not in table.views])
        if table.views and self.chance(0.6):
            timing, target, row = "instead of", table.views[0], True
        body = self._trigger_body(table, row=row, timing=timing)
        function = f"app.trigger{number}()"
        made = f"create function {function} returns trigger language plpgsql as $f$\nbegin\n{body}\nend $f$"
        kind, level = f"trigger {name} {timing}", "row" if row else "statement"
        if timing == "constraint":
            kind, target = f"constraint trigger {name} after", f"{target} {self.dice.choice(DEFERRED)}"
        return f"{made};\ncreate {kind} {events} on {target} for each {level} execute function {function}"

    def _trigger_body(self, table: Table, *, row: bool, timing: str) -> str:
        lines = []
        action = self._action(table, row=row)
        if self.chance(0.4):
            action = f"begin {action}; exception when others then null; end"
        if timing == "instead of" or self.chance(0.85):
            lines.append(
                f"    if pg_trigger_depth() < {self.dice.randint(2, 4)} and app.may_write() then {action}; end if;"
            )
        if self.forgets and self.chance(self.forgets):
            # Without its count, writes would lead to each other forever.
            count = "current_setting('app.writes', true)"
            lines.append(f"    execute format('reset all; set local app.writes = %L', {count});")
        if not row:
            lines.append("    return null;")
        elif timing in {"before", "instead of"}:
            columns = [c for c in table.written if c not in table.key and c.type is TEXT]
            if columns and self.chance(0.5):
                column = self.dice.choice(columns)
                value = quote(self.dice.choice(column.values))
                lines.append(f"    if tg_op <> 'DELETE' then new.{column.quoted} := {value}; end if;")
            if self.chance(0.15):
                lines.append("    return null;")
            lines.append("    if tg_op = 'DELETE' then return old; end if;\n    return new;")
        else:
            lines.append("    return null;")
        return "\n".join(lines)

    def _action(self, table: Table, *, row: bool) -> str:
        other = table if self.chance(0.6) else self.dice.choice(self.tables)
        if row and other is table and self.chance(0.6):
            # Writes to the very row that fired the trigger, as moderation does.
            which = " and ".join(f"w.{c.quoted} = coalesce(new.{c.quoted}, old.{c.quoted})" for c in table.key)
            columns = [c for c in table.written if c not in table.key] or table.written
            column = self.dice.choice(columns)
            change = (
                f"update {table.relation} as w set {column.quoted} = {self._value(table, column, '')} where {which}"
            )
            return self.dice.choice((change, change, f"delete from {table.relation} as w where {which}"))
        return self.statement_for_code(other)


TEXT_SETTINGS: Final = (
    *(f"set extra_float_digits = {digits}" for digits in (-15, -3, 0)), "set bytea_output = 'escape'",
    "set intervalstyle = 'iso_8601'", "set intervalstyle = 'postgres_verbose'", "set intervalstyle = 'sql_standard'",
    "set datestyle = 'SQL, DMY'", "set datestyle = 'German'", "set datestyle = 'Postgres, MDY'",
    "set timezone = 'Asia/Kolkata'", "set timezone = 'America/St_Johns'", "set quote_all_identifiers = on",
    "set standard_conforming_strings = off", "set transform_null_equals = on", "set lc_monetary = 'C.UTF-8'",
)  # fmt: skip
"""Settings of a writer that change the text of values, or what an expression means."""

OTHER_SETTINGS: Final = (
    "set extra_float_digits = 3", "set xmlbinary = 'hex'", "set xmloption = 'document'", "set lc_numeric = 'C.UTF-8'",
    "set lc_time = 'C.UTF-8'", "set array_nulls = off", "set row_security = off", "set client_min_messages = 'error'",
    "set search_path = public, pg_catalog, app", "set search_path = ''", "set search_path = app, public",
    "set plan_cache_mode = 'force_generic_plan'", "set enable_hashjoin = off; set enable_mergejoin = off",
    "set enable_nestloop = off", "set join_collapse_limit = 1; set from_collapse_limit = 1", "set work_mem = '64kB'",
    "set plpgsql.extra_errors = 'all'", "set escape_string_warning = off", "set rowcast.actor = 'ada'",
    "create temp table new_rows (id integer); create temp table events (id integer)", "set enable_seqscan = off",
    "set backslash_quote = off", "set default_text_search_config = 'english'", "set statement_timeout = '60s'",
)  # fmt: skip


MAY_WRITE: Final = """
create function app.may_write() returns boolean language plpgsql as $f$
declare
    writes constant integer := coalesce(nullif(current_setting('app.writes', true), ''), '0');
begin
    perform set_config('app.writes', (writes + 1)::text, true);
    return writes < 12;
end $f$
"""
"""Ends the writes that lead to each other: deferred triggers have no depth."""

SHADOWS: Final = """
create function public.row_to_json(record) returns json language plpgsql as
    $f$ begin return '{"shadow": true}'; end $f$;
create function public.row_to_json(anyelement) returns json language sql as $f$ select '{"shadow": true}'::json $f$;
create function public.array_remove(text[], text) returns text[] language sql as $f$ select '{shadow}'::text[] $f$;
create function public.array_remove(name[], name) returns name[] language sql as $f$ select '{shadow}'::name[] $f$;
create function public.unnest(text[]) returns setof text language sql as $f$ select 'shadow' $f$;
create function public.format(text, text) returns text language sql as $f$ select 'shadow' $f$;
create function public.current_setting(text, boolean) returns text language sql as $f$ select 'shadow' $f$;
create function public.left(text, integer) returns text language sql as $f$ select 'shadow' $f$;
create function public.differ(text, text) returns boolean language sql immutable as $f$ select true $f$;
create operator public.<> (leftarg = text, rightarg = text, function = public.differ);
create function public.glue(text, text) returns text language sql immutable as $f$ select 'shadow' $f$;
create operator public.|| (leftarg = text, rightarg = text, function = public.glue);
create domain public.json as text;
create domain public.kind as text;
grant all on schema public to public
"""
