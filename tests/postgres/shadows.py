"""Objects in `public` that stand in the place of those of pg_catalog that Rowcast's statements use."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from daemon.postgres.connect import Connection

ROOT = Path(__file__).parents[2]

# The types whose pairs get an operator each. Where pg_catalog has none for exactly this pair, the shadow is a better
# match: no search_path with `public` in it is safe.
TYPES = (
    "text", "name", "varchar", "char", "int2", "int4", "int8", "oid", "bool", "json", "jsonb", "timestamptz",
    "interval", "numeric", "xid8", "regclass", "_text", "_name",
)  # fmt: skip

# What `called` says about a shadow that was used. Sequences are not transactional, so no rollback hides it.
BODY = """
begin
    perform pg_catalog.setval('public.called'::pg_catalog.regclass, {number});
    raise exception 'shadow {name}';
end
"""

FUNCTIONS = """
select p.proname as name, p.prokind = 'a' as aggregate,
       array(select t.typname from unnest(p.proargtypes) with ordinality as a (oid, n)
             join pg_type as t on t.oid = a.oid order by a.n) as arguments,
       r.typname as result, r.typtype = 'p' as pseudo, p.proretset as is_set
from pg_proc as p join pg_type as r on r.oid = p.prorettype
where p.pronamespace = 'pg_catalog'::regnamespace and p.proname = any ($1) and p.prokind in ('f', 'a', 'w')
"""

RELATIONS = """
select c.relname::text as name, string_agg(quote_ident(a.attname), ', ' order by a.attnum) as columns
from pg_class as c
join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0
join pg_type as t on t.oid = a.atttypid and t.typtype <> 'p'
where c.relnamespace = 'pg_catalog'::regnamespace and c.relkind in ('r', 'v') and c.relname = any ($1)
group by c.relname
"""


def statements() -> str:
    """Every statement of Rowcast: its .sql files, and all text in its Python files."""
    files = [path for folder in ("daemon", "ddl", "triggers") for path in sorted((ROOT / folder).rglob("*.sql"))]
    texts = [path.read_text(encoding="utf-8") for path in files]
    for path in sorted((ROOT / "daemon").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        texts += [value for value in constants if isinstance(value, str)]
    return "\n".join(texts).lower()


def variants(arguments: list[str]) -> Iterator[list[str]]:
    """Argument types that match a call exactly, or better than the original does."""
    changes: tuple[dict[str, str], ...] = (
        {},
        {"int8": "int4"},
        {"int8": "int2", "int4": "int2"},
        {"text": "varchar"},
        {"text": "name"},
        {
            "regclass": "text",
            "name": "text",
            "jsonb": "text",
            "json": "text",
            "interval": "text",
            "timestamptz": "text",
        },
        {"any": "text", "anyelement": "text", "anyarray": "_text", "anynonarray": "text", "anycompatible": "text"},
        {"any": "anyelement"},
        {"any": "int8", "anyelement": "int8", "anyarray": "_int8"},
        {"any": "json", "anyelement": "json"},
    )
    for change in changes:
        yield [change.get(argument, argument) for argument in arguments]


def _type(name: str) -> str:
    return f'pg_catalog."{name}"'


def _function(name: str, arguments: list[str], result: str, number: int, quoted: str = "") -> str:
    listed = ", ".join(map(_type, arguments))
    body = BODY.format(number=number, name=re.sub(r"\W", "", name) or "operator")
    return f'create function public."{quoted or name}"({listed}) returns {result} language plpgsql as $${body}$$'


async def commands(connection: Connection) -> list[str]:
    """The commands that create every shadow, each on its own: some are not possible."""
    text = statements()
    words = sorted(set(re.findall(r"\b[a-z_][a-z0-9_]{0,62}\b", text)))
    made: list[str] = ["create sequence public.called", "grant all on sequence public.called to public"]
    seen: set[tuple[str, ...]] = set()
    for function in await connection.fetch(FUNCTIONS, words):
        name = function["name"]
        for arguments in (*variants(list(function["arguments"])), ["text"] * len(function["arguments"])):
            if (name, *arguments) in seen or {"internal", "cstring", "trigger"} & {*arguments}:
                continue
            seen.add((name, *arguments))
            result = "pg_catalog.text" if function["pseudo"] else _type(function["result"])
            number = len(made)
            if function["aggregate"]:
                state = f"shadow_state_{number}"
                made.append(_function(name, ["int8", *arguments], "pg_catalog.int8", number, quoted=state))
                listed = ", ".join(map(_type, arguments)) or "*"
                made.append(
                    f'create aggregate public."{name}"({listed}) (sfunc = public.{state}, stype = pg_catalog.int8)'
                )
            else:
                made.append(_function(name, arguments, f"{'setof ' * function['is_set']}{result}", number))
    made += await _operators(connection, text, len(made))
    for [name] in await connection.fetch(
        "select typname::text from pg_type where typnamespace = 'pg_catalog'::regnamespace"
        " and typtype in ('b', 'p', 'r', 'e') and typname = any ($1)",
        words,
    ):
        made.append(f"create type public.\"{name}\" as enum ('shadow')")
    for name, columns in await connection.fetch(RELATIONS, words):
        made.append(_function(name, [], "pg_catalog.bool", len(made), quoted=f"shadow_of_{name}"))
        made.append(
            f'create view public."{name}" as select {columns} from pg_catalog."{name}"'
            f" where public.shadow_of_{name}()"
        )
    return made


async def _operators(connection: Connection, text: str, number: int) -> list[str]:
    symbols = sorted({*re.findall(r"[-+*/<>=~!@#%^&|`?]{1,8}", text)})
    results = {
        row[0]: row[1]
        for row in await connection.fetch(
            "select o.oprname, mode() within group (order by t.typname)"
            " from pg_operator as o join pg_type as t on t.oid = o.oprresult"
            " where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprname = any ($1) and t.typtype <> 'p'"
            " group by 1",
            symbols,
        )
    }
    made: list[str] = []
    for place, result in enumerate(sorted(set(results.values()))):
        for left in TYPES:
            for right in TYPES:
                name = f"shadow_op_{place}_{left}_{right}"
                made.append(_function(name, [left, right], _type(result), number + len(made)))
                made += [
                    f"create operator public.{symbol} (leftarg = {_type(left)}, rightarg = {_type(right)},"
                    f' function = public."{name}")'
                    for symbol, of in results.items()
                    if of == result
                ]
    return made


# Creates what it can of a list of commands, and returns how many that were.
CREATE = """
create function pg_temp.create_each(commands text[]) returns integer language plpgsql as $create$
declare
    command text;
    made integer := 0;
begin
    foreach command in array commands loop
        begin
            execute command;
            made := made + 1;
        exception when others then
            null;
        end;
    end loop;
    return made;
end
$create$
"""


async def cast_shadows(connection: Connection) -> list[str]:
    """Create every shadow, in this session's role. Returns the commands; a shadow's number is its place there."""
    made = await commands(connection)
    await connection.execute(CREATE)
    count = await connection.fetchval("select pg_temp.create_each($1)", made)
    assert count > len(made) / 2, "most shadows could not be created"
    return made
