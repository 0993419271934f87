-- The daemon's statements, by name. daemon/postgres/queries.py reads this file.

-- name: lead
-- One leader per database. The lock belongs to the connection that numbers: when it dies, so does the right.
-- $1 lock bigint
select pg_try_advisory_lock($1);

-- name: open_term
select term, epoch, base, snapshot::text as snapshot from rowcast.open_term();

-- name: number_events
-- New are the events of transactions that were not visible in the last snapshot and are in this one: those past
-- its xmax, and those that were in progress. Rows, numbers and the new snapshot come from one statement, so from
-- one snapshot. Transactions go by the largest event id each holds, which keeps the versions of a row in order;
-- inside one, a topic's events stand together, so that its frame ends at a place from where one can resume.
-- Writes nothing under a leader of a newer term.
-- $1 term bigint   $2 last seq bigint   $3 xmax text (xid8)   $4 xip text[] (xid8)
with fresh as materialized (
    select e.id, e.xid, e.topic from rowcast.events as e
    where (e.xid >= $3::text::xid8 or e.xid = any ($4::text []::xid8 []))
      and not exists (select from rowcast.terms as t where t.term > $1)
), grouped as (
    select f.id, f.topic,
           max(f.id) over (partition by f.xid) as tx,
           min(f.id) over (partition by f.xid, f.topic) as tx_topic
    from fresh as f
), numbered as (
    select $2::bigint + row_number() over (order by g.tx, g.tx_topic, g.id) as seq,
           $2::bigint + count(*) over (order by g.tx) as tx_end,
           g.id, g.topic
    from grouped as g
), logged as (
    insert into rowcast.log (seq, tx_end, event_id, topic)
    select n.seq, n.tx_end, n.id, n.topic from numbered as n
    returning seq
), batch as (
    insert into rowcast.batches (last_seq, term, snapshot)
    select max(l.seq), $1, pg_current_snapshot() from logged as l having count(*) > 0
)
select pg_current_snapshot()::text as snapshot, count(*) as numbered, coalesce(max(l.seq), $2::bigint) as last_seq,
       exists (select from rowcast.terms as t where t.term > $1) as superseded
from logged as l;

-- name: forget_batches
-- Only the newest snapshot is ever needed.
-- $1 last seq bigint
delete from rowcast.batches where last_seq < $1;

-- name: head
-- A term without events stands at its base.
select t.epoch, greatest(t.base, (select max(l.seq) from rowcast.log as l)) as seq
from rowcast.terms as t order by t.term desc limit 1;

-- name: changes
-- $1 after seq bigint   $2 most bigint
select * from rowcast.changes where seq > $1 order by seq limit $2;

-- name: changes_of_topics
-- Topic by topic, and at most so many of each: whatever the planner believes, it reads no more of the index.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[]   $4 most bigint
with chunk as materialized (
    select c.seq from unnest($3::text []) as t (topic)
    cross join lateral (
        select l.seq from rowcast.log as l
        where l.topic = t.topic and l.seq > $1 and l.seq <= $2 order by l.seq limit $4
    ) as c
    order by c.seq limit $4
)
select c.* from chunk join rowcast.changes as c using (seq) order by c.seq;

-- name: rest_of_transaction
-- What a chunk has cut off. Both ends are given, so the planner knows how little that is.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[], null for all
select * from rowcast.changes
where seq > $1 and seq <= $2 and ($3::text [] is null or topic = any ($3)) order by seq;

-- name: continuity
-- The term that a position lies in, and how far that term's numbers are on record. A position beyond that was
-- given out and lost in a crash, or never given out at all.
-- $1 seq bigint
select
    (select t.epoch from rowcast.terms as t order by t.term desc limit 1) as epoch,
    (select greatest(mine.base, (
            select max(l.seq) from rowcast.log as l
            where l.seq < coalesce((select min(n.base) from rowcast.terms as n where n.term > mine.term), 9223372036854775807)))
     from rowcast.terms as mine where mine.base <= $1 order by mine.term desc limit 1) as recorded_end;

-- name: bury
-- Every daemon reads the log and meets the same invalid change; one letter is enough.
-- $1 seq bigint   $2 pack text   $3 reason text
insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
select c.seq, $2, c.schema_name, c.table_name, c.topic, c.kind::rowcast.kind, c.key::json, c.record::json, $3
from rowcast.changes as c where c.seq = $1
on conflict do nothing;

-- name: in_recovery
select pg_is_in_recovery();

-- name: beat
-- Proves the path from NOTIFY to this listener. Asking for the queue's usage also frees what nobody needs any
-- more: a queue that was full stays so until somebody asks.
-- $1 channel text
select pg_notify($1, ''), pg_notification_queue_usage() as usage;

-- name: tell
-- The leader wakes the other daemons. A transaction of its own, that nobody waits for.
select pg_notify('rowcast_log', '');
