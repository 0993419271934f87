"""Types of columns, with values that are easy to get wrong: equal by type but not in text, special, large, odd."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final


def quote(text: str) -> str:
    """A literal that means the same whatever `standard_conforming_strings` says."""
    doubled = text.replace("'", "''")
    return "E'" + doubled.replace("\\", "\\\\") + "'" if "\\" in text else f"'{doubled}'"


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


@dataclass(frozen=True)
class Type:
    """A type of a column.

    `as_text`: its values are published through their output function, as one JSON string. `as_texts`: they are arrays
    whose elements are published so.
    """

    sql: str
    values: tuple[str, ...]
    as_text: bool = False
    can_be_key: bool = True
    input_type: str | None = None
    as_texts: bool = False

    def literal(self, value: str | None) -> str:
        return "null" if value is None else f"{quote(value)}::{self.input_type or self.sql}"


def array_of(element: Type) -> Type:
    def item(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'

    first, second = element.values[0], element.values[-1]
    delimiter = ";" if element.sql == "box" else ","
    values = (
        "{}",
        "{" + item(first) + "}",
        "{" + delimiter.join((item(first), item(second), item(element.values[1]))) + "}",
        "{{" + item(second) + "},{" + item(first) + "}}",
        "{NULL" + delimiter + item(second) + "}",
    )
    sql, collated, collation = element.sql.partition(" collate ")
    as_texts = sql.startswith(("own.", "app."))
    return Type(f"{sql}[]{collated}{collation}", values, False, element.can_be_key, f"{sql}[]", as_texts)


INTEGER: Final = Type("integer", ("1", "2", "3", "4", "5", "-2147483648"))
TEXT: Final = Type(
    "text", ("a", "b", "A", "", " a", "é", "€🙂", "back\\slash", "quo\"te's", "\t\n\x01", "null", "a\u200b")
)

_FLOATS: Final = (
    "0.1",
    "-0",
    "0",
    "NaN",
    "Infinity",
    "-Infinity",
    "1e-30",
    "0.30000001",
    "0.1000000149011612",
    "123456789",
)
_NO_ORDER: Final = {
    "json", "xml", "jsonpath", "point", "polygon", "box", "circle", "path", "line", "lseg", "xid", "cid", "aclitem",
    "pg_snapshot", "txid_snapshot", "refcursor",
}  # fmt: skip

_BUILT_IN: Final[dict[str, Iterable[str]]] = {
    "bool": ("true", "false"),
    "int2": ("1", "-32768"),
    "int4": ("1", "2", "2147483647"),
    "int8": ("1", "9007199254740993", "-9223372036854775808"),
    "numeric": ("1", "1.0", "1.00", "NaN", "Infinity", "-Infinity", "1e-9", "9" * 5000, "0." + "0" * 400 + "1"),
    "float4": _FLOATS,
    "float8": (*_FLOATS, "1.7976931348623157e308", "5e-324", "0.30000000000000004"),
    "money": ("1", "-1234.5", "92233720368547758.07"),
    '"char"': ("a", "b", "\\377", ""),
    "name": ("a", "b", "x" * 63),
    "text": TEXT.values,
    "varchar": ("a", "a ", "b"),
    "bpchar": ("a", "a  ", "b"),
    "character(5)": ("a", "ab", "ab   "),
    "bytea": ("\\x", "\\x00ff", "\\x5c5c", "\\x61"),
    "date": ("2024-02-29", "infinity", "-infinity", "0044-03-15 BC", "12000-01-01"),
    "time": ("24:00:00", "12:34:56.789", "00:00"),
    "timetz": ("12:00:00+00", "13:00:00+01", "12:00:00-15:59", "24:00:00+00"),
    "timestamp": ("2024-02-29 12:00", "infinity", "-infinity", "4713-01-01 00:00 BC", "12000-01-01 00:00:00.000001"),
    "timestamptz": ("2024-03-31 01:30+00", "infinity", "-infinity", "0044-03-15 12:00+00 BC", "12000-06-01 00:00Z"),
    "interval": ("1 day", "24:00:00", "1 mon", "30 days", "-1 year +2 days -03:04:05.6", "P1Y2M3DT4H"),
    "uuid": ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000000"),
    "json": ('{"a": 1}', '{"a":1}', '{"a": 1, "a": 2}', "null", '"\\u00e9"', "[1.0, 1.00]"),
    "jsonb": ('{"a": 1}', '{"a": 1.0}', "null", '"x"', "[]", "1.00"),
    "jsonpath": ("$.a", "$.b", 'strict $."x y"[*] ? (@ > 1)'),
    "xml": ("<a/>", "<a></a>", '<a b="c">d&amp;e</a>'),
    "point": ("(1,2)", "(0.1,0.2)", "(1,2.0000001)", "(NaN,Infinity)"),
    "line": ("{1,2,3}", "{2,4,6}", "{1,-1,0}"),
    "lseg": ("[(0,0),(1,1)]", "[(0,0),(-1,-1)]", "[(1,1),(0,0)]"),
    "box": ("(1,1),(0,0)", "(2,2),(1,1)", "(3,1.5),(1,1)"),
    "path": ("((0,0),(1,1))", "((0,0),(2,2))", "[(0,0),(1,1)]"),
    "polygon": ("((0,0),(1,1),(1,0))", "((0,0),(2,2),(2,0))", "((1,1),(0,0),(1,0))"),
    "circle": ("<(0,0),1>", "<(5,5),1>", "<(0,0),0.1>"),
    "inet": ("1.2.3.4", "1.2.3.0/24", "::1", "1.2.3.4/24"),
    "cidr": ("1.2.3.0/24", "::/0"),
    "macaddr": ("08:00:2b:01:02:03", "08:00:2b:01:02:04"),
    "macaddr8": ("08:00:2b:01:02:03:04:05", "08:00:2b:01:02:03:04:06"),
    "bit(3)": ("101", "000"),
    "varbit": ("", "1", "01"),
    "tsvector": ("'a':1 'b':2", "a b", "a b c"),
    "tsquery": ("'a' & 'b'", "!a", "a <-> b"),
    "oid": ("1", "4294967295"),
    "oidvector": ("1 2", "3"),
    "int2vector": ("1 2", "3"),
    "tid": ("(0,1)", "(1,2)"),
    "xid": ("1", "2"),
    "xid8": ("1", "18446744073709551615"),
    "cid": ("1", "2"),
    "pg_lsn": ("0/0", "16/B374D848"),
    "pg_snapshot": ("1:1:", "10:20:10,14,15"),
    "txid_snapshot": ("1:1:", "10:20:10,14,15"),
    "regclass": ("pg_catalog.pg_class", "own.leaked", "1"),
    "regtype": ("int4", "own.mood", "public.text"),
    "regproc": ("pg_catalog.pg_sleep", "1"),
    "regprocedure": ("pg_catalog.pg_sleep(double precision)", "own.sly_as_json(own.sly)"),
    "regoper": ("1", "2"),
    "regoperator": ("=(integer,integer)", "=(text,text)"),
    "regrole": ("rowcast_capture", "pg_monitor"),
    "regnamespace": ("app", "pg_catalog"),
    "regconfig": ("simple", "english"),
    "regdictionary": ("simple", "english_stem"),
    "regcollation": ('"C"', '"POSIX"'),
    "aclitem": ("rowcast_capture=r/rowcast_capture", "=r/rowcast_capture"),
    "refcursor": ("a", "b"),
    "int4range": ("[1,5)", "empty", "(,)"),
    "int8range": ("[1,5]", "empty"),
    "numrange": ("[1,5)", "[1.0,5.00)", "empty"),
    "tsrange": ("[2024-01-02 03:04,2024-05-06)", "(,infinity]"),
    "tstzrange": ("[2024-01-02 03:04+00,2024-05-06 00:00+00)", "empty"),
    "daterange": ("[2024-01-02,2024-05-06)", "(,)"),
    "int4multirange": ("{[1,5),[7,9)}", "{}"),
    "int8multirange": ("{[1,5)}", "{}"),
    "nummultirange": ("{[1,5)}", "{[1.0,5)}"),
    "tsmultirange": ("{[2024-01-02,2024-05-06)}", "{}"),
    "tstzmultirange": ("{[2024-01-02 00:00+00,2024-05-06 00:00+00)}", "{}"),
    "datemultirange": ("{[2024-01-02,2024-05-06)}", "{}"),
}  # fmt: skip

BUILT_IN: Final = tuple(
    Type(sql, tuple(values), can_be_key=sql not in _NO_ORDER) for sql, values in _BUILT_IN.items()
)
ALTERED_TYPES: Final = """
create type app.mood as enum ('sad', 'ok', 'fine', 'glad');
create type app.pair as (x integer, k text, y integer);
create domain app.moods as app.mood[];
create type app.span as range (subtype = app.mood)
"""
"""Types that a case may alter."""

ALTERED: Final = (
    Type("app.mood", ("sad", "ok", "fine")),
    Type("app.moods", ("{sad,ok}", "{}"), as_texts=True),
    Type("app.span", ("[sad,ok]", "empty"), as_text=True),
    Type("app.pair", ("(1,a,2)", "(,,)"), as_text=True),
)

WITHOUT_INPUT: Final = frozenset({
    "gtsvector", "pg_node_tree", "pg_ndistinct", "pg_dependencies", "pg_mcv_list", "pg_brin_bloom_summary",
    "pg_brin_minmax_multi_summary",
})  # fmt: skip
"""Built-in types that can be the type of a column, but have no values that can be written."""

OWN_TYPES: Final = """
create schema own;
grant usage on schema own to public;
create table own.leaked (by_user name);
grant insert on own.leaked to public;
create type own.mood as enum ('sad', 'ok', 'two words', 'quo"te');
create type own.sly as enum ('honest', 'sly');
create function own.sly_as_json(own.sly) returns json language plpgsql as
    $f$ begin insert into own.leaked values (current_user); return '"leaked"'; end $f$;
