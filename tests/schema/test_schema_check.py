"""What the comparison of a live schema with the files finds: every kind of manual change, in every pack."""

from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from daemon.schema.one_line import one_line
from daemon.schema.schema_check import (
    Description,
    Difference,
    Roles,
    check_schemas,
    describe_files,
    describe_live,
    differences,
    in_both,
    read_again,
    read_roles,
)
from daemon.schema.scratch import built
from tests.support.postgres import Server, ignore

SCHEMAS = ("rowcast", *migrate.bundled())

Files = tuple[dict[str, Description], dict[str, Description], Roles]
_FILES: dict[str, Files] = {}  # by data directory

TABLES = """
    select format('%I.%I', n.nspname, c.relname) as name, c.oid, c.relname
    from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
    where n.nspname = $1 and c.relkind in ('r', 'p') and not c.relispartition and c.relname <> 'alembic_version'
"""
FUNCTIONS = """
    select format('%I.%I(%s)', n.nspname, p.proname, pg_get_function_identity_arguments(p.oid)) as name, p.*
    from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace
    where n.nspname = $1 and p.proname !~ '^capture_[0-9]'
"""
TRIGGERS = """
    select g.tgname, t.name from pg_trigger as g join (TABLES) as t on t.oid = g.tgrelid
    where not g.tgisinternal and g.tgname !~ '^rowcast_'
"""

