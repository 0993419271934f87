"""Capture with a safeguard removed. A property test that does not notice proves nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tests.postgres.truth.trial import Trial


@dataclass(frozen=True)
class Mutant:
    """A replacement in the text of a function of capture, and the theme whose cases notice it, from `seed` on.

    The PostgreSQL versions before `since` lack the statement that makes it noticeable.
    """

    theme: str
    function: str
    before: str
    after: str
    seed: int = 0
    since: int = 0
    also: tuple[str, str] = ("", "")  # another function, and what is removed from it


_AGAIN: Final = "starts_with(command, current_setting('rowcast.captured', true))"

MUTANTS: Final = {
    "rows are never read again": Mutant("nests", "capture_body", _AGAIN, "false"),
    "rows are read again only in triggers of triggers": Mutant(
        "calls", "capture_body", _AGAIN, f"(pg_trigger_depth() > 1 and {_AGAIN})", seed=13
    ),
    "a note that was reset is taken for none": Mutant(
        "forgets",
        "has_captured",
        "exists (select from rowcast.events",
        "false and exists (select from rowcast.events",
    ),
    "a deferrable key is taken for unique": Mutant("deferrable", "capture_body", "again := 'true'", "null", seed=7),
    "a name may be a variable of the function": Mutant(
        "names", "capture_body", "#variable_conflict use_column", "", seed=23
    ),
    "a record may be a column of that name": Mutant(
        "names", "record_of", "row_to_json(x.*)", "row_to_json(x)", seed=22
    ),
    "a key may be a column of that name": Mutant("names", "key_of", "row_to_json(x.*)", "row_to_json(x)", seed=13),
    "the function's body is quoted by a fixed tag": Mutant(
        "names", "watch", "security definer %s as %L'", "security definer %s as $capture$%s$capture$'", seed=18
    ),
    "floats are written as the writer's session does": Mutant(
        "settings", "capture_settings", "'extra_float_digits=1', ", "", seed=5
    ),
    "bytes are written as the writer's session does": Mutant(
        "settings", "capture_settings", "'bytea_output=hex', ", "", seed=16
    ),
    "intervals are written as the writer's session does": Mutant(
        "settings", "capture_settings", "'IntervalStyle=postgres',", "", seed=3
    ),
    "dates are written as the writer's session does": Mutant(
        "settings", "capture_settings", "'DateStyle=iso, ymd', ", "", seed=1
    ),
    "times are written as the writer's session does": Mutant(
        "settings", "capture_settings", "'TimeZone=UTC', ", "", seed=7
    ),
    "names are quoted as the writer's session does": Mutant(
        "settings", "capture_settings", "'quote_all_identifiers=off', ", "", seed=2
    ),
    "every type is taken for one that no setting changes": Mutant(
        "settings", "is_simple", "select bool_and(", "select true or bool_and(", seed=1
    ),
    "values are compared by their type": Mutant(
        "values", "update_body", "record_image_ne(row(o.%1$I), row(n.%1$I))", "o.%1$I is distinct from n.%1$I", seed=4
    ),
    "keys are compared by their type": Mutant(
        "keys",
        "same_key",
        """format('%%s', %1$s.%3$I) collate "C" = format('%%s', %2$s.%3$I) collate "C\"""",
        "%1$s.%3$I = %2$s.%3$I",
        seed=17,
    ),
    "a cast to text is used": Mutant("own", "published", "format('%%s', %1$s.%2$I)", "%1$s.%2$I::text"),
    "a cast to json is used": Mutant(
        "own", "published", "when (facts -> u.name ->> 'text_form')::boolean", "when false"
    ),
    "a row is taken for the one that MERGE inserted before it": Mutant(
        "shapes", "capture_body", "c.relkind = 'p'", "false", seed=282, since=15
    ),
    "a row that MERGE moves to another partition is told to nobody": Mutant(
        "moves", "capture_body", "if moved <> ''", "if false", seed=15, since=15
    ),
    "what a trigger's statement moves is taken for what its own statement moves": Mutant(
        "moves", "capture_body", "_' || pg_trigger_depth()$q$", "_'$q$", seed=36, since=15
    ),
    "a parent is watched without its children": Mutant(
        "shapes", "watch", "perform rowcast.check_inheritance(relation, per_row);", "", seed=9
    ),
    "what a table that is watched again missed is not said": Mutant(
        "gaps", "watch", "(missed or altered or ", "(altered or "
    ),
    "a column that was made anew is taken for the old one": Mutant(
        "gaps", "layout_of", "jsonb_build_array(c.attnum, ", "jsonb_build_array(0, "
    ),
    "rows that an alteration has rewritten are taken for those that were": Mutant(
        "gaps", "note_layout", "b.value -> 0 <> a.value -> 0", "false"
    ),
    "what was written to a partition while it was away is not noticed": Mutant(
        "gaps", "layout_of", "to_jsonb(concat_ws(' ', i.xmin, i.cmin))", "to_jsonb(0)"
    ),
    "a session captures rows as their columns were called before": Mutant(
        "gaps",
        "capture_body",
        "format('(select new.* where %L::regclass is not null offset 0)', relation::oid)",
        "'(select new.* offset 0)'",
        seed=22,
    ),
    "a label that got another name is taken for the old one": Mutant(
        "gaps", "layout_of", "to_jsonb(e.enumlabel)", "to_jsonb(e.oid)"
    ),
    "a composite type that was altered is taken for the old one": Mutant(
        "gaps", "layout_of", "and not a.attisdropped", "and false"
    ),
    "triggers that were off for a moment are not noticed": Mutant(
        "gaps", "reset_vanished", "t.xmin = coalesce(c.version, t.xmin)", "true", seed=22
    ),
    "rows that went with a partition are not noticed": Mutant(
        "gaps", "reset_vanished", "where not exists (", "where false and not exists (", seed=22
    ),
    "a topic is tried as the one who watches": Mutant(
        "roles",
        "type_of",
        "rowcast.has_capture_role()",
        "false",
        seed=10,
        also=("make_snapshot", "execute format('select from rowcast.%I(%L, 0)', watched.snapshot_name, '');"),
    ),
}


@asynccontextmanager
async def mutated(trial: Trial, mutant: Mutant) -> AsyncIterator[None]:
    originals = []
    function, text = mutant.also
    for name, before, after in ((mutant.function, mutant.before, mutant.after), (function, text, "")):
        if name:
            original = await trial.admin.fetchval("select pg_get_functiondef($1::regproc)", f"rowcast.{name}")
            assert before in original, f"{name} does not contain {before!r}"
            await trial.admin.execute(original.replace(before, after))
            originals.append(original)
    try:
        yield
    finally:
        for original in originals:
            await trial.admin.execute(original)
