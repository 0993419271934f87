-- The statements of daemon/schema. In those for one schema, its name replaces `the_schema`.

-- name: current
select version_num from the_schema.alembic_version;

-- name: prerelease
-- Does the schema lack what its first revision has had since revisions are frozen?
select pg_catalog.to_regclass('rowcast.log') is not null and not exists (
    select from pg_catalog.pg_attribute as a
    where a.attrelid = pg_catalog.to_regclass('rowcast.log') and a.attname = 'xid' and not a.attisdropped
);

-- name: compatibility
-- $1 schema
select c.revision, c.compatible_with from rowcast.compatibility as c where c.schema_name = $1;

-- name: note_compatible
do $$
begin
    if pg_catalog.to_regclass('rowcast.compatibility') is not null then
        insert into rowcast.compatibility (schema_name, revision, compatible_with)
        values ('the_schema', 'the_revision', 'the_oldest')
        on conflict (schema_name, revision) do update set compatible_with = excluded.compatible_with;
    end if;
end
$$;

-- name: forget_compatible
do $$
begin
    if pg_catalog.to_regclass('rowcast.compatibility') is not null then
        delete from rowcast.compatibility as c where (c.schema_name, c.revision) = ('the_schema', 'the_revision');
    end if;
end
$$;

-- name: lock_holder
-- Anybody who may connect can take the lock, but only a role that may create here, or take on one that may, can be
-- changing schemas.
-- $1 the lock's key, bigint
select a.pid, a.usename::text as user_name, a.application_name, a.state, null::int as seconds,
       exists (
           select from pg_catalog.pg_roles as r
           where pg_catalog.pg_has_role(a.usesysid, r.oid, 'member') and (
               pg_catalog.has_database_privilege(r.oid, d.oid, 'create') or coalesce((
                   select pg_catalog.has_schema_privilege(r.oid, n.oid, 'create')
                   from pg_catalog.pg_namespace as n where n.nspname = 'rowcast'
               ), false))
       ) as may_change_schemas
from pg_catalog.pg_locks as l
join pg_catalog.pg_stat_activity as a on a.pid = l.pid
join pg_catalog.pg_database as d on d.oid = l.database
where l.locktype = 'advisory' and l.granted and d.datname = pg_catalog.current_database()
  and (l.classid::bigint << 32 | l.objid::bigint) = $1 and l.objsubid = 1;

-- name: blockers
-- Their queries are left out, since they may contain values of rows.
-- $1 pid of the process that waits
select a.pid, a.usename::text as user_name, a.application_name, a.state,
       extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::int as seconds
from pg_catalog.pg_stat_activity as a
where a.pid = any (pg_catalog.pg_blocking_pids($1))
order by a.xact_start;

-- name: make_schema
-- The comment marks a schema that Rowcast created: a rollback drops no other.
do $$
begin
    if pg_catalog.to_regnamespace('the_schema') is null then
        create schema the_schema;
        comment on schema the_schema is 'Created by Rowcast.';
    end if;
end
$$;

-- name: forget_captures
-- Dropping a table drops its triggers, but not their functions.
do $$
begin
    if pg_catalog.to_regprocedure('rowcast.unwatch_dropped()') is not null then
        perform rowcast.unwatch_dropped();
    end if;
end
$$;

-- name: leave
-- Runs when a pack is rolled back completely. Drops its extensions (those that Rowcast created and no other pack
-- wants), its version table, and its schema if Rowcast created it and it is empty.
do $$
begin
    if pg_catalog.to_regprocedure('rowcast.drop_extensions(name)') is not null then
        perform rowcast.drop_extensions('the_schema');
    end if;
    drop table the_schema.alembic_version;
    if pg_catalog.obj_description('the_schema'::regnamespace, 'pg_namespace') = 'Created by Rowcast.' then
        begin
            drop schema the_schema;
        exception when dependent_objects_still_exist then
            raise warning 'schema the_schema is kept: it contains objects that Rowcast did not create';
        end;
    end if;
