drop view rowcast.changes;
drop view rowcast.contents;

alter table rowcast.log drop column tx_bytes;

-- The events with the names of their tables, in a readable form. Times are RFC 3339 in UTC.
create view rowcast.contents as
select e.xid, e.id, e.xid::text as tx, to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, w.model, e.topic, e.kind::text as kind, e.key::text as key, e.record::text as record,
       e.changed, e.actor,
       e.revokes is not null as revokes, e.revokes ->> 'user' as revokes_user, e.revokes ->> 'topic' as revokes_topic,
       e.watch
from rowcast.events as e
cross join lateral (select o.* from rowcast.watched as o where o.id = e.watch offset 0) as w;

-- The log joined with its events, for the daemon and for people in psql. Earlier changes of a deleted row have no
-- content. `offset 0` makes the planner look up each event by itself: otherwise it may scan all events for each log entry.
create view rowcast.changes as
select l.seq, l.tx_end, e.tx, e.at, e.schema_name, e.table_name, e.model, l.topic, e.kind, e.key,
       case when not exists (
           select from rowcast.tombstones as t where t.watch = e.watch and t.key = e.key and t.seq > l.seq
       ) then e.record end as record,
       e.changed, e.actor, e.revokes, e.revokes_user, e.revokes_topic
from rowcast.log as l
cross join lateral (select c.* from rowcast.contents as c where c.xid = l.xid and c.id = l.event_id offset 0) as e;

revoke all on rowcast.contents, rowcast.changes from public;

alter table rowcast.events replica identity default;
alter table rowcast.grants replica identity default;
do $$
declare
    relation regclass;
begin
    for relation in select i.inhrelid::regclass from pg_inherits as i where i.inhparent = 'rowcast.events'::regclass loop
        execute format('alter table %s replica identity default', relation);
    end loop;
end
$$;

-- Makes the next segment ahead of its use. Its tables are created on their own and attached, since `create table ...
-- partition of` would lock out all writers.
create or replace function rowcast.make_segment() returns integer
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    n constant integer := coalesce((select max(s.segment) + 1 from rowcast.segments as s), 0);
begin
    execute format('create table rowcast.%I (like rowcast.events including all)', 'events_' || n);
    execute format('create table rowcast.%I (like rowcast.log including all)', 'log_' || n);
    execute format('alter table rowcast.events attach partition rowcast.%I for values from (%s) to (%s)', 'events_' || n,
                   n::bigint << 40, (n + 1)::bigint << 40);
    execute format('alter table rowcast.log attach partition rowcast.%I for values from (%s) to (%s)', 'log_' || n,
                   n::bigint << 32, (n + 1)::bigint << 32);
    insert into rowcast.segments (segment) values (n);
    return n;
end
$$;

-- Marks segments that were closed more than `keep` ago. Their tables are detached and dropped afterwards: readers check
-- the floor after reading, so they notice. A segment's events are dropped only once every log segment that numbers them
-- is dropped too: the events of a long transaction get their numbers in a later segment.
create or replace function rowcast.retire_segments(keep interval) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    update rowcast.segments as s set log_dropped = true
    where not s.log_dropped and s.closed_xid is not null and exists (
        select from rowcast.segments as n where n.segment = s.segment + 1 and n.opened_at < now() - keep
    );
    update rowcast.segments as s set events_dropped = true
    where s.log_dropped and not s.events_dropped and exists (
        select from rowcast.segments as n
        where n.segment >= s.segment and n.log_dropped and n.numbered_xid >= s.closed_xid
    );
    delete from rowcast.grants as g where g.seq <= rowcast.log_floor();
    delete from rowcast.terms as t
    where t.term < (select max(o.term) from rowcast.terms as o where o.base <= rowcast.log_floor());
    delete from rowcast.segments as s
    where s.events_dropped and s.last_seq < rowcast.log_floor()
      and to_regclass(format('rowcast.%I', 'events_' || s.segment)) is null
      and to_regclass(format('rowcast.%I', 'log_' || s.segment)) is null;
end
$$;
