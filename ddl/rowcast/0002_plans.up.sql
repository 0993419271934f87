-- The events with the names of their tables, in a readable form. Times are RFC 3339 in UTC.
create or replace view rowcast.contents as
select e.xid, e.id, e.xid::text as tx, to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, w.model, e.topic, e.kind::text as kind, e.key::text as key, e.record::text as record,
       e.changed, e.actor,
       e.revokes is not null as revokes, e.revokes ->> 'user' as revokes_user, e.revokes ->> 'topic' as revokes_topic,
       e.watch
from rowcast.events as e
cross join lateral (select o.* from rowcast.watched as o where o.id = e.watch offset 0) as w;

-- The log joined with its events, for the daemon and for people in psql. Earlier changes of a deleted row have no
-- content. `offset 0` makes the planner look up each event by itself: otherwise it may scan all events for each log entry.
create or replace view rowcast.changes as
select l.seq, l.tx_end, e.tx, e.at, e.schema_name, e.table_name, e.model, l.topic, e.kind, e.key,
       case when not exists (
           select from rowcast.tombstones as t where t.watch = e.watch and t.key = e.key and t.seq > l.seq
       ) then e.record end as record,
       e.changed, e.actor, e.revokes, e.revokes_user, e.revokes_topic
from rowcast.log as l
cross join lateral (select c.* from rowcast.contents as c where c.xid = l.xid and c.id = l.event_id offset 0) as e;

-- Removes the content of earlier events and dead letters of deleted rows, then the rows' tombstones. The lock keeps dead
-- letters with that content from being stored meanwhile, and the statements after it see all that are stored.
-- One event at a time, since the planner may turn a join into a scan of all events.
create or replace function rowcast.purge(most integer, out rows bigint, out emptied bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    stone record;
    place record;
    count bigint;
begin
    lock table rowcast.dead_letters in share row exclusive mode;
    rows := 0;
    emptied := 0;
    for stone in select t.watch, t.key, t.seq from rowcast.tombstones as t order by t.seq limit most loop
        for place in
            select l.xid, l.event_id from rowcast.log as l
            where l.row_hash = hashtextextended(stone.key, stone.watch) and l.seq < stone.seq
        loop
            update rowcast.events as e set record = null
            where e.xid = place.xid and e.id = place.event_id
              and e.watch = stone.watch and e.key::text = stone.key and e.record is not null;
            get diagnostics count = row_count;
            emptied := emptied + count;
        end loop;
        update rowcast.dead_letters as d set record = null
        from rowcast.watched as w
        where w.id = stone.watch and (d.schema_name, d.table_name) = (w.schema_name, w.table_name)
          and d.key::text = stone.key and d.seq < stone.seq and d.record is not null;
        get diagnostics count = row_count;
        emptied := emptied + count;
        delete from rowcast.tombstones as t where (t.watch, t.key, t.seq) = (stone.watch, stone.key, stone.seq);
        rows := rows + 1;
    end loop;
end
$$;

revoke all on rowcast.contents from public;
