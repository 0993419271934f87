-- The statements on the log, by name. See daemon/postgres/queries.py.

-- name: lease_holder
-- The term that leads; null if none does.
select rowcast.lease_holder();

-- name: renew_lease
-- Also looks whether the log is still the one that this leader wrote: its term and what it last numbered are there.
-- $1 nonce uuid   $2 length interval   $3 a number on record bigint
with renewed as (
    update rowcast.lease as l
    set renewed_at = clock_timestamp(), expires_at = clock_timestamp() + $2, xid = pg_current_xact_id()
    where l.nonce = $1 and l.xmin = l.xid::xid
    returning l.nonce
)
select exists (select from renewed) as leads,
       rowcast.on_record($3) and exists (select from rowcast.terms as t where t.nonce = $1 and t.xmin = t.xid::xid) as intact;

-- name: release_lease
-- Commits synchronously: after this no number of the term can be lost.
-- $1 nonce uuid
update rowcast.lease as l
set renewed_at = clock_timestamp(), expires_at = clock_timestamp(), released = true, xid = pg_current_xact_id()
where l.nonce = $1 and l.xmin = l.xid::xid and set_config('synchronous_commit', 'on', true) is not null;

-- name: share_follower_lock
-- From now on the leader notifies us when the log has grown. It tries to take this lock exclusively for each batch: if
-- it cannot, it notifies; if it can, we get the lock after the batch is committed. Not waited for, since anybody who may
-- connect can take it.
-- $1 lock bigint
select pg_try_advisory_lock_shared($1);

-- name: wait_without_timeout
-- The wakeup lock is waited for as long as a writer's transaction is open. The check keeps a daemon that died from
-- staying in the lock's queue.
set lock_timeout = 0;
set statement_timeout = 0;
set client_connection_check_interval = '1s';

-- name: take_wakeup_lock
-- Granted when every transaction that wrote without notifying has ended.
-- $1 lock bigint
select pg_advisory_lock($1);

-- name: release_wakeup_lock
select pg_advisory_unlock_all();

-- name: leave_segment
select rowcast.leave_segment();

-- name: open_term
-- $1 nonce uuid   $2 nonce that is held uuid   $3 length of the lease interval   $4 open the next segment boolean
-- $5 a term that was seen uuid   $6 a number that was flushed bigint
select term, epoch, base, snapshot::text as snapshot, first_segment from rowcast.open_term($1, $2, $3, $4, $5, $6);

-- name: number_events
-- Numbers the events of transactions that are visible in this snapshot and were not in the last one: those at or past
-- its xmax, and those that were in progress. Rows, numbers and the new snapshot come from one statement, hence from one
-- snapshot. Transactions are ordered by the largest event id of each, which keeps the versions of a row in order.
-- Inside a transaction the events of a topic are adjacent, so a frame always ends at a position that can be resumed.
-- Tombstones and rights that begin are recorded in the same transaction. A right begins at the first change of the
-- transaction that gives it, all of which may be read.
-- Writes nothing unless the lease still names this leader. `fence` locks the lease's row, if there is anything to number:
-- a successor waits for this batch, and one that was faster has changed the nonce, which is checked again on the newest
-- version of the row once the lock is granted.
-- The row without a seq has the totals. The others are the changes as in rowcast.changes, unless there are more than $6
-- or their records have more than $11 bytes, or one of them more than $12.
-- $1 nonce uuid   $2 last seq bigint   $3 xmax text (xid8)   $4 xip text[] (xid8)   $5 first segment integer
-- $6 max changes bigint   $7 lock bigint that every follower shares   $8 term bigint
-- $9 the number bigint past which a commit waits for its flush   $10 only these events bigint[], null for all
-- $11 max bytes bigint   $12 large bytes bigint
with fresh as materialized (
    -- Two index scans: for a single condition with `or`, the planner may scan everything.
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants, coalesce(e.bytes, pg_column_size(e.record), 0) as bytes
    from rowcast.events as e
    where e.xid >= $3::text::xid8 and e.id >= $5::bigint << 40 and ($10::bigint [] is null or e.id = any ($10))
    union all
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants, coalesce(e.bytes, pg_column_size(e.record), 0) as bytes
    from rowcast.events as e
    where e.xid = any ($4::text []::xid8 []) and e.id >= $5::bigint << 40 and ($10::bigint [] is null or e.id = any ($10))
), fence as materialized (
    select from rowcast.lease as l
    where l.nonce = $1 and l.xmin = l.xid::xid and exists (select from fresh) for share of l
), grouped as (
    select f.*, max(f.id) over (partition by f.xid) as tx, min(f.id) over (partition by f.xid, f.topic) as tx_topic,
           sum(f.bytes) over (partition by f.xid) as tx_bytes
    from fresh as f where exists (select from fence)
), numbered as materialized (
    select $2::bigint + row_number() over (order by g.tx, g.tx_topic, g.id) as seq,
           $2::bigint + rank() over (order by g.tx) as tx_begin, $2::bigint + count(*) over (order by g.tx) as tx_end, g.*
    from grouped as g
), totals as materialized (
    select count(*) as changes, count(*) filter (where n.seq = n.tx_end) as transactions,
           coalesce(max(n.seq), $2::bigint) as last_seq,
           coalesce(sum(n.tx_bytes) filter (where n.seq = n.tx_end), 0) as bytes, coalesce(max(n.bytes), 0) as largest,
           count(*) filter (where n.kind = 'delete') > 0 as has_deletes, count(n.grants) > 0 as has_grants
    from numbered as n
), logged as (
    insert into rowcast.log (seq, tx_end, xid, event_id, topic, tx_bytes, row_hash)
    select n.seq, n.tx_end, n.xid, n.id, n.topic, case when n.tx_bytes >= 1048576 then n.tx_bytes end,
           case when n.kind in ('insert', 'update', 'restore', 'delete', 'leave') then hashtextextended(n.key::text, n.watch::bigint) end
    from numbered as n
), batch as (
    insert into rowcast.batches (last_seq, term, snapshot)
    select t.last_seq, $8, pg_current_snapshot() from totals as t where t.changes > 0
), tombstoned as (
    -- Up to where the row's content is hidden. The topics of a transaction follow each other, so its own content may have
    -- any place in it: all of it is hidden, or none if the row was written again after its deletion.
    insert into rowcast.tombstones (watch, key, seq)
    select n.watch, n.key::text,
           case when max(n.id) filter (where n.kind = 'delete') = max(n.id) then max(n.tx_end) + 1 else min(n.tx_begin) end
    from numbered as n
    where (select t.has_deletes from totals as t) and n.kind in ('insert', 'update', 'restore', 'delete')
    group by n.watch, n.tx, n.key::text having bool_or(n.kind = 'delete')
    on conflict do nothing
), granted as (
    insert into rowcast.grants (seq, watch, user_id, topic)
    select n.tx_begin, n.watch, n.grants ->> 'user', n.grants ->> 'topic' from numbered as n where n.grants is not null
)
select pg_current_snapshot()::text as snapshot,
       not case when exists (select from fresh) then exists (select from fence)
           else exists (select from rowcast.lease as l where l.nonce = $1 and l.xmin = l.xid::xid) end as superseded,
       -- Text that the daemon could not read must fail here, where it can be set aside. Only other encodings can hold such.
       (select count(rowcast.is_readable(n.xid, n.id)) from numbered as n
        where current_setting('server_encoding') <> 'UTF8') as readable, t.transactions, t.last_seq, t.has_deletes,
       -- A daemon that is about to follow gets its lock after our commit, and then finds these changes in the log.
       -- An empty batch must not take the lock: a follower that tries at that moment would not get it.
       case when t.changes > 0 then not pg_try_advisory_xact_lock($7) else false end as has_followers,
       -- Users are admitted by where a right begins, so a crash must not move that. And a crash must not undo more numbers
       -- than the next term jumps over. These commits wait for their flush.
       case when t.has_grants or t.last_seq > $9 then set_config('synchronous_commit', 'on', true) end as flushed, null::bigint as seq,
       null as tx, null as at, null::name as schema_name, null::name as table_name, null as model, null as topic,
       null as kind, null as key, null as record, null::name [] as changed, null as actor, null::boolean as revokes,
       null as revokes_user, null as revokes_topic, null::bigint as event_id
