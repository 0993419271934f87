-- What daemon/postgres/ddl.py asks and tells the server, by name. It puts a schema where `the_schema` stands.

-- name: current
select version_num from the_schema.alembic_version;

-- name: lock_holder
-- $1 the lock's key, bigint
select a.pid, a.usename::text as user_name, a.application_name, a.state, null::int as seconds
from pg_catalog.pg_locks as l
join pg_catalog.pg_stat_activity as a on a.pid = l.pid
join pg_catalog.pg_database as d on d.oid = l.database
where l.locktype = 'advisory' and l.granted and d.datname = pg_catalog.current_database()
  and (l.classid::bigint << 32 | l.objid::bigint) = $1 and l.objsubid = 1;

-- name: blockers
-- What they run is not asked: it may hold values of rows.
-- $1 the process that waits
select a.pid, a.usename::text as user_name, a.application_name, a.state,
       extract(epoch from pg_catalog.clock_timestamp() - a.xact_start)::int as seconds
from pg_catalog.pg_stat_activity as a
where a.pid = any (pg_catalog.pg_blocking_pids($1))
order by a.xact_start;

-- name: make_schema
-- A schema that was there before is not Rowcast's to drop: the comment tells a rollback which one it is.
do $$
begin
    if pg_catalog.to_regnamespace('the_schema') is null then
        create schema the_schema;
        comment on schema the_schema is 'Created by Rowcast.';
    end if;
end
$$;

-- name: forget_captures
-- Tables that went take their triggers with them, but not the functions of these triggers.
do $$
begin
    if pg_catalog.to_regprocedure('rowcast.unwatch_dropped()') is not null then
        perform rowcast.unwatch_dropped();
    end if;
end
$$;

-- name: leave
-- When nothing of a pack is left: its extensions (only those that Rowcast created, and no other pack wants), its
-- version table, and its schema, if Rowcast created that and nobody put anything into it.
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
            raise warning 'schema the_schema stays: it holds what Rowcast did not put there';
        end;
    end if;
end
$$;

-- name: histories
-- Which schemas hold a history of revisions.
select n.nspname::text as schema_name
from pg_catalog.pg_class as c join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
where c.relname = 'alembic_version' and c.relkind = 'r' and n.nspname <> 'rowcast'
order by n.nspname;

-- name: watched
-- Tables that are captured outside of the packs' own schemas.
-- $1 these schemas text[]
select pg_catalog.format('%I.%I', w.schema_name, w.table_name) as table_name
from rowcast.watched as w
where w.function_name is not null and w.schema_name <> all ($1::text [])
order by 1;
