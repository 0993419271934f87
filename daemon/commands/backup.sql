-- The statements of `daemon backup` and `daemon restore`, by name.

-- name: roles
-- A statement that creates the roles that this database's objects refer to, as owners or in privileges, where they are
-- missing; null if there are none. It gives them no passwords and no attributes but LOGIN and INHERIT, and leaves roles
-- that exist as they are. Objects of the superuser that initdb created are not in pg_shdepend, hence the other sources.
with used as (
    select d.refobjid as oid
    from pg_catalog.pg_shdepend as d
    where d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass
      and d.dbid = (select b.oid from pg_catalog.pg_database as b where b.datname = pg_catalog.current_database())
    union select c.relowner from pg_catalog.pg_class as c where c.oid >= 16384
    union select p.proowner from pg_catalog.pg_proc as p where p.oid >= 16384
    union select t.typowner from pg_catalog.pg_type as t where t.oid >= 16384
    union select n.nspowner from pg_catalog.pg_namespace as n where n.oid >= 16384
), roles as (
    select r.oid, r.rolname as name, r.rolcanlogin as logs_in, r.rolinherit as inherits
    from pg_catalog.pg_roles as r join used on used.oid = r.oid
    where r.rolname !~ '^pg_'
), members as (
    select g.name as role, r.name as member
    from pg_catalog.pg_auth_members as m join roles as g on g.oid = m.roleid join roles as r on r.oid = m.member
)
select pg_catalog.format('do %L;', pg_catalog.format($body$
declare
    r record;
    created text [] := '{}';
begin
    for r in
        select * from (values %s) as wanted (name, logs_in, inherits)
        where not exists (select from pg_catalog.pg_roles as o where o.rolname = wanted.name)
    loop
        execute format('create role %%I %%s %%s', r.name, case when r.logs_in then 'login' else 'nologin' end,
                       case when r.inherits then 'inherit' else 'noinherit' end);
        created := created || r.name;
    end loop;
    for r in
        select * from (values %s) as wanted (role, member)
        where wanted.role = any (created) or wanted.member = any (created)
    loop
        execute format('grant %%I to %%I', r.role, r.member);
    end loop;
end
$body$,
    (select pg_catalog.string_agg(
         pg_catalog.format('(%L, %L::boolean, %L::boolean)', o.name, o.logs_in, o.inherits), ', ' order by o.name
     ) from roles as o),
    coalesce((select pg_catalog.string_agg(
         pg_catalog.format('(%L, %L)', m.role, m.member), ', ' order by m.role, m.member
     ) from members as m), '(null::text, null::text)')
))
from roles as one limit 1;

-- name: contents
-- What a database holds that a new one does not: up to three descriptions.
select d.what
from (
    select 1 as n, pg_catalog.format('schema %I', s.nspname) as what
    from pg_catalog.pg_namespace as s
    where s.nspname !~ '^pg_' and s.nspname not in ('public', 'information_schema')
    union all
    select 2, pg_catalog.pg_describe_object(o.classid, o.objid, o.objsubid)
    from pg_catalog.pg_depend as o
    where o.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
      and o.refobjid = (select s.oid from pg_catalog.pg_namespace as s where s.nspname = 'public')
    union all
    select 3, pg_catalog.format('extension %I', e.extname) from pg_catalog.pg_extension as e where e.extname <> 'plpgsql'
    union all
    select 4, pg_catalog.format('publication %I', p.pubname) from pg_catalog.pg_publication as p
    union all
    select 5, pg_catalog.format('event trigger %I', t.evtname) from pg_catalog.pg_event_trigger as t
    union all
    select 6, 'large objects' where exists (select from pg_catalog.pg_largeobject_metadata)
) as d
order by d.n, d.what
limit 3;

-- name: clear
-- Makes the database as empty as a new one. What nobody gives up within the timeout stops the restore.
set local lock_timeout = '10s';
do $$
declare
    r record;
begin
    for r in select t.evtname as name from pg_catalog.pg_event_trigger as t loop
        execute format('drop event trigger %I', r.name);
    end loop;
    for r in select p.pubname as name from pg_catalog.pg_publication as p loop
        execute format('drop publication %I', r.name);
    end loop;
    for r in select e.extname as name from pg_catalog.pg_extension as e where e.extname <> 'plpgsql' loop
        execute format('drop extension if exists %I cascade', r.name);
    end loop;
    for r in
        select s.nspname as name from pg_catalog.pg_namespace as s
        where s.nspname !~ '^pg_' and s.nspname <> 'information_schema'
    loop
        execute format('drop schema %I cascade', r.name);
    end loop;
    perform pg_catalog.lo_unlink(l.oid) from pg_catalog.pg_largeobject_metadata as l;
    create schema public;
    comment on schema public is 'standard public schema';
    grant usage on schema public to public;
    if current_setting('server_version_num')::integer >= 150000 then
        alter schema public owner to pg_database_owner;
    else
        grant create on schema public to public;
    end if;
end
$$;

-- name: forget_log
-- The log's transaction ids mean nothing in another cluster: its events would be taken for new ones, or wait for ever.
-- Clients get a reset in any case, and read the state again.
do $$
declare
    log_tables constant text := (
        select string_agg('rowcast.' || n, ', ')
        from unnest('{events, log, batches, tombstones, grants, set_aside, presence_leases, people}'::text []) as u (n)
        where to_regclass('rowcast.' || n) is not null
    );
begin
    if log_tables is null then
        return;
    end if;
    execute 'truncate ' || log_tables;
    update rowcast.segments as s set closed_xid = '3', numbered_xid = '3' where s.closed_xid is not null;
end
$$;