CHANGES = {
    "indexes are dropped": """
        select format('drop index %I.%I', $1::text, c.relname), format('index %I.%I', $1::text, c.relname), ''
        from pg_index as i join (TABLES) as t on t.oid = i.indrelid join pg_class as c on c.oid = i.indexrelid
        where not exists (select from pg_constraint as k where k.conindid = i.indexrelid)""",
    "indexes are invalid": """
        select format('update pg_index set indisvalid = false where indexrelid = %s', i.indexrelid),
               format('index %I.%I', $1::text, c.relname), 'validity'
        from pg_index as i join (TABLES) as t on t.oid = i.indrelid join pg_class as c on c.oid = i.indexrelid
        where not exists (select from pg_constraint as k where k.conindid = i.indexrelid) and c.relkind = 'i'""",
    "defaults are dropped": """
        select format('alter table %s alter column %I drop default', t.name, a.attname),
               format('column %s.%I', t.name, a.attname), 'default'
        from pg_attribute as a join (TABLES) as t on t.oid = a.attrelid
        where a.atthasdef and a.attgenerated = '' and not a.attisdropped""",
    "defaults are set": """
        select format('alter table %s alter column %I set default null', t.name, a.attname),
               format('column %s.%I', t.name, a.attname), 'default'
        from pg_attribute as a join (TABLES) as t on t.oid = a.attrelid
        where a.atthasdef and a.attgenerated = '' and not a.attisdropped""",
    "columns may be null": """
        select format('alter table %s alter column %I drop not null', t.name, a.attname),
               format('column %s.%I', t.name, a.attname), 'not null'
        from pg_attribute as a join (TABLES) as t on t.oid = a.attrelid
        where a.attnotnull and a.attnum > 0 and not a.attisdropped and a.attidentity = '' and not exists (
            select from pg_constraint as c where c.conrelid = t.oid and c.contype = 'p' and a.attnum = any (c.conkey))""",
    "columns may not be null": """
        select format('alter table %s alter column %I set not null', t.name, a.attname),
               format('column %s.%I', t.name, a.attname), 'not null'
        from pg_attribute as a join (TABLES) as t on t.oid = a.attrelid
        where not a.attnotnull and a.attnum > 0 and not a.attisdropped and $1 <> 'rowcast'""",
    "checks are dropped": """
        select format('alter table %s drop constraint %I', t.name, c.conname),
               format('constraint %I on %s', c.conname, t.name), ''
        from pg_constraint as c join (TABLES) as t on t.oid = c.conrelid where c.contype = 'c'""",
    "checks allow anything": """
        select format('alter table %s drop constraint %I, add constraint %2$I check (true)', t.name, c.conname),
               format('constraint %I on %s', c.conname, t.name), 'definition'
        from pg_constraint as c join (TABLES) as t on t.oid = c.conrelid where c.contype = 'c'""",
    "foreign keys are dropped": """
        select format('alter table %s drop constraint %I', t.name, c.conname),
               format('constraint %I on %s', c.conname, t.name), ''
        from pg_constraint as c join (TABLES) as t on t.oid = c.conrelid where c.contype = 'f'""",
    "foreign keys are not validated": """
        select format('alter table %s drop constraint %I, add constraint %2$I %s not valid', t.name, c.conname,
                      pg_get_constraintdef(c.oid)),
               format('constraint %I on %s', c.conname, t.name), 'validity'
        from pg_constraint as c join (TABLES) as t on t.oid = c.conrelid where c.contype = 'f'""",
    "foreign keys are not enforced": """
        select format('update pg_trigger set tgenabled = ''D'' where tgconstraint = %s', c.oid),
               format('constraint %I on %s', c.conname, t.name), 'triggers'
        from pg_constraint as c join (TABLES) as t on t.oid = c.conrelid where c.contype = 'f'""",
    "functions have another body": """
        select format('update pg_proc set prosrc = prosrc || '' '' where oid = %s', p.oid), 'function ' || p.name, 'body'
        from (FUNCTIONS) as p where p.prokind = 'f'""",
    "functions run as somebody else": """
        select format('alter function %s security %s', p.name, case when p.prosecdef then 'invoker' else 'definer' end),
               'function ' || p.name, 'security'
        from (FUNCTIONS) as p where p.prokind = 'f'""",
    "functions have another owner": """
        select format('update pg_proc set proowner = ''pg_monitor''::regrole where oid = %s', p.oid),
               'function ' || p.name, 'owner'
        from (FUNCTIONS) as p where p.prokind = 'f'""",
    "functions have other settings": """
        select format('alter function %s set search_path = public', p.name), 'function ' || p.name, 'settings'
        from (FUNCTIONS) as p where p.prokind = 'f'""",
    "functions have another volatility": """
        select format('alter function %s %s', p.name, case p.provolatile when 'v' then 'stable' else 'volatile' end),
               'function ' || p.name, 'volatility'
        from (FUNCTIONS) as p where p.prokind = 'f' and p.proname <> 'normalised_address'""",
    "triggers are dropped": """
        select format('drop trigger %I on %s', g.tgname, g.name), format('trigger %I on %s', g.tgname, g.name), ''
        from (TRIGGERS) as g""",
    "triggers are disabled": """
        select format('alter table %s disable trigger %I', g.name, g.tgname), format('trigger %I on %s', g.tgname, g.name),
               'state'
        from (TRIGGERS) as g""",
    "triggers are enabled always": """
        select format('alter table %s enable always trigger %I', g.name, g.tgname),
               format('trigger %I on %s', g.tgname, g.name), 'state'
        from (TRIGGERS) as g""",
    "row security is enabled": """
        select format('alter table %s enable row level security', t.name), 'table ' || t.name, 'row security'
        from (TABLES) as t""",
    "row security is forced": """
        select format('alter table %s force row level security', t.name), 'table ' || t.name, 'forced row security'
        from (TABLES) as t""",
    "views are dropped": """
        select format('drop view if exists %I.%I cascade', $1::text, c.relname), format('view %I.%I', $1::text, c.relname), ''
        from pg_class as c where c.relnamespace = $1::text::regnamespace and c.relkind = 'v'""",
    "sequences count otherwise": """
        select format('alter sequence %I.%I increment by 7', $1::text, c.relname),
               format('sequence %I.%I', $1::text, c.relname), 'definition'
        from pg_class as c where c.relnamespace = $1::text::regnamespace and c.relkind = 'S'""",
    "privileges are granted to public": """
        select format('grant select on %s to public', t.name), 'table ' || t.name, ''
        from (TABLES) as t
        union all
        select format('grant execute on function %s to public', p.name), 'function ' || p.name, ''
        from (FUNCTIONS) as p where p.prokind = 'f' and p.proname <> 'ulid'""",
    "privileges are revoked": """
        select format('revoke all on %s from %s', t.name, x.grantee::regrole), 'table ' || t.name, ''
        from (TABLES) as t join pg_class as c on c.oid = t.oid cross join lateral aclexplode(c.relacl) as x
        where x.grantee not in (0, c.relowner)
        group by t.name, x.grantee
        union all
        select format('revoke all on %s from %s', t.name, x.grantee::regrole), format('column %s.%I', t.name, a.attname), ''
        from (TABLES) as t join pg_attribute as a on a.attrelid = t.oid cross join lateral aclexplode(a.attacl) as x
        group by t.name, a.attname, x.grantee
        union all
        select format('revoke all on schema %I from %s', n.nspname, x.grantee::regrole), 'schema ' || n.nspname, ''
        from pg_namespace as n cross join lateral aclexplode(n.nspacl) as x
        where n.nspname = $1 and x.grantee not in (0, n.nspowner)
        group by n.nspname, x.grantee""",
    "constraints are added": """
        select format('alter table %s add constraint mine check (now() is not null)', t.name),
               'constraint mine on ' || t.name, ''
        from (TABLES) as t""",
    "required columns are added": """
        select format('alter table %s add column mine text not null default 1; alter table %1$s alter column mine drop default', t.name),
               format('column %s.mine', t.name), ''
        from (TABLES) as t""",
    "unique indexes are added": """
        select format('create unique index %I on %s ((1)) where false', t.relname || '_mine', t.name),
               format('index %I.%I', $1::text, t.relname || '_mine'), ''
        from (TABLES) as t where not exists (select from pg_partitioned_table as p where p.partrelid = t.oid)""",
    "rules are added": """
        select format('create rule mine as on delete to %s do instead nothing', t.name), 'rule mine on ' || t.name, ''
        from (TABLES) as t""",
}
SILENT = {
    "a column": "select format('alter table %s add column mine text', t.name) from (TABLES) as t",
    "an index": "select format('create index on %s ((1))', t.name) from (TABLES) as t",
    "a view": "select format('create view %s_mine as select 1 as one', t.name) from (TABLES) as t limit 1",
    "a privilege of another role": "select format('grant all on %s to pg_monitor', t.name) from (TABLES) as t",
    "a replica identity": "select format('alter table %s replica identity full', t.name) from (TABLES) as t",
    "a storage parameter": "select format('alter table %s set (autovacuum_vacuum_scale_factor = 0.1)', t.name)"
    " from (TABLES) as t join pg_class as c on c.oid = t.oid where c.relkind = 'r'",
}