end
$$;

-- name: histories
-- The schemas that hold a history of revisions.
select n.nspname::text as schema_name
from pg_catalog.pg_class as c join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where c.relname = 'alembic_version' and c.relkind = 'r' and n.nspname <> 'rowcast'
order by n.nspname;

-- name: unfit_role
-- What keeps a role from being a daemon's; null if nothing does.
-- $1 role
select case
    when r.oid is null then 'no role'
    when r.rolsuper then 'a superuser'
    when pg_catalog.pg_has_role(r.oid, c.relowner, 'member') then 'the owner of the log, or a member of it'
    end
from (select $1::text as name) as wanted
cross join pg_catalog.pg_class as c
left join pg_catalog.pg_roles as r on r.rolname = wanted.name
where c.oid = 'rowcast.watched'::pg_catalog.regclass;

-- name: let_serve
-- $1 role   $2 schemas text[]   $3 functions text[]
select rowcast.let_serve(pg_catalog.quote_ident($1::text)::pg_catalog.regrole, $2::text [], $3::text []);

-- name: watched
-- The captured tables outside the packs' schemas.
-- $1 the packs' schemas, text[]
select pg_catalog.format('%I.%I', w.schema_name, w.table_name) as table_name
from rowcast.watched as w
where w.function_name is not null and w.schema_name <> all ($1::text [])
order by 1;

-- name: capture_problems
-- The differences between the catalog and what rowcast.watch() set up: a row for each table, problem and place. The owner
-- is checked only where the owner of Rowcast's schema is a member of rowcast_capture: otherwise watch() could not change
-- it.
with watched as (
    select format('%I.%I', w.schema_name, w.table_name) as name, w.per_row, w.function_name, w.definition,
           to_jsonb(w) ->> 'snapshot_name' as snapshot_name, to_jsonb(w) ->> 'snapshot_definition' as snapshot_definition,
           to_jsonb(w) ? 'snapshot_name' as has_snapshots,  -- some revisions do not
           (select c.oid from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
            where (n.nspname, c.relname) = (w.schema_name, w.table_name) and c.relkind in ('r', 'p')) as relation,
           (select p.oid from pg_proc as p
            where p.pronamespace = 'rowcast'::regnamespace and p.proname = w.function_name and p.pronargs = 0) as function,
           (select p.oid from pg_proc as p
            where p.pronamespace = 'rowcast'::regnamespace and p.proname = to_jsonb(w) ->> 'snapshot_name'
              and p.pronargs = 2) as snapshot,
           (select p.oid from pg_proc as p
            where p.pronamespace = 'rowcast'::regnamespace and p.proname = 'may_read_' || w.id and p.pronargs = 2) as reader
    from rowcast.watched as w where w.function_name is not null
), target as (
    -- A statement trigger fires for the table that the statement names, so partitions need their own.
    select w.name, w.per_row, w.function, t.relation, format('%I.%I', n.nspname, c.relname) as target,
           exists (select from pg_partitioned_table as p where p.partrelid = w.relation) as is_partitioned
    from watched as w
    cross join lateral (select w.relation union select p.relid from pg_partition_tree(w.relation) as p) as t (relation)
    join pg_class as c on c.oid = t.relation
    join pg_namespace as n on n.oid = c.relnamespace
), capture as (
    select t.name, t.target, o.operation, case
        when g.oid is null then 'missing'
        when g.tgenabled = 'D' then 'disabled'
        when g.tgenabled = 'R' then 'replica'
        when t.per_row and g.tgenabled <> 'A' then 'not_always'
        when not t.per_row and g.tgenabled <> 'O' then 'always'
        when g.tgtype <> o.bit + case when t.per_row and o.operation <> 'truncate' then 1 else 0 end
             or (g.tgqual is null) = (o.operation = 'move') or g.tgattr::text <> ''
             or (coalesce(g.tgoldtable, ''), coalesce(g.tgnewtable, '')) <> (
                 case when o.operation in ('update', 'delete') and not t.per_row then 'old_rows' else '' end,
                 case when o.operation in ('insert', 'update') and not t.per_row then 'new_rows' else '' end
             ) then 'trigger_altered' end as problem
    from target as t
    cross join (values (1, 'rowcast_insert', 'insert', 4), (2, 'rowcast_update', 'update', 16),
                       (3, 'rowcast_delete', 'delete', 8), (4, 'rowcast_truncate', 'truncate', 32),
                       (5, '~rowcast_move', 'move', 1 + 2 + 16)) as o (n, trigger_name, operation, bit)
    left join pg_trigger as g on g.tgrelid = t.relation and g.tgname = o.trigger_name and g.tgfoid = t.function
    where t.function is not null and (o.operation <> 'move' or t.is_partitioned and not t.per_row)
    order by o.n
)
select w.name, 'gone' as problem, '' as place, '' as operations
from watched as w where w.relation is null
union all
select w.name, 'function_missing', format('rowcast.%I', w.function_name), ''
from watched as w where w.relation is not null and w.function is null
union all
select w.name, 'snapshot_missing', coalesce('rowcast.' || quote_ident(w.snapshot_name), ''), ''
from watched as w where w.relation is not null and w.has_snapshots and w.snapshot is null
union all
select w.name, 'snapshot_altered', format('rowcast.%I', w.snapshot_name), ''
from watched as w
join pg_proc as p on p.oid = w.snapshot
join pg_language as l on l.oid = p.prolang
join pg_class as own on own.oid = 'rowcast.watched'::regclass
where l.lanname <> 'sql' or not p.prosecdef or md5(p.prosrc || p.proconfig::text) is distinct from w.snapshot_definition
   or p.proowner <> to_regrole('rowcast_capture') and pg_has_role(own.relowner, to_regrole('rowcast_capture'), 'member')
