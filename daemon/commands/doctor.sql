-- The statements of `daemon doctor`, by name. They read and change nothing.

-- name: session
-- This session, its role, its database, and how many connections there may be. pg_stat_database counts those of all
-- roles, whatever this one may see.
select current_database() as database, current_user as role, current_setting('server_version') as version,
       pg_backend_pid() as pid,
       r.rolsuper as superuser,
       concat_ws(', ', case when r.rolcreaterole then 'CREATEROLE' end, case when r.rolcreatedb then 'CREATEDB' end,
                 case when r.rolreplication then 'REPLICATION' end, case when r.rolbypassrls then 'BYPASSRLS' end) as attributes,
       r.rolconnlimit as role_limit, d.datconnlimit as database_limit,
       current_setting('max_connections')::integer as max_connections,
       current_setting('superuser_reserved_connections')::integer
           + coalesce(nullif(current_setting('reserved_connections', true), '')::integer, 0) as reserved,
       (select coalesce(sum(s.numbackends), 0)::integer from pg_stat_database as s) as used,
       to_regnamespace('rowcast') is not null as installed
from pg_roles as r
cross join pg_database as d
where r.rolname = current_user and d.datname = current_database();

-- name: clock
select clock_timestamp() as now;

-- name: ownership
-- Whether this role owns the log, or inherits from its owner; and whether it was let serve.
select pg_has_role(current_user, c.relowner, 'usage') as owns_log, o.rolname as owner,
       coalesce(has_function_privilege(to_regprocedure('rowcast.rights_of_daemons()'), 'execute'), false) as may_serve
from pg_class as c join pg_roles as o on o.oid = c.relowner where c.oid = 'rowcast.log'::regclass;

-- name: lacking
-- What a daemon needs and this role does not have.
select right_ || ' on ' || r.name as lacks
from rowcast.rights_of_daemons() as r cross join unnest(r.rights) as right_
where not case r.kind
    when 'table' then has_table_privilege(r.name, right_)
    when 'sequence' then has_sequence_privilege(r.name, right_)
    else has_function_privilege(r.name, right_) end
order by 1;

-- name: not_callable
-- The schemas of packs whose function may_read this role may not call; those that do not have it are left out.
-- $1 schemas text[]
select n.nspname as schema_name
from pg_namespace as n join pg_proc as p on p.pronamespace = n.oid and p.proname = 'may_read' and p.pronargs = 2
where n.nspname = any ($1::text [])
  and not (has_schema_privilege(current_user, n.oid, 'usage') and has_function_privilege(current_user, p.oid, 'execute'));

-- name: capture_role
-- Whether the role of the capture functions exists, and passes row security.
select r.rolbypassrls as passes_row_security from pg_roles as r where r.rolname = 'rowcast_capture';

-- name: log
-- How the log stands. A segment is late if it should have been dropped for longer than it took to fill.
-- $1 retention interval
select rowcast.lease_holder() is not null as led,
       exists (select from rowcast.terms) as used,
       (select count(*) from rowcast.segments as s where s.opened_at is null) as ahead,
       (
           select count(*) from rowcast.segments as s join rowcast.segments as n on n.segment = s.segment + 1
           where not s.events_dropped and n.opened_at < clock_timestamp() - 1.5 * $1::interval
       ) as late,
       pg_size_pretty((
           select sum(pg_total_relation_size(c.oid)) from pg_class as c
           where c.relnamespace = to_regnamespace('rowcast') and c.relkind = 'r'
       )) as size,
       (select count(*) from rowcast.dead_letters) as dead_letters,
       (select max(d.at) from rowcast.dead_letters as d) as newest_dead_letter;
