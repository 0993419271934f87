-- Postgres cannot remove a label from an enumeration, so the type is made anew. Events that only this revision knows
-- become `lost`, which resets every topic of the pack.
drop view rowcast.changes;
drop view rowcast.contents;

alter table rowcast.events drop column bytes;

update rowcast.events as e set kind = 'lost', topic = '*' || w.pack
from rowcast.watched as w where w.id = e.watch and e.kind = 'limit';
delete from rowcast.dead_letters where kind = 'limit';

alter type rowcast.kind rename to kind_with_limit;
create type rowcast.kind as enum ('insert', 'update', 'delete', 'restore', 'leave', 'truncate', 'lost');
alter table rowcast.events alter column kind type rowcast.kind using kind::text::rowcast.kind;
alter table rowcast.dead_letters alter column kind type rowcast.kind using kind::text::rowcast.kind;
drop type rowcast.kind_with_limit;

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