union all
select w.name, 'function_altered', format('rowcast.%I', w.function_name), ''
from watched as w
join pg_proc as p on p.oid = w.function
join pg_language as l on l.oid = p.prolang
where l.lanname <> 'plpgsql' or not p.prosecdef or p.provolatile <> 'v'
   or md5(p.prosrc || p.proconfig::text) is distinct from w.definition
union all
-- With a capture function anybody could make up events, and a snapshot function reads the table for its caller.
select w.name, 'open', p.oid::regprocedure::text,
       string_agg(distinct case when a.grantee = 0 then 'public' else a.grantee::regrole::text end, ', ')
from watched as w
join pg_class as own on own.oid = 'rowcast.watched'::regclass
join pg_proc as p on p.oid in (w.function, w.snapshot, w.reader)
cross join lateral aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) as a
where a.grantee not in (p.proowner, own.relowner)
  and (p.oid = w.function or a.grantee not in (
      select d.grantee from pg_proc as r cross join lateral aclexplode(r.proacl) as d
      where r.oid = to_regprocedure('rowcast.rights_of_daemons()') and d.grantee <> 0))
group by w.name, p.oid
union all
select w.name, 'function_owner', format('rowcast.%I', w.function_name), ''
from watched as w
join pg_proc as p on p.oid = w.function
join pg_class as own on own.oid = 'rowcast.watched'::regclass
where p.proowner <> to_regrole('rowcast_capture') and pg_has_role(own.relowner, to_regrole('rowcast_capture'), 'member')
union all
select c.name, c.problem, c.target, string_agg(c.operation, ', ')
from capture as c where c.problem is not null
group by c.name, c.problem, c.target
union all
-- The capture function of a partitioned table finds out that a partition was detached, and tells nothing of it.
select w.name, case when t.relkind = 'p' and not w.per_row then 'detached' else 'stray' end, format('%I.%I', n.nspname, c.relname),
       string_agg(format('drop trigger %I on %I.%I', g.tgname, n.nspname, c.relname), '; ' order by g.tgname)