create function own.sly_as_text(own.sly) returns text language plpgsql as
    $f$ begin insert into own.leaked values (current_user); return 'leaked'; end $f$;
create cast (own.sly as json) with function own.sly_as_json(own.sly);
create cast (own.sly as text) with function own.sly_as_text(own.sly);
create type own.pair as (x integer, k text);
create type own.nest as (p own.pair, r bytea, d date, f float8);
create type own.sly_pair as (x integer, k text);
create function own.pair_as_json(own.sly_pair) returns json language plpgsql as
    $f$ begin insert into own.leaked values (current_user); return '"leaked"'; end $f$;
create function own.pair_as_text(own.sly_pair) returns text language plpgsql as
    $f$ begin insert into own.leaked values (current_user); return 'leaked'; end $f$;
create cast (own.sly_pair as json) with function own.pair_as_json(own.sly_pair);
create cast (own.sly_pair as text) with function own.pair_as_text(own.sly_pair) as implicit;
create domain own.short as text check (length(value) < 100);
create domain own.shorter as own.short;
create domain own.few as integer[];
create domain own.exact as numeric;
create domain own.paired as own.pair;
create domain own.moody as own.mood;
create domain own.slyly as own.sly;
create type own.floats as range (subtype = float8, multirange_type_name = own.many_floats);
create type own.pairs as range (subtype = own.pair);
create type own.base;
create function own.base_in(cstring) returns own.base language internal immutable strict as 'int4in';
create function own.base_out(own.base) returns cstring language internal immutable strict as 'int4out';
create type own.base (input = own.base_in, output = own.base_out, like = integer, category = 'N');
do $$ begin
    create collation own.caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