def sql_of(text: str) -> str:
    return (
        text.replace("(TRIGGERS)", f"({TRIGGERS})")
        .replace("(TABLES)", f"({TABLES})")
        .replace("(FUNCTIONS)", f"({FUNCTIONS})")
    )


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with every pack; what is done in it is undone."""
    async with postgres.undone(
        "checked", partial(migrate.apply, packs=migrate.bundled(), report=ignore)
    ) as connection:
        yield connection


@pytest.fixture
async def files(sql: Connection) -> Files:
    """What the files build for each schema, then when the server has read all definitions again, and the roles."""
    directory = await sql.fetchval("select current_setting('data_directory')")
    if directory not in _FILES:
        roles = await read_roles(sql)
        histories = migrate.histories_of(migrate.bundled(), {}, None)
        owner = await sql.fetchval("select quote_ident(current_user)")
        async with built(sql, histories) as scratch:
            first = {schema: await describe_files(scratch, schema, owner) for schema in SCHEMAS}
            for schema, description in first.items():
                await read_again(scratch, schema, owner, description.objects)
            again = {schema: await describe_files(scratch, schema, owner) for schema in SCHEMAS}
        _FILES[directory] = first, again, roles
    return _FILES[directory]


async def found(sql: Connection, schema: str, files: Files) -> list[Difference]:
    first, again, roles = files
    live, exact = await describe_live(sql, schema), schema == "rowcast"
    return in_both(
        differences(live, first[schema], roles, exact=exact), differences(live, again[schema], roles, exact=exact)
    )


async def mend(sql: Connection, schema: str, files: Files) -> list[Difference]:
    """Run the remedies, and again those of what then appears: an object's privileges, or what needs what was missing."""
    for _ in range(4):
        if not (problems := await found(sql, schema, files)):
            break
        for problem in problems:
            with suppress(asyncpg.PostgresError):
                async with sql.transaction():
                    await sql.execute(one_line(problem.remedy))
    return await found(sql, schema, files)


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("change", CHANGES)
async def test_what_was_changed_is_found_and_nothing_else_and_the_statement_mends_it(
    sql: Connection, files: Files, schema: str, change: str
) -> None:
    rows = await sql.fetch(sql_of(CHANGES[change]), schema)
    for row in rows:
        await sql.execute(row[0])
    problems = await found(sql, schema, files)
    assert {(row[1], row[2]) for row in rows} == {(problem.object, problem.property) for problem in problems}
    assert [] == await mend(sql, schema, files)
