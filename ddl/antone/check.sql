-- The rules that Antone's schema follows, also where somebody added to it: each foreign key says what a DELETE does and
-- has an index, each required timestamp has a default, names follow one pattern. One row for each problem, with its
-- remedy. It only reads catalogs. That everything is as the revisions made it, `daemon check` finds without this file.
with pack as (
    select n.oid, n.nspname as name
    from pg_namespace as n where n.nspname = split_part('antone.posts', '.', 1)
), tables as (
    select c.oid, c.relname as name, format('%I.%I', p.name, c.relname) as place
    from pg_class as c join pack as p on p.oid = c.relnamespace
    where c.relkind in ('r', 'p') and c.relname <> 'alembic_version'
), columns as (
    select t.oid, t.name as table_name, format('%s.%I', t.place, a.attname) as place, a.attname as name, a.attnum,
           format_type(a.atttypid, a.atttypmod) as type, a.attnotnull, a.atthasdef
    from tables as t join pg_attribute as a on a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
), constraints as (
    select c.*, t.name as table_name, format('%s on %s', quote_ident(c.conname), t.place) as place,
           (select string_agg(x.name, '_' order by k.n) from unnest(c.conkey) with ordinality as k (attnum, n)
            join columns as x on x.oid = c.conrelid and x.attnum = k.attnum) as columns
    from tables as t join pg_constraint as c on c.conrelid = t.oid and c.contype in ('p', 'u', 'f', 'c')
), indexes as (
    select i.*, t.name as table_name, c.relname as name, format('%I.%I', p.name, c.relname) as place,
           (select string_agg(x.name, ' ' order by k.n)
            from unnest(i.indkey::smallint []) with ordinality as k (attnum, n)
            join columns as x on x.oid = i.indrelid and x.attnum = k.attnum) as columns
    from tables as t join pg_index as i on i.indrelid = t.oid
    join pg_class as c on c.oid = i.indexrelid cross join pack as p
), problems (place, problem, remedy) as (
    select c.place, 'it has no ON DELETE action', 'drop it and create it again with one'
    from constraints as c
    where c.contype = 'f' and c.confdeltype = 'a'
    union all
    select c.place, 'no index begins with its columns', 'create one'
    from constraints as c
    where c.contype = 'f' and not exists (
        select from indexes as i
        where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1] and i.indisvalid and i.indpred is null
    )
    union all
    select c.place, 'the required timestamp has no default', 'alter column ... set default current_timestamp'
    from columns as c where c.type like 'timestamp%' and c.attnotnull and not c.atthasdef
    union all
    select c.place, 'the timestamp has no time zone', 'make it a timestamptz'
    from columns as c where c.type like 'timestamp%without%'
    union all
    select t.place, 'no trigger maintains updated_at', 'create or enable its trigger again'
    from tables as t join columns as c on c.oid = t.oid and c.name = 'updated_at'
    where not exists (
        select from pg_trigger as g join pg_proc as f on f.oid = g.tgfoid
        where g.tgrelid = t.oid and f.proname = 'set_updated_at' and g.tgenabled in ('O', 'A')
    )
    union all
    select t.place, 'the name contains characters other than a-z, 0-9 and _', 'rename it'
    from (select place, name from tables union all select place, name from columns) as t
    where t.name !~ '^[a-z][a-z0-9_]*$'
    union all
    select c.place, format('it should be called %s_%s', c.table_name,
                           case c.contype when 'p' then 'pkey' when 'u' then c.columns || '_key'
                                          when 'f' then c.columns || '_fkey' else '...' end), 'rename it'
    from constraints as c
    where case c.contype when 'p' then c.conname <> c.table_name || '_pkey'
                         when 'u' then c.conname <> c.table_name || '_' || c.columns || '_key'
                         when 'f' then c.conname <> c.table_name || '_' || c.columns || '_fkey'
                         else not starts_with(c.conname, c.table_name || '_') end
    union all
    select i.place, format('it should be called %s_%s_idx', i.table_name, replace(i.columns, ' ', '_')), 'rename it'
    from indexes as i
    where i.name <> i.table_name || '_' || replace(i.columns, ' ', '_') || '_idx'
      and not exists (select from pg_constraint as c where c.conindid = i.indexrelid)
    union all
    select 'role antone_app', 'it is a superuser', 'alter role antone_app nosuperuser'
    from pg_roles as r where r.rolname = 'antone_app' and r.rolsuper
    union all
    select 'role antone_app', format('it may create objects in schema %I', p.name),
           format('revoke create on schema %I from it', p.name)
    from pg_roles as r cross join pack as p
    where r.rolname = 'antone_app' and not r.rolsuper and has_schema_privilege(r.oid, p.oid, 'CREATE')
)
select place, problem, remedy from problems order by place, problem;
