-- The daemon's statements, by name. See daemon/postgres/queries.py.

-- name: try_lead
-- One leader per database. The lock belongs to the connection that numbers: when it dies, so does the right.
-- $1 lock bigint
select pg_try_advisory_lock($1);

-- name: share_follower_lock
-- From now on the leader tells us when the log has grown. He holds this lock alone while he gives numbers.
-- $1 lock bigint
select set_config('lock_timeout', '0', true), pg_advisory_lock_shared($1);

-- name: wait_without_timeout
-- For as long as some writer's transaction is open; but who is gone must not stay in the queue.
set lock_timeout = 0;
set statement_timeout = 0;
set client_connection_check_interval = '1s';

-- name: take_wakeup_lock
-- Granted when every writer has ended who did not ring.
-- $1 lock bigint
select pg_advisory_lock($1);

-- name: release_wakeup_lock
select pg_advisory_unlock_all();

-- name: leave_segment
select rowcast.leave_segment();

-- name: open_term
-- $1 in the next segment boolean
select term, epoch, base, snapshot::text as snapshot, first_segment from rowcast.open_term($1);

-- name: number_events
-- New are the events of transactions that were not visible in the last snapshot and are in this one: those past
-- its xmax, and those that were in progress. Rows, numbers and the new snapshot come from one statement, so from
-- one snapshot. Transactions go by the largest event id each holds, which keeps the versions of a row in order;
-- inside one, a topic's events stand together, so that its frame ends at a place from where one can resume.
-- What rows are gone, and which rights begin, is noted in the same transaction. A right begins with the transaction that
-- gives it, of which everything may be read.
-- Writes nothing under a leader of a newer term.
-- One row, which has no seq, is about all of it; the others are the changes as rowcast.changes has them, unless there are
-- more than $6.
-- $1 term bigint   $2 last seq bigint   $3 xmax text (xid8)   $4 xip text[] (xid8)   $5 first segment integer
-- $6 most changes bigint   $7 lock bigint that every follower shares
with superseded as materialized (
    select exists (select from rowcast.terms as t where t.term > $1) as it
), fresh as materialized (
    -- Two scans of an index: of one condition with `or` the planner may make a scan of everything.
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants from rowcast.events as e
    where e.xid >= $3::text::xid8 and e.id >= $5::bigint << 40
    union all
    select e.id, e.xid, e.topic, e.watch, e.kind, e.key, e.grants from rowcast.events as e
    where e.xid = any ($4::text []::xid8 []) and e.id >= $5::bigint << 40
), grouped as (
    select f.*, max(f.id) over (partition by f.xid) as tx, min(f.id) over (partition by f.xid, f.topic) as tx_topic
    from fresh as f where not (select s.it from superseded as s)
), numbered as materialized (
    select $2::bigint + row_number() over (order by g.tx, g.tx_topic, g.id) as seq,
           $2::bigint + rank() over (order by g.tx) as tx_begin, $2::bigint + count(*) over (order by g.tx) as tx_end, g.*
    from grouped as g
), about as materialized (
    select count(*) as changes, count(*) filter (where n.seq = n.tx_end) as transactions,
           coalesce(max(n.seq), $2::bigint) as last_seq,
           count(*) filter (where n.kind = 'delete') > 0 as gone, count(n.grants) > 0 as granted
    from numbered as n
), logged as (
    insert into rowcast.log (seq, tx_end, xid, event_id, topic, row_hash)
    select n.seq, n.tx_end, n.xid, n.id, n.topic,
           case when n.kind in ('insert', 'update', 'restore', 'delete', 'leave') then hashtextextended(n.key::text, n.watch) end
    from numbered as n
), batch as (
    insert into rowcast.batches (last_seq, term, snapshot)
    select a.last_seq, $1, pg_current_snapshot() from about as a where a.changes > 0
), gone as (
    insert into rowcast.tombstones (watch, key, seq)
    select n.watch, n.key::text, n.seq from numbered as n where n.kind = 'delete'
), granted as (
    insert into rowcast.grants (seq, watch, user_id, topic)
    select n.tx_begin, n.watch, n.grants ->> 'user', n.grants ->> 'topic' from numbered as n where n.grants is not null
)
select pg_current_snapshot()::text as snapshot, s.it as superseded, a.transactions, a.last_seq, a.gone,
       -- Who does not follow yet gets this lock with our commit, and sees in the log what nobody told.
       a.changes > 0 and not pg_try_advisory_xact_lock($7) as followed,
       -- Who was let in by a number must not meet it again elsewhere after a crash: these commits wait for their flush.
       case when a.granted then set_config('synchronous_commit', 'on', true) end as flushed, null::bigint as seq,
       null as tx, null as at, null::name as schema_name, null::name as table_name, null as model, null as topic,
       null as kind, null as key, null as record, null::name [] as changed, null as actor, null::boolean as revokes,
       null as revokes_user, null as revokes_topic