exception when feature_not_supported or invalid_parameter_value or undefined_object then
    create collation own.caseless from "C";  -- this Postgres is built without ICU
end $$;
"""

OWN: Final = (
    Type("own.mood", ("sad", "ok", "two words", 'quo"te')),
    Type("own.sly", ("honest", "sly"), as_text=True),
    Type("own.pair", ("(1,a)", "(1,A)", "(,)", '(2,"x y")'), as_text=True),
    Type(
        "own.nest",
        ('("(1,a)","\\\\x00ff",2024-02-29,0.1)', '(,"\\\\x61",,0.30000001)'),
        as_text=True,
        can_be_key=False,
    ),
    Type("own.sly_pair", ("(1,a)", "(,)"), as_text=True),
    Type("own.short", ("a", "b", "A")),
    Type("own.shorter", ("a", "b")),
    Type("own.few", ("{1,2}", "{}")),
    Type("own.exact", ("1", "1.0", "NaN")),
    Type("own.paired", ("(1,a)", "(,)"), as_text=True),
    Type("own.moody", ("sad", "ok")),
    Type("own.slyly", ("honest", "sly"), as_text=True),
    Type("own.floats", ("[0.1,0.30000001)", "empty"), as_text=True),
    Type("own.many_floats", ("{[0.1,0.2)}", "{}"), as_text=True),
    Type("own.pairs", ('["(1,a)","(2,b)")', "empty"), as_text=True),
    Type("own.base", ("1", "2"), as_text=True, can_be_key=False),
    Type("text collate own.caseless", ("a", "A", "b", "B"), input_type="text"),
    Type("name collate own.caseless", ("a", "A", "b", "B"), input_type="name"),
)