from watched as w
left join pg_class as t on t.oid = w.relation
join pg_trigger as g on g.tgfoid = w.function and g.tgparentid = 0
join pg_class as c on c.oid = g.tgrelid
join pg_namespace as n on n.oid = c.relnamespace
where not exists (select from target as t where t.name = w.name and t.relation = g.tgrelid)
group by w.name, w.per_row, t.relkind, n.nspname, c.relname
union all
-- Where this is set, only triggers fire that are ENABLE ALWAYS.
select case when s.setrole = 0 and s.setdatabase = 0 then 'all roles' when s.setrole = 0 then format('database %I', d.datname)
            else concat(format('role %I', r.rolname), case when s.setdatabase <> 0 then format(' in database %I', d.datname) end) end,
       case when s.setrole = 0 then 'replica_mode' else 'replica_role' end, '', concat(
           case when s.setrole = 0 and s.setdatabase <> 0 then format('alter database %I', d.datname)
                else concat('alter role ', coalesce(quote_ident(r.rolname), 'all'),
                            case when s.setdatabase <> 0 then format(' in database %I', d.datname) end) end,
           ' reset session_replication_role')
from pg_db_role_setting as s
join pg_database as d on d.datname = current_database()
left join pg_roles as r on r.oid = s.setrole
where s.setdatabase in (0, d.oid) and 'session_replication_role=replica' = any (lower(s.setconfig::text)::text [])
  and exists (select from watched as w where not w.per_row)
union all
-- Logical replication fires row triggers only, and of these only those that are ENABLE ALWAYS.
select distinct t.name, 'subscription', t.target, ''
from target as t
join pg_subscription_rel as s on s.srrelid = t.relation
where not t.per_row
order by 1, 2, 3;

-- name: watch_problems
-- The differences between watched tables and what rowcast.watch() was told about them: columns and keys that are gone,
-- children that are written to directly, and tables that capture cannot read.
with watched as (
    select format('%I.%I', w.schema_name, w.table_name) as name, w.columns, w.key, w.soft_delete, w.per_row, c.oid as relation,
           c.relpersistence, c.reltuples, to_jsonb(w) ->> 'rows' as rows,
           to_jsonb(w) ? 'rows' as has_snapshots
    from rowcast.watched as w
    join pg_namespace as n on n.nspname = w.schema_name
    join pg_class as c on c.relnamespace = n.oid and c.relname = w.table_name and c.relkind in ('r', 'p')
    where w.function_name is not null
), named as (
    select w.name, w.relation, u.column_name, min(u.place) as place, bool_or(u.column_name = any (w.key)) as in_key,
           a.attname is null as is_gone, a.attnotnull
    from watched as w
    cross join unnest(w.columns || w.key || w.soft_delete) with ordinality as u (column_name, place)
    left join pg_attribute as a
        on a.attrelid = w.relation and a.attname = u.column_name and a.attnum > 0 and not a.attisdropped
    where u.column_name is not null
    group by w.name, w.relation, u.column_name, a.attname, a.attnotnull
), reader as (
    select r.oid from pg_roles as r where r.rolname = 'rowcast_capture' and not r.rolsuper and not r.rolbypassrls
)
select n.name, 'column_gone' as problem, string_agg(quote_ident(n.column_name), ', ' order by n.place) as place
from named as n where n.is_gone
group by n.name
union all
select n.name, 'key_null', string_agg(quote_ident(n.column_name), ', ' order by n.place)
from named as n where n.in_key and not n.is_gone and not n.attnotnull
group by n.name
union all
select w.name, 'key_not_unique', (select string_agg(quote_ident(k), ', ') from unnest(w.key) as k)
from watched as w
where not exists (select from named as n where n.name = w.name and n.in_key and n.is_gone)
  and not exists (
      select from pg_index as i
      where i.indrelid = w.relation and i.indisunique and i.indisvalid and i.indpred is null and i.indexprs is null
        and (select array_agg(a.attname) from pg_attribute as a
             where a.attrelid = w.relation and a.attnum = any (i.indkey [0:i.indnkeyatts - 1])) <@ w.key
  )