from about as a cross join superseded as s
union all
select null, null, null, null, null, null, null, n.seq, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, c.kind,
       c.key, c.record, c.changed, c.actor, c.revokes, c.revokes_user, c.revokes_topic
from numbered as n
cross join lateral (select * from rowcast.contents as e where e.xid = n.xid and e.id = n.id offset 0) as c
where (select a.changes <= $6 from about as a);

-- name: purge
-- $1 most tombstones integer
select p.rows, p.emptied from rowcast.purge($1) as p;

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
-- Topic by topic, and at most so many of each. Topic and place are compared as rows, which only the index of both can do:
-- where one topic makes up most of the log, the planner would rather walk all of it by its place, for every topic.
-- `large` is true in a transaction of more than $5 changes: numbers are dense in it, so the one that lies so far before
-- its end belongs to it. Not `exists`, which the planner may answer by reading the whole log.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[]   $4 most bigint   $5 most of a transaction bigint
with chunk as materialized (
    select c.seq from unnest($3::text []) as t (topic)
    cross join lateral (
        select l.seq from rowcast.log as l
        where (l.topic, l.seq) > (t.topic, $1) and (l.topic, l.seq) <= (t.topic, $2) order by l.topic, l.seq limit $4
    ) as c
    order by c.seq limit $4
)
select c.*, (select l.tx_end = c.tx_end from rowcast.log as l where l.seq = c.tx_end - $5::bigint) as large
from chunk cross join lateral (select o.* from rowcast.changes as o where o.seq = chunk.seq offset 0) as c order by c.seq;

-- name: rest_of_transaction
-- What a chunk has cut off. Both ends are given, so the planner knows how little that is.
-- $1 after seq bigint   $2 upto seq bigint   $3 topics text[], null for all
select * from rowcast.changes
where seq > $1 and seq <= $2 and ($3::text [] is null or topic = any ($3)) order by seq;

-- name: log_floor
select rowcast.log_floor();