from totals as t
union all
select null, null, null, null, null, null, null, null, n.seq, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, c.kind,
       c.key, c.record, c.changed, c.actor, c.revokes, c.revokes_user, c.revokes_topic, n.id
from numbered as n
cross join lateral (select * from rowcast.contents as e where e.xid = n.xid and e.id = n.id offset 0) as c
where (select t.changes <= $6 and t.bytes <= $11 and t.largest <= $12 from totals as t);

-- name: number_few
-- The same for an ordinary batch: at most $6 changes with at most $10 bytes and $11 each, none of which deletes a row or
-- begins a right, and which need not be flushed. Most batches are small, and what they cost is setting up the plan, so this one is
-- as short as it can be. Of any other batch it writes nothing, and `is_ordinary` is false.
-- One row for each change. The first, or the only one if there is none, has the totals. No change although there are
-- `changes`: another leads.
-- $1 to $9 as above   $10 max bytes bigint   $11 large bytes bigint
with fresh as materialized (
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants, coalesce(e.bytes, pg_column_size(e.record), 0) as bytes,
           e.at, e.record, e.changed, e.actor, e.revokes
    from rowcast.events as e where e.xid >= $3::text::xid8 and e.id >= $5::bigint << 40
    union all
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants, coalesce(e.bytes, pg_column_size(e.record), 0) as bytes,
           e.at, e.record, e.changed, e.actor, e.revokes
    from rowcast.events as e where e.xid = any ($4::text []::xid8 []) and e.id >= $5::bigint << 40
    limit $6::bigint + 1
), found as materialized (
    select count(*) as changes,
           coalesce(count(*) <= $6::bigint and sum(f.bytes) <= $10::bigint and max(f.bytes) <= $11::bigint and $2::bigint + count(*) <= $9::bigint
                    and bool_and(f.kind <> 'delete' and f.grants is null), true) as is_ordinary
    from fresh as f
), fence as materialized (
    select from rowcast.lease as l
    where l.nonce = $1 and l.xmin = l.xid::xid and (select f.changes > 0 and f.is_ordinary from found as f) for share of l
), grouped as (
    select f.*, max(f.id) over (partition by f.xid) as tx, min(f.id) over (partition by f.xid, f.topic) as tx_topic,
           sum(f.bytes) over (partition by f.xid) as tx_bytes
    from fresh as f where exists (select from fence)
), numbered as materialized (
    select $2::bigint + row_number() over (order by g.tx, g.tx_topic, g.id) as seq,
           $2::bigint + rank() over (order by g.tx) as tx_begin, $2::bigint + count(*) over (order by g.tx) as tx_end, g.*
    from grouped as g
), logged as (
    insert into rowcast.log (seq, tx_end, xid, event_id, topic, tx_bytes, row_hash)
    select n.seq, n.tx_end, n.xid, n.id, n.topic, case when n.tx_bytes >= 1048576 then n.tx_bytes end,
           case when n.kind in ('insert', 'update', 'restore', 'delete', 'leave') then hashtextextended(n.key::text, n.watch::bigint) end
    from numbered as n
), batch as (
    insert into rowcast.batches (last_seq, term, snapshot)
    select $2::bigint + f.changes, $8::bigint, pg_current_snapshot() from found as f where exists (select from fence)
)
select n.seq, n.xid::text as tx, to_char(n.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, n.topic, n.kind::text as kind, n.key, n.record, n.changed, n.actor, w.model,
       n.revokes is not null as revokes, n.revokes ->> 'user' as revokes_user, n.revokes ->> 'topic' as revokes_topic,
       f.changes, f.is_ordinary,
       case when n.seq is null or n.seq = $2::bigint + 1 then pg_current_snapshot()::text end as snapshot,
       case when n.seq = $2::bigint + 1 then not pg_try_advisory_xact_lock($7) else false end as has_followers
from found as f
left join (
    numbered as n cross join lateral (select o.* from rowcast.watched as o where o.id = n.watch offset 0) as w
) on true;

-- name: reset_emptied
-- The unlogged tables that a crash has emptied; their packs are reset.
select table_name from rowcast.reset_emptied() as r (table_name);

-- name: fresh_events
-- The ids of the events that the next batch would number.
-- $1 xmax text (xid8)   $2 xip text[] (xid8)   $3 first segment integer
select e.xid::text as xid, e.id from rowcast.events as e
where e.xid >= $1::text::xid8 and e.id >= $3::bigint << 40
union all
select e.xid::text, e.id from rowcast.events as e
where e.xid = any ($2::text []::xid8 []) and e.id >= $3::bigint << 40;

-- name: set_aside
-- $1 nonce uuid   $2 xid text (xid8)   $3 event id bigint   $4 last seq bigint   $5 attempt integer   $6 reason text
select a.pack, a.schema_name, a.table_name from rowcast.set_aside($1, $2::text::xid8, $3, $4, $5, $6) as a;

-- name: store_set_aside
-- Stores the dead letters of events that were set aside, once they have their numbers.
with found as materialized (
    select s.xid, s.event_id, s.topic, s.kind, s.key, s.reason, w.pack, w.schema_name, w.table_name, l.seq
    from rowcast.set_aside as s
    join rowcast.watched as w on w.id = s.watch
    cross join lateral (
        select o.seq from rowcast.log as o
        where o.seq > s.after and o.xid = s.xid and o.event_id = s.event_id order by o.seq limit 1
    ) as l
), stored as (
    insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
    select f.seq, f.pack, f.schema_name, f.table_name, f.topic, f.kind, f.key, null, f.reason from found as f
    on conflict do nothing
), removed as (
    delete from rowcast.set_aside as s using found as f where (s.xid, s.event_id) = (f.xid, f.event_id)
)
select f.seq, f.table_name, f.reason from found as f order by f.seq;

-- name: oldest_unnumbered
-- A committed event that the newest batch has not seen; the same one as long as nothing is numbered.
with newest as materialized (
    select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1
)
(
    select e.xid::text as xid, e.id from newest as n
    cross join lateral (
        select o.xid, o.id from rowcast.events as o
        where o.xid >= pg_snapshot_xmax(n.snapshot) order by o.xid, o.id limit 1
    ) as e
)
union all
(
    select e.xid::text, e.id from newest as n
    cross join lateral pg_snapshot_xip(n.snapshot) as x (xid)
    cross join lateral (
        select o.xid, o.id from rowcast.events as o where o.xid = x.xid order by o.xid, o.id limit 1
    ) as e limit 1
)
limit 1;

-- name: purge
-- $1 max tombstones integer
select p.rows, p.emptied from rowcast.purge($1) as p;

-- name: forget_batches
-- Only the newest snapshot is needed.
-- $1 last seq bigint
delete from rowcast.batches where last_seq < $1;

-- name: head
-- The head of a term without events is its base.
select t.epoch, greatest(t.base, (select max(l.seq) from rowcast.log as l)) as seq
from rowcast.terms as t order by t.term desc limit 1;

-- name: changes
-- At most $2, and no more once they have $3 bytes of records. Records that are left out are not unpacked, nor are those of
-- more than $4 bytes, which `outlines` and `records` are for.
-- $1 after seq bigint   $2 limit bigint   $3 max bytes bigint   $4 large bytes bigint
select c.seq, c.tx_end, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, c.kind, c.key,
       case when c.bytes <= $4 then c.content end as record,
       c.changed, c.actor, c.revokes, c.revokes_user, c.revokes_topic, c.bytes, c.tx_bytes
from (
    select o.*, sum(o.bytes) over (order by o.seq rows unbounded preceding) - o.bytes as bytes_before
    from rowcast.changes as o where o.seq > $1 order by o.seq limit $2
) as c where c.bytes_before < $3 order by c.seq;

-- name: changes_of_topics
-- The same for some topics, without the rights that end. Topic by topic, at most $4 of each. The hash of the topic and seq
-- are compared as one row, which only their common index can answer: otherwise, where one topic makes up most of the log, the
-- planner may walk the whole log by seq, once for each topic. What that index leads to is not looked up again, as
-- rowcast.changes would. The topic itself is compared as well: others may have the same hash.
-- Only what the log itself has is sorted: from there on, rows are made and sent one by one. `at` is as the session writes
-- it: to_char takes a tenth of the whole. A column takes 0.05 us of each row, here and in the daemon, so there are few.
-- Where there are no tombstones, which is nearly always, nobody looks for one of each row.
-- `large` is true in a transaction of more than $5 changes: numbers are dense within a transaction, so the change $5
-- before its end is part of it too. It is looked up only for the first change of a transaction, and only if so many numbers
-- fit behind the transaction before. Not `exists`, which the planner may answer by reading the whole log.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[]   $4 limit bigint   $5 max changes of a transaction bigint
-- $6 max bytes bigint   $7 large bytes bigint
select c.seq, c.tx_end, c.xid::text as tx, c.at::text as at, w.schema_name, w.table_name, w.model, c.topic,
       c.kind::text as kind, c.key, case when c.bytes <= $7 then c.content end as record, c.changed, c.actor, c.bytes, c.tx_bytes,
       case when c.span > $5 then (select l.tx_end = c.tx_end from rowcast.log as l where l.seq = c.tx_end - $5::bigint) end as large
from (
    select l.seq, l.tx_end, l.topic, l.tx_bytes, l.span, e.xid, e.at, e.watch, e.kind, e.key, e.changed, e.actor, s.content,
           s.bytes, sum(s.bytes) over (order by l.seq rows unbounded preceding) - s.bytes as bytes_before
    from (
        select f.*, f.tx_end - lag(f.tx_end, 1, 0::bigint) over (order by f.seq) as span
        from (select w.topic, hashtextextended(w.topic, 1) # hashtextextended(w.topic, 2) as hash from unnest($3::text []) as w (topic)) as t
        cross join lateral (
            select o.seq, o.tx_end, o.xid, o.event_id, o.topic, o.tx_bytes from rowcast.log as o
            where (hashtextextended(o.topic, 1) # hashtextextended(o.topic, 2), o.seq) > (t.hash, $1)
                  and (hashtextextended(o.topic, 1) # hashtextextended(o.topic, 2), o.seq) <= (t.hash, $2)
                  and o.topic = t.topic
            order by hashtextextended(o.topic, 1) # hashtextextended(o.topic, 2), o.seq limit $4
        ) as f
        order by f.seq limit $4
    ) as l
    cross join lateral (
        select o.*, (select exists (select from rowcast.tombstones)) and exists (
            select from rowcast.tombstones as t where t.watch = o.watch and t.key = o.key::text and t.seq > l.seq
        ) as deleted
        from rowcast.events as o where o.xid = l.xid and o.id = l.event_id offset 0
    ) as e
    cross join lateral (
        select case when not e.deleted then e.record end as content,
               case when e.deleted or e.record is null then 0 else coalesce(e.bytes, octet_length(e.record::text)) end as bytes
    ) as s
) as c
cross join lateral (select o.* from rowcast.watched as o where o.id = c.watch offset 0) as w
where c.bytes_before < $6 order by c.seq;

-- name: rest_of_transaction
-- The part of a transaction that a chunk cut off. Both ends are given, so the planner knows how small it is. Events,
-- tombstones and `at` as above.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[], null for all   $4 large bytes bigint
select l.seq, l.tx_end, e.xid::text as tx, e.at::text as at, w.schema_name, w.table_name, w.model, l.topic,
       e.kind::text as kind, e.key, case when s.bytes <= $4 then s.content end as record, e.changed, e.actor,
       e.revokes is not null as revokes, e.revokes ->> 'user' as revokes_user, e.revokes ->> 'topic' as revokes_topic, s.bytes
from rowcast.log as l
cross join lateral (
    select o.*, (select exists (select from rowcast.tombstones)) and exists (
        select from rowcast.tombstones as t where t.watch = o.watch and t.key = o.key::text and t.seq > l.seq
    ) as deleted
    from rowcast.events as o where o.xid = l.xid and o.id = l.event_id offset 0
) as e
cross join lateral (select o.* from rowcast.watched as o where o.id = e.watch offset 0) as w
cross join lateral (
    select case when not e.deleted then e.record end as content,
           case when e.deleted or e.record is null then 0 else coalesce(e.bytes, octet_length(e.record::text)) end as bytes
) as s
where l.seq > $1 and l.seq <= $2 and ($3::text [] is null or l.topic = any ($3)) order by l.seq;

-- name: outlines
-- Records with their long values replaced by empty ones of their type, and the names of these, as JSON. What is long: most
-- text is validated faster than this, and nearly all of what nests.
-- A value of type json may have escapes that json_each cannot read, as it reads all that it finds. If `is_masked`, a character
-- that needs no escape stands in their place, followed by u; so do two backslashes, by b, and itself, by d.
-- $1 seqs bigint[]
select s.seq, e.is_masked, o.text, o.emptied
from unnest($1::bigint []) as s (seq)
cross join lateral (select n.content from rowcast.changes as n where n.seq = s.seq offset 0) as c
cross join lateral (select position('\u' in c.content::text) > 0 as is_masked offset 0) as e
cross join lateral (
    select '{' || string_agg(m.name || ':' || coalesce(m.empty, m.value::text), ',' order by m.n) || '}' as text,
           coalesce(array_agg(m.name order by m.n) filter (where m.empty is not null), '{}') as emptied
    from (
        select to_json(j.key)::text as name, j.value, j.n,
               case when pg_column_size(j.value) > 4096 then
                   case json_typeof(j.value) when 'object' then '{}' when 'array' then '[]'
                       when 'string' then case when pg_column_size(j.value) > 65536 then '""' end end
               end as empty
        from json_each(case when e.is_masked
            then replace(replace(replace(c.content::text, chr(127), chr(127) || 'd'), '\\', chr(127) || 'b'),
                         '\u', chr(127) || 'u')::json
            else c.content end) with ordinality as j (key, value, n)
        offset 0
    ) as m
) as o
where c.content is not null;

-- name: records
-- $1 seqs bigint[]
select c.seq, c.content as record
from unnest($1::bigint []) as s (seq)
cross join lateral (select e.seq, e.content from rowcast.changes as e where e.seq = s.seq offset 0) as c
where c.content is not null;

-- name: next_seq
-- $1 after seq bigint
select min(l.seq) as seq from rowcast.log as l where l.seq > $1;

-- name: next_seq_of_topics
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[]
select min(c.seq) as seq
from (select w.topic, hashtextextended(w.topic, 1) # hashtextextended(w.topic, 2) as hash from unnest($3::text []) as w (topic)) as t
cross join lateral (
    select l.seq from rowcast.log as l
    where (hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2), l.seq) > (t.hash, $1)
          and (hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2), l.seq) <= (t.hash, $2)
          and l.topic = t.topic
    order by hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2), l.seq limit 1
) as c;

-- name: single_change
-- $1 seq bigint   $2 max changes of a transaction bigint
select c.seq, c.tx_end, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, c.kind, c.key, c.content as record,
       c.changed, c.actor, c.revokes, c.revokes_user, c.revokes_topic, c.bytes, c.tx_bytes,
       (select l.tx_end = c.tx_end from rowcast.log as l where l.seq = c.tx_end - $2::bigint) as large
from rowcast.changes as c where c.seq = $1;

-- name: unreadable
-- Stands for a change that cannot be read; its record is the reason. It has no key and, unless $4, no text that was
-- captured: then its topic is that of the whole pack, and if it ends a right, it ends every right of the pack.
-- $1 seq bigint   $2 max changes of a transaction bigint   $3 reason text   $4 with topic and right boolean
select l.seq, l.tx_end, e.xid::text as tx, to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, w.model, case when $4 then l.topic else '*' || w.pack end as topic,
       'unreadable' as kind, '{}' as key, $3::text as record, null::name [] as changed, null as actor,
       e.revokes is not null as revokes, case when $4 then e.revokes ->> 'user' end as revokes_user,
       case when $4 then e.revokes ->> 'topic' end as revokes_topic, 0 as bytes, l.tx_bytes,
       (select o.tx_end = l.tx_end from rowcast.log as o where o.seq = l.tx_end - $2::bigint) as large
from rowcast.log as l
cross join lateral (
    select o.* from rowcast.events as o where o.xid = l.xid and o.id = l.event_id offset 0
) as e
join rowcast.watched as w on w.id = e.watch
where l.seq = $1;

-- name: log_floor
select rowcast.log_floor();

-- name: limits
-- Replaces a transaction that is too large to deliver: the last change of each topic, without its content, and every
-- change that ends a right. If more than $4 rights of one schema end, its first one stands for every right of that
-- schema. If more than $3 topics were touched, one change stands for all topics.
-- $1 first seq bigint   $2 last seq bigint   $3 max topics bigint   $4 max rights bigint
with last as materialized (
    select max(l.seq) as seq from rowcast.log as l where l.seq >= $1 and l.seq <= $2 group by l.topic
), size as materialized (
    select count(*) > $3 as too_many from last
), ending as materialized (
    select l.seq, row_number() over (partition by e.schema_name order by l.seq) as place,
           count(*) over (partition by e.schema_name) > $4 as too_many
    from rowcast.log as l
    cross join lateral (
        select c.* from rowcast.contents as c where c.xid = l.xid and c.id = l.event_id offset 0
    ) as e
    where l.seq >= $1 and l.seq <= $2 and e.revokes
), sent as materialized (
    select t.seq, bool_or(t.too_many) as all_rights from (
        select l.seq, null::boolean as too_many from last as l cross join size as s where not s.too_many or l.seq = $2
        union all
        select e.seq, e.too_many from ending as e where e.place = 1 or not e.too_many
    ) as t group by t.seq
)
select c.seq, c.tx, c.at, c.schema_name, c.table_name, c.model, case when s.too_many then '*' else c.topic end as topic,
       'limit' as kind, '{}' as key, null as record, null as changed, null as actor, t.all_rights is not null as revokes,
       case when not t.all_rights then c.revokes_user end as revokes_user,
       case when not t.all_rights then c.revokes_topic end as revokes_topic
from sent as t cross join lateral (select o.* from rowcast.changes as o where o.seq = t.seq offset 0) as c
cross join size as s order by c.seq;

-- name: limits_of_topics
-- The same for some topics, without the rights that end. Index look-ups only, however many changes there are.
-- $1 first seq bigint   $2 last seq bigint   $3 topics text[]
select c.seq, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, 'limit' as kind, '{}' as key, null as record,
       null as changed, null as actor, false as revokes, null as revokes_user, null as revokes_topic
from (select w.topic, hashtextextended(w.topic, 1) # hashtextextended(w.topic, 2) as hash from unnest($3::text []) as w (topic)) as t
cross join lateral (
    select l.seq from rowcast.log as l
    where (hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2), l.seq) >= (t.hash, $1)
          and (hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2), l.seq) <= (t.hash, $2)
          and l.topic = t.topic
    order by hashtextextended(l.topic, 1) # hashtextextended(l.topic, 2) desc, l.seq desc limit 1
) as last
cross join lateral (select o.* from rowcast.changes as o where o.seq = last.seq offset 0) as c order by c.seq;

-- name: continuity
-- The current epoch, the log's floor, and whether the position is on record. If it is not: whether a crash can have undone
-- it, which depends on how the next term began (null: there is none yet), and whether the newest term leads. Then a
-- position past it was never given out here. If it does not, the next term decides which history this is.
-- $1 seq bigint
select
    (select t.epoch from rowcast.terms as t order by t.term desc limit 1) as epoch,
    rowcast.log_floor() as floor,
    rowcast.on_record($1) as on_record,
    (select t.after_crash from rowcast.terms as t where t.base > $1 order by t.base, t.term limit 1) as crashed,
    rowcast.lease_holder() = (select t.nonce from rowcast.terms as t order by t.term desc limit 1) as led;

-- name: expired
-- The statements that drop the tables of retired segments, in order. They detach concurrently first: otherwise every
-- writer would queue behind one open reader. An interrupted detach is finalized. A role that does not own the tables asks
-- a function to drop them.
select step.statement
from rowcast.segments as s
cross join (values ('log', 1), ('events', 2)) as t (parent, place)
cross join lateral (select to_regclass(format('rowcast.%I', t.parent || '_' || s.segment)) as relation) as r
left join pg_inherits as i on i.inhrelid = r.relation
left join pg_class as c on c.oid = r.relation
cross join lateral (select pg_has_role(current_user, c.relowner, 'usage') as owns_it) as me
cross join lateral (
    select 1 as place, format('alter table rowcast.%I detach partition %s %s', t.parent, r.relation,
        case when i.inhdetachpending then 'finalize' else 'concurrently' end) as statement where i.inhrelid is not null and me.owns_it
    union all
    select 2, case when me.owns_it then format('drop table %s', r.relation)
                   else format('select rowcast.drop_retired(%L, %s)', t.parent, s.segment) end
) as step
where r.relation is not null and case t.parent when 'log' then s.log_dropped else s.events_dropped end
order by s.segment, t.place, step.place;

-- name: retire_segments
-- $1 keep interval
select rowcast.retire_segments($1);

-- name: make_segment
-- Keeps one segment ahead, ready to be opened.
select rowcast.make_next_segment();

-- name: segment_due
-- $1 age interval
select rowcast.segment_due($1);

-- name: segments
-- How many segments are ready to be opened, and the floor of the log.
select count(*) filter (where s.opened_at is null) as ahead, rowcast.log_floor() as floor
from rowcast.segments as s;

-- name: readable_from
-- Where in the log each right to a topic began (0 if before the log), and whether a beginning still waits for its
-- number, because its transaction was not visible in the last batch's snapshot.
-- The schema rowcast stands for the tables that are served without a pack.
-- $1 schema text   $2 users text[]   $3 topics text[], one for each user
with served as materialized (
    select w.id from rowcast.watched as w
    where case when $1 = 'rowcast' then w.id in (select o.watch from rowcast.own_tables as o)
               else w.schema_name = $1 and w.id not in (select o.watch from rowcast.own_tables as o) end
)
select requested.place, requested.user_id, requested.topic, known.begun, known.pending
from unnest($2::text[], $3::text[]) with ordinality as requested (user_id, topic, place)
cross join lateral (
    with given as (
        select max(g.seq) as seq from rowcast.grants as g join served as w on w.id = g.watch
        where g.topic = requested.topic and g.user_id = requested.user_id
        union all
        select max(g.seq) from rowcast.grants as g join served as w on w.id = g.watch
        where g.topic = requested.topic and g.user_id is null
        union all
        select max(g.seq) from rowcast.grants as g join served as w on w.id = g.watch
        where g.topic is null and g.user_id = requested.user_id
        union all
        select max(g.seq) from rowcast.grants as g join served as w on w.id = g.watch
        where g.topic is null and g.user_id is null
    )
    select
        coalesce((select max(g.seq) from given as g), 0) as begun,
        exists (
            select from (select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1) as seen
            join rowcast.events as e on e.xid >= pg_snapshot_xmin(seen.snapshot) and not pg_visible_in_snapshot(e.xid, seen.snapshot)
            join served as w on w.id = e.watch
            where e.grants is not null
              and coalesce(e.grants ->> 'user', requested.user_id) = requested.user_id
              and coalesce(e.grants ->> 'topic', requested.topic) = requested.topic
        ) as pending
) as known;

-- name: begin_limited
-- Whoever waits gives up after 10 seconds, and asks again: statements without an end would pile up.
-- squawk-ignore transaction-nesting, ban-uncommitted-transaction -- no migration, and its caller ends it
begin;
set local statement_timeout = '4s';

-- name: snapshot_position
-- What the transaction of a snapshot shows of the log: the newest number is where the stream continues. The floor stands
-- for it if the log is empty. Of what the transaction shows, `pending` events have no number yet: they belong to
-- transactions that the newest batch did not see.
with newest as materialized (
    select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1
)
select pg_current_snapshot()::text as visible,
       (select t.epoch from rowcast.terms as t order by t.term desc limit 1) as epoch,
       coalesce((select max(l.seq) from rowcast.log as l), rowcast.log_floor()) as seq,
       exists (
           select from newest as n join rowcast.events as e on e.xid >= pg_snapshot_xmax(n.snapshot)
           union all
           select from newest as n cross join lateral pg_snapshot_xip(n.snapshot) as x (xid)
           join rowcast.events as e on e.xid = x.xid
       ) as pending,
       set_config('statement_timeout', '30s', true);

-- name: numbered_upto
-- The newest number, once all that a snapshot shows has one; null before that.
-- $1 snapshot text
with newest as materialized (
    select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1
)
select case when not exists (
    select from newest as n join rowcast.events as e on e.xid >= pg_snapshot_xmax(n.snapshot)
    where pg_visible_in_snapshot(e.xid, $1::text::pg_snapshot)
    union all
    select from newest as n cross join lateral pg_snapshot_xip(n.snapshot) as x (xid)
    join rowcast.events as e on e.xid = x.xid
    where pg_visible_in_snapshot(e.xid, $1::text::pg_snapshot)
) then coalesce((select max(l.seq) from rowcast.log as l), rowcast.log_floor()) end;

-- name: snapshot_functions
-- The statements that read the rows of a topic, with the conditions of a filter: of the watched tables of a schema or, for
-- the schema rowcast, of those that are served without a pack.
-- $1 schema text   $2 topic text   $3 conditions by table text
select w.schema_name, w.table_name, w.model, rowcast.snapshot_statement(w, $3::text::jsonb -> w.table_name::text) as statement
from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
where case when $1 = 'rowcast' then rowcast.is_covered($2, o.topics) else w.schema_name = $1 and o.watch is null end
  and w.function_name is not null and w.snapshot_name is not null order by w.id;

-- name: own_tables
-- The tables that are served without a pack: their topics and keys, and the name and the shape of each published column,
-- and whether it may be null.
select w.schema_name, w.table_name, w.pack, o.topics, w.key::text [] as key, (
    select jsonb_agg(jsonb_build_array(a.attname, rowcast.shape_of(c.facts -> a.attname, a.atttypid), not a.attnotnull)
                     order by a.attnum)::text
    from pg_attribute as a
    where a.attrelid = c.oid and a.attname = any (w.columns) and a.attnum > 0 and not a.attisdropped
) as columns
from rowcast.own_tables as o
join rowcast.watched as w on w.id = o.watch and w.function_name is not null
cross join lateral (
    select r.oid, rowcast.captured_columns(r.oid) as facts from pg_class as r
    where r.relname = w.table_name and r.relnamespace = to_regnamespace(quote_ident(w.schema_name)) offset 0
) as c
order by w.id;

-- name: compared_columns
-- The published columns of the same tables, with their types as filters compare them.
-- $1 schema text   $2 topic text
select w.table_name, c.name, c.type_, c.labels
from rowcast.watched as w left join rowcast.own_tables as o on o.watch = w.id
cross join lateral rowcast.compared_columns(w) as c
where case when $1 = 'rowcast' then rowcast.is_covered($2, o.topics) else w.schema_name = $1 and o.watch is null end
  and w.function_name is not null;

-- name: store_dead_letters
-- Every daemon reads the log and finds the same invalid change; one dead letter is enough.
-- $1 seq bigint   $2 pack text   $3 reason text
insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
select c.seq, $2, c.schema_name, c.table_name, c.topic, c.kind::rowcast.kind, c.key::json, c.record::json, $3
from rowcast.changes as c where c.seq = $1
on conflict do nothing;

-- name: store_unreadable
-- The same for a change that cannot be read. $4 is its topic, or what stands for it if that cannot be read either.
-- $1 seq bigint   $2 pack text   $3 reason text   $4 topic text
insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
select l.seq, $2, w.schema_name, w.table_name, $4, e.kind, '{}', null, $3
from rowcast.log as l
cross join lateral (
    select o.* from rowcast.events as o where o.xid = l.xid and o.id = l.event_id offset 0
) as e
join rowcast.watched as w on w.id = e.watch
where l.seq = $1
on conflict do nothing;

-- name: write_canary
-- $1 mark text
insert into rowcast.canary as c (id, mark) values (1, $1) on conflict (id) do update set mark = excluded.mark;

-- name: send_heartbeat
-- Proves the path from NOTIFY to this listener. Asking for the queue's usage also advances its tail: a full queue stays
-- full until someone asks.
-- $1 channel text
select pg_notify($1, ''), pg_notification_queue_usage() as usage;

-- name: notify_lock
-- Which process holds the lock that a transaction that has notified takes when it commits, what it waits for, and how
-- many wait for the lock. It is a lock on "database 0", an object of pg_database.
select
    l.pid,
    coalesce((select a.wait_event from pg_stat_activity as a where a.pid = l.pid), '') as waits_for,
    (
        select count(*) from pg_locks as w
        where w.locktype = 'object' and w.classid = 'pg_database'::regclass and w.objid = 0 and not w.granted
    ) as waiters
from pg_locks as l
where l.locktype = 'object' and l.classid = 'pg_database'::regclass and l.objid = 0 and l.granted
limit 1;

-- name: notify_queue
-- How full the queue of NOTIFY is, and the process whose transaction began first, if this role may see that: the queue
-- keeps all that a session which listens has not read, and it reads nothing during a transaction.
select
    pg_notification_queue_usage() as usage,
    (
        select a.pid from pg_stat_activity as a
        where a.xact_start is not null and a.pid <> pg_backend_pid() and a.backend_type = 'client backend'
        order by a.xact_start
        limit 1
    ) as oldest;

-- name: notify_readers
-- The leader wakes the other daemons, in a transaction of its own that nothing waits for.
select pg_notify('rowcast_log', '');

-- name: dead_letters
-- The newest of the selected dead letters, oldest first. Without their records: lists get pasted elsewhere.
-- $1 seqs bigint[], null for all   $2 pack text, null for all   $3 table text, null for all   $4 limit bigint, null: none
select * from (
    select d.seq, to_char(d.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as at, d.pack, d.schema_name, d.table_name,
           d.topic, d.kind::text as kind, d.key::text as key, d.reason, (to_jsonb(d) - 'record')::text as json
    from rowcast.dead_letters as d
    where ($1::bigint [] is null or d.seq = any ($1)) and ($2::text is null or d.pack = $2)
      and ($3::text is null or d.table_name = $3)
    order by d.seq desc limit $4
) as newest order by seq;

-- name: dead_letter
-- Formatted here, since numbers keep all their digits in Postgres.
-- $1 seq bigint
select jsonb_pretty(to_jsonb(d)) from rowcast.dead_letters as d where d.seq = $1;

-- name: watches
-- What is captured, for the console: one row for each watched table.
select w.schema_name, w.table_name, w.pack, w.topic, w.columns::text [] as columns, w.key::text [] as key,
       w.on_error, w.snapshot_name is not null as has_snapshot
from rowcast.watched as w
where w.function_name is not null order by w.schema_name, w.table_name;

-- name: drop_dead_letters
-- $1 seqs bigint[]
with dropped as (delete from rowcast.dead_letters where seq = any ($1) returning seq)
select count(*) from dropped;

-- name: lock_row
-- The statement that locks the row with a given key (its $1, json) and returns whether it is live; it returns nothing
-- if there is no such row. Null if the table is gone.
-- $1 schema text   $2 table text
select format(
    'select %s from %I.%I as r where %s for share',
    case when w.soft_delete is null then 'true' else format('r.%I is null', w.soft_delete) end, w.schema_name, w.table_name,
    string_agg(format('r.%1$I = ($1::json ->> %1$L)::%2$s', a.attname, format_type(a.atttypid, a.atttypmod)), ' and ')
)
from rowcast.watched as w
join pg_attribute as a
    on a.attrelid = to_regclass(format('%I.%I', w.schema_name, w.table_name)) and a.attname = any (w.key) and not a.attisdropped
where w.schema_name = $1 and w.table_name = $2
group by w.id having count(*) = cardinality(w.key);

-- name: owner_of
-- $1 schema text   $2 table text
select c.relowner::regrole::text from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
where n.nspname = $1 and c.relname = $2;

-- name: lock_dead_letters
-- Taken before any dead letter is locked, since rowcast.purge locks the table before its rows: no deadlocks.
lock table rowcast.dead_letters in row exclusive mode;

-- name: check_replayable
-- Why each dead letter of one row cannot be replayed; null if it can. It must still be the newest change of its row: no
-- change of the row, and none lost of its table, follows it in the log or waits for its number. Dead letters replayed
-- together keep their order, so one of them that carries content does not make an older one stale.
-- $1 seqs bigint[]   $2 is the row live boolean
with later as (
    select d.seq, f.watch, f.topic, f.kind, f.key::text as key
    from rowcast.dead_letters as d
    join rowcast.log as l using (seq)
    join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
    cross join lateral (
        select m.xid, m.event_id from rowcast.log as m
        where m.row_hash = hashtextextended(e.key::text, e.watch::bigint) and m.seq > d.seq
          and not exists (
              select from rowcast.dead_letters as b
              where b.seq = m.seq and b.seq = any ($1) and b.kind not in ('delete', 'leave'))
        union all
        select m.xid, m.event_id from rowcast.log as m where m.topic = '*' || d.pack and m.seq > d.seq
    ) as m
    join rowcast.events as f on f.xid = m.xid and f.id = m.event_id
    where d.seq = any ($1)
    union all
    select d.seq, f.watch, f.topic, f.kind, f.key::text
    from rowcast.dead_letters as d
    cross join (select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1) as seen
    join rowcast.events as f on f.xid >= pg_snapshot_xmin(seen.snapshot) and not pg_visible_in_snapshot(f.xid, seen.snapshot)
    where d.seq = any ($1)
)
select d.seq, case
    when e.id is null then 'forgotten'
    when e.kind = 'limit' then 'set_aside'
    when d.kind = 'limit' then 'unreadable'
    when d.kind not in ('delete', 'leave') and not $2 then 'gone'
    when d.record is null and e.record is not null then 'unreadable'
    when exists (
        select from later as f
        where f.seq = d.seq and f.watch = e.watch
          and (f.kind = 'lost' or f.topic = e.topic and f.key = e.key::text)
    ) then 'changed' end as refusal
from rowcast.dead_letters as d
left join rowcast.log as l using (seq)
left join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
where d.seq = any ($1) order by d.seq for update of d;

-- name: replay_dead_letters
-- Inserted as new events, which the sequencer numbers. Topic, kind, key and record are the dead letter's, the rest is
-- the event's.
-- $1 seqs bigint[]
with removed as (
    delete from rowcast.dead_letters where seq = any ($1) returning *
), replayed as (
    insert into rowcast.events (watch, topic, kind, key, record, changed, actor, revokes)
    select e.watch, d.topic, d.kind, d.key, d.record, e.changed, e.actor, e.revokes
    from removed as d join rowcast.log as l using (seq)
    join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
    order by d.seq
    returning id
)
select count(*), rowcast.ring() from replayed;

-- name: send_signals
-- Pieces of one message: those who listen get them together, or none. At commit NOTIFY takes a lock of the whole cluster,
-- so this is the only statement of its transaction.
-- $1 channel text   $2 pieces text[]
select pg_notify($1, p.piece) from unnest($2::text []) with ordinality as p (piece, place) order by p.place;

-- name: renew_presence
-- Null if there is no lease: it was forgotten after a silence, or Postgres has crashed.
-- $1 process text   $2 length interval
update rowcast.presence_leases as l set expires_at = clock_timestamp() + $2 where l.process = $1 returning true;

-- name: begin_presence
-- Also forgets processes that have ended, with their people.
-- $1 process text   $2 length interval
with ended as (
    delete from rowcast.presence_leases as l where l.expires_at < clock_timestamp() - interval '1 minute'
)
insert into rowcast.presence_leases (process, expires_at) values ($1, clock_timestamp() + $2);

-- name: remove_people
-- $1 process text   $2 topics text[]   $3 users text[]   $4 devices text[]
delete from rowcast.people as p
using unnest($2::text [], $3::text [], $4::text []) as g (topic, user_id, device)
where p.process = $1 and p.topic = g.topic and p.user_id = g.user_id and p.device = g.device;

-- name: store_people
-- $1 process text   $2 topics text[]   $3 users text[]   $4 devices text[]   $5 schemas text[]   $6 data text[]
-- $7 since timestamptz[]   $8 when the data were set timestamptz[]   $9 who is about to leave boolean[]
insert into rowcast.people (process, topic, user_id, device, schema_name, data, since, updated_at, leaves)
select $1, n.topic, n.user_id, n.device, n.schema_name, n.data, n.since, n.updated_at, n.leaves
from unnest(
    $2::text [], $3::text [], $4::text [], $5::text [], $6::text [], $7::timestamptz [], $8::timestamptz [], $9::boolean []
) as n (topic, user_id, device, schema_name, data, since, updated_at, leaves)
on conflict (process, topic, user_id, device) do update
set data = excluded.data, since = excluded.since, updated_at = excluded.updated_at, leaves = excluded.leaves;

-- name: remove_who_came_back
-- Who is about to leave one process and has come to another one. The index people_place finds them.
-- $1 topics text[]   $2 users text[]   $3 devices text[]
delete from rowcast.people as p
using unnest($1::text [], $2::text [], $3::text []) as n (topic, user_id, device)
where p.topic = n.topic and p.user_id = n.user_id and p.device = n.device and p.leaves
  and exists (
      select from rowcast.people as o
      where o.topic = p.topic and o.user_id = p.user_id and o.device = p.device and o.process <> p.process and not o.leaves
  );

-- name: people
-- Who is present in these topics through other processes. The index people_place answers it.
-- $1 process text   $2 topics text[]
select p.process, p.topic, p.user_id, p.device, p.data, p.since, p.updated_at, p.leaves
from rowcast.people as p join rowcast.presence_leases as l on l.process = p.process
where p.topic = any ($2::text []) and p.process <> $1 and l.expires_at > clock_timestamp();

-- name: lock_hooks
-- $1 lock bigint
select pg_advisory_xact_lock($1);

-- name: users_who_came_or_went
-- The users who are present in any topic of a schema, compared with those of whom its pack was told; from now on it was
-- told of these. `remains`: there are some.
-- $1 schema text
with present as (
    select distinct p.user_id
    from rowcast.people as p join rowcast.presence_leases as l on l.process = p.process
    where p.schema_name = $1 and l.expires_at > clock_timestamp()
), came as (
    insert into rowcast.users_present (schema_name, user_id)
    select $1, p.user_id from present as p
    on conflict do nothing
    returning user_id
), went as (
    delete from rowcast.users_present as u
    where u.schema_name = $1 and not exists (select from present as p where p.user_id = u.user_id)
    returning u.user_id
)
select
    array(select c.user_id from came as c order by c.user_id) as came,
    array(select w.user_id from went as w order by w.user_id) as went,
    exists (select from present) as remains;

-- name: acknowledged
-- $1 user text   $2 device text
select a.position from rowcast.acks as a where a.user_id = $1 and a.device = $2;

-- name: store_acks
-- In the order of the key, so that two processes do not wait for each other.
-- $1 users text[]   $2 devices text[]   $3 positions text[]
insert into rowcast.acks (user_id, device, position, acked_at)
select n.user_id, n.device, n.position, clock_timestamp()
from unnest($1::text [], $2::text [], $3::text []) as n (user_id, device, position)
order by n.user_id, n.device
on conflict (user_id, device) do update set position = excluded.position, acked_at = excluded.acked_at;

-- name: forget_devices
-- Keeps the devices of each user that acknowledged last.
-- $1 users text[]   $2 how many devices of each user integer
delete from rowcast.acks as a
using (
    select d.user_id, d.device,
           row_number() over (partition by d.user_id order by d.acked_at desc, d.device) as place
    from rowcast.acks as d where d.user_id = any ($1::text [])
) as old
where old.place > $2 and a.user_id = old.user_id and a.device = old.device;