union all
select w.name, 'child', format('%I.%I', s.nspname, c.relname)
from watched as w
join pg_inherits as i on i.inhparent = w.relation
join pg_class as c on c.oid = i.inhrelid and not c.relispartition
join pg_namespace as s on s.oid = c.relnamespace
where not exists (
    select from pg_trigger as g join pg_proc as p on p.oid = g.tgfoid
    where g.tgrelid = c.oid and p.pronamespace = 'rowcast'::regnamespace
)
union all
select w.name, case when c.relispartition then 'partition' else 'parent' end, i.inhparent::regclass::text
from watched as w
join pg_class as c on c.oid = w.relation
join pg_inherits as i on i.inhrelid = w.relation
where not w.per_row
union all
select w.name, 'unlogged', '' from watched as w where w.relpersistence = 'u'
union all
select w.name, 'rows', '' from watched as w where w.has_snapshots and w.rows is null and w.reltuples >= 10000
union all
-- Capture reads as this role, with row security off: where that applies to the role, the read fails.
select format('%I.%I', s.nspname, c.relname), 'row_security', ''
from pg_class as c
join pg_namespace as s on s.oid = c.relnamespace
cross join reader as r
where c.relkind in ('r', 'p') and c.relrowsecurity
  and (c.relforcerowsecurity or not pg_has_role(r.oid, c.relowner, 'usage'))
  and has_any_column_privilege(r.oid, c.oid, 'select')
order by 1, 2, 3;

-- name: may_see_outdated
-- Whether this role may ask which captures are outdated. Some revisions have no such function.
select coalesce(has_function_privilege(to_regprocedure('rowcast.outdated_captures()'), 'execute'), false);

-- name: outdated
select o.name, o.problem, o.place from rowcast.outdated_captures() as o order by 1, 2, 3;

-- name: expressions
-- What the topics and rights of each watched table are worked out from, as a query that reads no row.
select format('%I.%I', w.schema_name, w.table_name) as name,
       format('select (%s), (%s), (%s) from %I.%I as r', w.topic, coalesce(w.revokes, 'null'), coalesce(p.prosrc, 'null'),
              w.schema_name, w.table_name) as text
from rowcast.watched as w
left join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = 'may_read_' || w.id and p.pronargs = 2
join pg_namespace as n on n.nspname = w.schema_name
join pg_class as c on c.relnamespace = n.oid and c.relname = w.table_name
where w.function_name is not null
order by 1;

-- name: has_own_tables
-- Whether there are any for this role to see. Some revisions have none.
select coalesce(has_table_privilege(to_regclass('rowcast.own_tables'), 'select'), false);

-- name: rights_of_own_tables
-- The tables that are served without a pack, and whether the function for the right is not what rowcast.serve() made.
select format('%I.%I', w.schema_name, w.table_name) as name, format('rowcast.%I', 'may_read_' || w.id) as place, case
           when p.oid is null then 'right_missing'
           when not p.prosecdef or rowcast.definition_of(p.prosrc, p.proconfig) is distinct from o.definition then 'right_altered' end as problem
from rowcast.own_tables as o
join rowcast.watched as w on w.id = o.watch and w.function_name is not null
left join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = 'may_read_' || w.id and p.pronargs = 2
order by 1;

-- name: may_see_daemons
-- Whether this role may ask which roles are those of daemons. Some revisions have no such function.
select coalesce(has_function_privilege(to_regprocedure('rowcast.daemons()'), 'execute'), false);

