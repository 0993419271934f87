create or replace view rowcast.changes as
select l.seq, l.tx_end, e.xid::text as tx,
       to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, w.model, l.topic, e.kind::text as kind, e.key::text as key,
       case when not exists (
           select from rowcast.tombstones as t where t.watch = e.watch and t.key = e.key::text and t.seq > l.seq
       ) then e.record::text end as record,
       e.changed, e.actor,
       e.revokes is not null as revokes, e.revokes ->> 'user' as revokes_user, e.revokes ->> 'topic' as revokes_topic
from rowcast.log as l
join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
join rowcast.watched as w on w.id = e.watch;

drop view rowcast.contents;

create or replace function rowcast.purge(most integer, out rows bigint, out emptied bigint)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    lock table rowcast.dead_letters in share row exclusive mode;
    with stone as materialized (
        select t.watch, t.key, t.seq from rowcast.tombstones as t order by t.seq limit most
    ), event as (
        update rowcast.events as e set record = null
        from stone as s
        join rowcast.log as l on l.row_hash = hashtextextended(s.key, s.watch) and l.seq < s.seq
        where e.xid = l.xid and e.id = l.event_id
          and e.watch = s.watch and e.key::text = s.key and e.record is not null
        returning 1
    ), letter as (
        update rowcast.dead_letters as d set record = null
        from stone as s join rowcast.watched as w on w.id = s.watch
        where (d.schema_name, d.table_name) = (w.schema_name, w.table_name)
          and d.key::text = s.key and d.seq < s.seq and d.record is not null
        returning 1
    ), forgotten as (
        delete from rowcast.tombstones as t using stone as s
        where (t.watch, t.key, t.seq) = (s.watch, s.key, s.seq)
        returning 1
    )
    select (select count(*) from forgotten), (select count(*) from event) + (select count(*) from letter)
    into purge.rows, purge.emptied;
end
$$;