-- name: limits
-- What is told of a transaction that is too large: of each topic its last change, without its content, and every
-- change that ends a right. If more than $4 rights of one schema end, the first one stands for all of that schema's;
-- if more than $3 topics were touched, what is told is of all topics.
-- $1 first seq bigint   $2 last seq bigint   $3 most topics bigint   $4 most rights bigint
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
), told as materialized (
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
from told as t cross join lateral (select o.* from rowcast.changes as o where o.seq = t.seq offset 0) as c
cross join size as s order by c.seq;

-- name: limits_of_topics
-- The same for some topics, and without the rights that end. From the index, however many changes there are.
-- $1 first seq bigint   $2 last seq bigint   $3 topics text[]
select c.seq, c.tx, c.at, c.schema_name, c.table_name, c.model, c.topic, 'limit' as kind, '{}' as key, null as record,
       null as changed, null as actor, false as revokes, null as revokes_user, null as revokes_topic
from unnest($3::text []) as t (topic)
cross join lateral (
    select l.seq from rowcast.log as l
    where (l.topic, l.seq) >= (t.topic, $1) and (l.topic, l.seq) <= (t.topic, $2)
    order by l.topic desc, l.seq desc limit 1
) as last
cross join lateral (select o.* from rowcast.changes as o where o.seq = last.seq offset 0) as c order by c.seq;

-- name: continuity
-- The term that a position lies in, and how far that term's numbers are on record, or were until they were dropped. A
-- position beyond that was given out and lost in a crash, or never given out at all. Below the floor nothing is known.
-- $1 seq bigint
with mine as (
    select t.term, t.base, (select min(n.base) from rowcast.terms as n where n.term > t.term) as next
    from rowcast.terms as t where t.base <= $1 order by t.term desc limit 1
)
select
    (select t.epoch from rowcast.terms as t order by t.term desc limit 1) as epoch,
    rowcast.log_floor() as floor,
    (select greatest(
        m.base,
        (select max(l.seq) from rowcast.log as l where l.seq < coalesce(m.next, 9223372036854775807)),
        (select max(s.last_seq) from rowcast.segments as s
         where s.last_seq >= m.base and s.last_seq < coalesce(m.next, 9223372036854775807)))
     from mine as m) as recorded_end;

-- name: expired
-- The statements that do away with tables of segments that are retired, in their order. Detached concurrently, since
-- otherwise everybody who writes would wait behind one who reads; a detaching that was cut off is brought to its end.
select step.statement
from rowcast.segments as s
cross join (values ('log', 1), ('events', 2)) as t (parent, place)
cross join lateral (select to_regclass(format('rowcast.%I', t.parent || '_' || s.segment)) as relation) as r
left join pg_inherits as i on i.inhrelid = r.relation
cross join lateral (
    select 1 as place, format('alter table rowcast.%I detach partition %s %s', t.parent, r.relation,
        case when i.inhdetachpending then 'finalize' else 'concurrently' end) as statement where i.inhrelid is not null
    union all
    select 2, format('drop table %s', r.relation)
) as step
where r.relation is not null and case t.parent when 'log' then s.log_dropped else s.events_dropped end
order by s.segment, t.place, step.place;

-- name: retire_segments
-- $1 keep interval
select rowcast.retire_segments($1);

-- name: make_segment
-- One is always ready to be opened.
select rowcast.make_segment() where not exists (select from rowcast.segments as s where s.opened_at is null);

-- name: segment_due
-- $1 age interval
select rowcast.segment_due($1);

-- name: segments
-- How many lie ahead, and where the log begins.
select count(*) filter (where s.opened_at is null) as ahead, rowcast.log_floor() as floor
from rowcast.segments as s;

-- name: readable_from
-- Where in the log each right to a topic began, as far as that is known, and whether a beginning still waits for its
-- number: then its transaction is not in the snapshot in which events were last looked for.
-- $1 schema text   $2 users text[]   $3 topics text[], as many
select asked.place, asked.user_id, asked.topic, known.begun, known.pending
from unnest($2::text[], $3::text[]) with ordinality as asked (user_id, topic, place)
cross join lateral (
    with given as (
        select max(g.seq) as seq from rowcast.grants as g join rowcast.watched as w on w.id = g.watch
        where w.schema_name = $1 and g.topic = asked.topic and g.user_id = asked.user_id
        union all
        select max(g.seq) from rowcast.grants as g join rowcast.watched as w on w.id = g.watch
        where w.schema_name = $1 and g.topic = asked.topic and g.user_id is null
        union all
        select max(g.seq) from rowcast.grants as g join rowcast.watched as w on w.id = g.watch
        where w.schema_name = $1 and g.topic is null and g.user_id = asked.user_id
    )
    select
        coalesce((select max(g.seq) from given as g), 0) as begun,
        exists (
            select from (select b.snapshot from rowcast.batches as b order by b.last_seq desc limit 1) as seen
            join rowcast.events as e on e.xid >= pg_snapshot_xmin(seen.snapshot) and not pg_visible_in_snapshot(e.xid, seen.snapshot)
            join rowcast.watched as w on w.id = e.watch
            where e.grants is not null and w.schema_name = $1
              and coalesce(e.grants ->> 'user', asked.user_id) = asked.user_id
              and coalesce(e.grants ->> 'topic', asked.topic) = asked.topic
        ) as pending
) as known;

-- name: store_dead_letters
-- Every daemon reads the log and meets the same invalid change; one letter is enough.
-- $1 seq bigint   $2 pack text   $3 reason text
insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
select c.seq, $2, c.schema_name, c.table_name, c.topic, c.kind::rowcast.kind, c.key::json, c.record::json, $3
from rowcast.changes as c where c.seq = $1
on conflict do nothing;

-- name: send_heartbeat
-- Proves the path from NOTIFY to this listener. Asking for the queue's usage also frees what nobody needs any
-- more: a queue that was full stays so until somebody asks.
-- $1 channel text
select pg_notify($1, ''), pg_notification_queue_usage() as usage;

-- name: notify_readers
-- The leader wakes the other daemons. A transaction of its own, that nobody waits for.
select pg_notify('rowcast_log', '');

-- name: dead_letters
-- The newest letters that are meant, oldest first. Never their records: a list is shown, and pasted elsewhere.
-- $1 seqs bigint[], null for all   $2 pack text, null for all   $3 table text, null for all   $4 most bigint, null for all
select * from (
    select d.seq, to_char(d.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as at, d.pack, d.schema_name, d.table_name,
           d.topic, d.kind::text as kind, d.key::text as key, d.reason, (to_jsonb(d) - 'record')::text as json
    from rowcast.dead_letters as d
    where ($1::bigint [] is null or d.seq = any ($1)) and ($2::text is null or d.pack = $2)
      and ($3::text is null or d.table_name = $3)
    order by d.seq desc limit $4
) as newest order by seq;

-- name: dead_letter
-- Made readable here, where numbers keep all their digits.
-- $1 seq bigint
select jsonb_pretty(to_jsonb(d)) from rowcast.dead_letters as d where d.seq = $1;

-- name: drop_dead_letters
-- $1 seqs bigint[]
with gone as (delete from rowcast.dead_letters where seq = any ($1) returning seq)
select count(*) from gone;

-- name: lock_row
-- The statement that locks the row of a key ($1 json) and says whether it lives; null if its table is gone.
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

-- name: lock_dead_letters
-- Before any letter is locked: whoever purges has locked the table, and would wait for that letter.
lock table rowcast.dead_letters in row exclusive mode;

-- name: check_replayable
-- Why each letter of one row cannot be replayed; null if it can. Its content must still be the newest there is, its
-- removal too: nothing about the row, and nothing lost of its table, came after it in the log or waits for its number.
-- What is replayed together is replayed in order, so a letter that carries content does not outdate an older one.
-- $1 seqs bigint[]   $2 lives boolean, of the row now
with later as (
    select d.seq, f.watch, f.topic, f.kind, f.key::text as key
    from rowcast.dead_letters as d
    join rowcast.log as l using (seq)
    join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
    cross join lateral (
        select m.xid, m.event_id from rowcast.log as m
        where m.row_hash = hashtextextended(e.key::text, e.watch) and m.seq > d.seq
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
    when d.kind not in ('delete', 'leave') and not $2 then 'gone'
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
-- As new events, whose numbers the sequencer gives. The letter says what is told, the event who did it.
-- $1 seqs bigint[]
with letter as (
    delete from rowcast.dead_letters where seq = any ($1) returning *
), replayed as (
    insert into rowcast.events (watch, topic, kind, key, record, changed, actor, revokes)
    select e.watch, d.topic, d.kind, d.key, d.record, e.changed, e.actor, e.revokes
    from letter as d join rowcast.log as l using (seq)
    join rowcast.events as e on e.xid = l.xid and e.id = l.event_id
    order by d.seq
    returning id
)
select count(*), rowcast.ring() from replayed;