-- name: daemons
-- The roles of daemons.
select d.daemon::oid as role from rowcast.daemons() as d (daemon);

-- name: lacking_rights
-- What roles lack of what a daemon needs. $1 the roles, null for that of this session; $2 the schemas of the packs that they
-- serve, and $3 the functions that they call there.
select d.daemon::regrole::text as role, string_agg(format('%s on %s', right_, r.name), ', ' order by r.name, right_) as lacks
from unnest(coalesce($1::oid [], array[quote_ident(current_user)::regrole::oid])) as d (daemon)
cross join (
    select * from rowcast.rights_of_daemons()
    union all select 'schema', n.nspname::text, '{usage}' from pg_namespace as n where n.nspname = 'rowcast' or n.nspname = any ($2::text [])
    union all
    select 'function', p.oid::regprocedure::text, '{execute}'
    from unnest($3::text []) as f (name)
    join pg_proc as p on p.pronamespace = to_regnamespace(split_part(f.name, '.', 1)) and p.proname = split_part(f.name, '.', 2)
) as r
cross join unnest(r.rights) as right_
where not case r.kind
    when 'table' then has_table_privilege(d.daemon, r.name, right_)
    when 'sequence' then has_sequence_privilege(d.daemon, r.name, right_)
    when 'schema' then has_schema_privilege(d.daemon, r.name, right_)
    else has_function_privilege(d.daemon, r.name, right_) end
group by 1 order by 1;

-- name: readers
-- How to call the functions that read watched tables, for no row and nobody, if this role may.
select format('%I.%I', w.schema_name, w.table_name) as name, f.kind, format(f.call, p.oid::regproc) as statement
from rowcast.watched as w
cross join lateral (values
    ('right', 'may_read_' || w.id, 'select %s('''', '''')'),
    ('snapshot', to_jsonb(w) ->> 'snapshot_name', 'select from %s('''', 0)')
) as f (kind, function_name, call)
join pg_proc as p on p.pronamespace = 'rowcast'::regnamespace and p.proname = f.function_name and p.pronargs = 2
where w.function_name is not null and has_function_privilege(p.oid, 'execute')
order by 1, 2;

-- name: expression_session
-- The path of the capture functions. Whoever changes a table that is read here makes nobody wait for long.
set local search_path = pg_catalog, pg_temp;
set local lock_timeout = '100ms';

-- name: uncaptured
-- Those of the schemas in which no table is captured.
-- $1 schemas, text[]
select s.name as schema_name from unnest($1::text []) as s (name)
where not exists (select from rowcast.watched as w where w.schema_name = s.name and w.function_name is not null)
order by s.name;

-- name: index_scans
-- $1 schemas, text[]
select format('%I.%I', s.schemaname, s.relname) as table_name, s.indexrelname::text as index_name, s.idx_scan as scans
from pg_stat_user_indexes as s where s.schemaname = any ($1::text []) and s.idx_scan is not null;

-- name: trigger_executions
-- Only what the server counts: nothing, unless track_functions is `pl` or `all`.
-- $1 schemas, text[]
select format('%I.%I', w.schema_name, w.table_name) as table_name, s.calls
from rowcast.watched as w
join pg_stat_user_functions as s on s.schemaname = 'rowcast' and s.funcname = w.function_name
where w.schema_name = any ($1::text []);

-- name: count_watched
select count(*) from rowcast.watched where function_name is not null;

-- name: reset_table
-- Resets every topic of the pack whose table this is, and ends the rights that its rows give: nobody knows what became
-- of them. Returns the pack.
-- $1 table text, qualified and quoted where SQL requires it
with noted as (
    insert into rowcast.events (watch, topic, kind, key, actor, revokes)
    select w.id, '*' || w.pack, 'lost', '{}', 'reset', case when w.revokes is not null then '{}'::jsonb end
    from rowcast.watched as w where format('%I.%I', w.schema_name, w.table_name) = $1
    returning watch
)
select w.pack, rowcast.ring() from noted as n join rowcast.watched as w on w.id = n.watch;

-- name: reset_vanished
-- The watched tables whose rows changed while a capture trigger did not stand; their packs are reset.
select table_name from rowcast.reset_vanished() as r (table_name);

-- name: reset_altered
-- The watched tables whose rows read otherwise than they were sent; their packs are reset.
select table_name from rowcast.reset_altered() as r (table_name);

-- name: reset_topic
-- Resets one topic. Returns nothing unless the pack has a watched table. The schema rowcast stands for the tables that are
-- served without a pack.
-- $1 pack's schema text   $2 topic text
with noted as (
    insert into rowcast.events (watch, topic, kind, key, actor)
    select w.id, $2, 'lost', '{}', 'reset'
    from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
    where case when $1 = 'rowcast' then rowcast.is_covered($2, o.topics) else w.schema_name = $1 and o.watch is null end
    order by w.id limit 1
    returning watch
)
select w.pack, rowcast.ring() from noted as n join rowcast.watched as w on w.id = n.watch;

-- name: written
-- The tables that this transaction has locked for more than reading, and those that they are partitions of: no other can
-- have changed.
with locked as (
    select l.relation as oid from pg_locks as l
    where l.locktype = 'relation' and l.pid = pg_backend_pid() and l.mode not in ('AccessShareLock', 'RowShareLock')
      and l.database = (select d.oid from pg_database as d where d.datname = current_database())
)
select l.oid from locked as l
union select p.relid::oid from locked as l cross join lateral pg_partition_ancestors(l.oid) as p;

-- name: tables
-- The tables of some schemas, with a statement that counts the rows, and the numbers of rows that this transaction has
-- inserted and deleted so far. The session may have reported these of earlier transactions late, so compare two readings.
-- $1 schemas, text[]   $2 only these tables, oid[], or null
select format('%I.%I', n.nspname, c.relname) as name,
       format('select count(*) from %I.%I', n.nspname, c.relname) as count_rows,
       m.inserted, m.deleted
from pg_class as c
join pg_namespace as n on n.oid = c.relnamespace
cross join lateral (
    select sum(pg_stat_get_xact_tuples_inserted(p.oid))::bigint as inserted,
           sum(pg_stat_get_xact_tuples_deleted(p.oid))::bigint as deleted
    from (select c.oid union select t.relid from pg_partition_tree(c.oid) as t) as p (oid)
) as m
where n.nspname = any ($1::text []) and c.relkind in ('r', 'p') and not c.relispartition and c.relname <> 'alembic_version'
  and ($2::oid [] is null or c.oid = any ($2))
order by 1;

-- name: unvalidated
-- The constraints that existing rows may violate, except those that are not meant to be enforced.
-- $1 schemas, text[]
select format('%I.%I', n.nspname, c.relname) as name, quote_ident(k.conname) as constraint_name
from pg_constraint as k
join pg_class as c on c.oid = k.conrelid
join pg_namespace as n on n.oid = c.relnamespace
where n.nspname = any ($1::text []) and not k.convalidated and to_jsonb(k) ->> 'conenforced' is distinct from 'false'
order by 1, 2;

-- name: references
-- The foreign keys from or to tables of some schemas, with a statement that counts the rows that refer to none.
-- $1 schemas, text[]   $2 only from or to these tables, oid[], or null
select format('%I.%I', n.nspname, c.relname) as name, quote_ident(k.conname) as constraint_name,
       format('select count(*) from %s as r where %s and not exists (select from %s as p where %s)',
              k.conrelid::regclass, f.not_null, k.confrelid::regclass, f.equal) as count_orphans
from pg_constraint as k
join pg_class as c on c.oid = k.conrelid
join pg_namespace as n on n.oid = c.relnamespace
join pg_class as t on t.oid = k.confrelid
join pg_namespace as tn on tn.oid = t.relnamespace
cross join lateral (
    select string_agg(format('r.%I is not null', a.attname), ' and ') as not_null,
           string_agg(format('p.%I operator(%I.%s) r.%I', b.attname, s.nspname, o.oprname, a.attname), ' and ') as equal
    from rows from (unnest(k.conkey), unnest(k.confkey), unnest(k.conpfeqop)) as u (from_column, to_column, equals)
    join pg_attribute as a on (a.attrelid, a.attnum) = (k.conrelid, u.from_column)
    join pg_attribute as b on (b.attrelid, b.attnum) = (k.confrelid, u.to_column)
    join pg_operator as o on o.oid = u.equals
    join pg_namespace as s on s.oid = o.oprnamespace
) as f
where k.contype = 'f' and k.conparentid = 0 and (n.nspname = any ($1::text []) or tn.nspname = any ($1::text []))
  and coalesce(to_jsonb(k) ->> 'conenforced', 'true') = 'true' and coalesce(to_jsonb(k) ->> 'conperiod', 'false') = 'false'
  and ($2::oid [] is null or k.conrelid = any ($2) or k.confrelid = any ($2))
order by 1, 2;

-- name: settle_constraints
-- Checks what was deferred, as the end of a transaction does, and defers again what is deferred from the start. Tables
-- with pending checks could not be altered by the next file.
set constraints all immediate;
do $$
declare
    deferred constant text := (
        select string_agg(format('%I.%I', n.nspname, k.conname), ', ')
        from pg_constraint as k join pg_namespace as n on n.oid = k.connamespace
        where k.condeferred and not exists (
            select from pg_constraint as o
            where (o.connamespace, o.conname) = (k.connamespace, k.conname) and not o.condeferrable
        )
    );
begin
    if deferred is not null then
        execute 'set constraints ' || deferred || ' deferred';
    end if;
end
$$;

-- name: can_serve
-- Whether triggers/rowcast.sql has run: an installation may have failed between the revisions and it.
select to_regproc('rowcast.serve') is not null;

-- name: serve
-- $1 table   $2 topic   $3 who may read it   $4 columns   $5 key   $6 soft delete   $7 revokes   $8 rows   $9 topics
select rowcast.serve($1::text::regclass, $2, $3, $4, $5, $6, $7, $8, $9);

-- name: find_table
-- A table as SQL writes it, and the pack that watches it if there is one.
-- $1 table text
select format('%I.%I', n.nspname, c.relname) as name, w.pack, o.watch is not null as is_own
from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
left join rowcast.watched as w on (w.schema_name, w.table_name) = (n.nspname, c.relname) and w.function_name is not null
left join rowcast.own_tables as o on o.watch = w.id
where c.oid = to_regclass($1);

-- name: find_gone
-- A watched table that has no table of its name any more, as SQL writes it, and the pack that watches it.
-- $1 table text
select format('%I.%I', w.schema_name, w.table_name) as name, w.pack, o.watch is not null as is_own
from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
where w.function_name is not null and parse_ident($1) = array[w.schema_name::text, w.table_name::text];

-- name: unwatch
-- $1 table, as find_table and find_gone return it
select rowcast.stop_capturing(w) from rowcast.watched as w
where w.function_name is not null and format('%I.%I', w.schema_name, w.table_name) = $1;

-- name: find_function
-- Whether there is a function of this name that says who may read what.
-- $1 name
select to_regprocedure($1 || '(text, text)')::text;

-- name: watches
select format('%I.%I', w.schema_name, w.table_name) as name, w.pack, w.topic, o.topics, w.columns::text [] as columns,
       w.key::text [] as key, w.soft_delete::text as soft_delete, o.readable, w.revokes,
       to_char(o.since at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as since
from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
where w.function_name is not null
order by 1;
