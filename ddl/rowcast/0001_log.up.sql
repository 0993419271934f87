-- Rowcast's own schema: the events that capture triggers write, and the log, the one order that every client sees.

-- The owner of the capture functions. It may insert events and nothing else, so subverting a trigger gains an attacker
-- nothing. Roles are shared by all databases of the cluster.
do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'rowcast_capture') then
        create role rowcast_capture nologin;
    end if;
    if not pg_catalog.pg_has_role(current_user, 'rowcast_capture', 'MEMBER') then
        execute pg_catalog.format('grant rowcast_capture to %I', current_user);
    end if;
exception
    when duplicate_object or unique_violation then
        null;  -- another database of this cluster created it at the same time
    when insufficient_privilege then
        raise warning 'rowcast: % may not create the role rowcast_capture; capture functions will run as %. '
            'Create the role and grant it to % to separate them.', current_user, current_user, current_user;
end
$$;

-- A ULID: 48 bits of milliseconds, 10 bits of microseconds within the millisecond, 70 random bits. Ids made in one
-- statement sort in the order they were made. It keeps no state: a counter that is rolled back would give an id twice.
-- In plpgsql, which keeps its expressions prepared between calls: a fifth of the cost of the same in SQL.
create function rowcast.ulid() returns text
language plpgsql volatile parallel safe
as $$
declare
    a constant bytea := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    u constant bytea := uuid_send(gen_random_uuid());  -- byte 6 holds the version; the low bits of the others are random
    us constant bigint := extract(epoch from clock_timestamp()) * 1000000;
    hi constant integer := us / 1000 >> 25;
    lo constant integer := us / 1000 & 33554431;
    fine constant integer := us % 1000;
begin
    return chr(get_byte(a, hi >> 20)) || chr(get_byte(a, hi >> 15 & 31)) || chr(get_byte(a, hi >> 10 & 31))
        || chr(get_byte(a, hi >> 5 & 31)) || chr(get_byte(a, hi & 31))
        || chr(get_byte(a, lo >> 20)) || chr(get_byte(a, lo >> 15 & 31)) || chr(get_byte(a, lo >> 10 & 31))
        || chr(get_byte(a, lo >> 5 & 31)) || chr(get_byte(a, lo & 31))
        || chr(get_byte(a, fine >> 5)) || chr(get_byte(a, fine & 31))
        || chr(get_byte(a, get_byte(u, 0) & 31)) || chr(get_byte(a, get_byte(u, 1) & 31))
        || chr(get_byte(a, get_byte(u, 2) & 31)) || chr(get_byte(a, get_byte(u, 3) & 31))
        || chr(get_byte(a, get_byte(u, 4) & 31)) || chr(get_byte(a, get_byte(u, 5) & 31))
        || chr(get_byte(a, get_byte(u, 7) & 31)) || chr(get_byte(a, get_byte(u, 8) & 31))
        || chr(get_byte(a, get_byte(u, 9) & 31)) || chr(get_byte(a, get_byte(u, 10) & 31))
        || chr(get_byte(a, get_byte(u, 11) & 31)) || chr(get_byte(a, get_byte(u, 12) & 31))
        || chr(get_byte(a, get_byte(u, 13) & 31)) || chr(get_byte(a, get_byte(u, 14) & 31));
end
$$;
comment on function rowcast.ulid() is 'A new ULID, for a primary key''s default. Sorts by the time it was made (COLLATE "C").';

create type rowcast.kind as enum ('insert', 'update', 'delete', 'restore', 'leave', 'truncate', 'lost');

-- Which tables are captured, and how. Written by rowcast.watch(). A row outlives its table, since events refer to it.
create table rowcast.watched (
    id integer generated always as identity primary key,
    schema_name name not null,
    table_name name not null,
    pack text not null,
    model text not null,
    topic text not null,
    columns name [] not null,
    key name [] not null,
    soft_delete name,
    revokes text,
    per_row boolean not null,
    on_error text not null constraint watched_on_error_known check (on_error in ('strict', 'lenient')),
    function_name name,  -- null once the table is unwatched
    definition text not null,
    constraint watched_table_once unique (schema_name, table_name)
);

-- Events and log are stored in segments, which are dropped as a whole once they are old enough. A row's number alone
-- decides its segment: segment n of the events holds the ids from n << 40, segment n of the log the seqs from n << 32.
-- Numbering opens a segment by jumping to its first number, which blocks no writer.
create table rowcast.segments (
    segment integer primary key,
    opened_at timestamptz,  -- null: made ahead, not opened yet
    closed_xid xid8,        -- transactions from this one on have written no event into it; null: still open
    last_seq bigint,        -- its last seq, once it is closed
    numbered_xid xid8,      -- the events of all transactions before this one have a seq up to last_seq
    log_dropped boolean not null default false,
    events_dropped boolean not null default false
);

create sequence rowcast.event_ids as bigint;

-- One row per change and topic, written in the application's transaction. Ids do not follow the order of commits: only
-- the log defines an order. No foreign keys, since writers must never wait.
create table rowcast.events (
    id bigint not null default nextval('rowcast.event_ids'),
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default statement_timestamp(),
    watch integer not null,
    topic text not null,
    kind rowcast.kind not null,
    key json not null,
    record json,  -- null if the kind carries none, or the row was deleted and purged
    changed name [],
    actor text,
    grants jsonb,  -- the right that began with this row
    revokes jsonb  -- the right that ended with this row
) partition by range (id);
-- The sequencer looks up newly visible transactions by this index, and the log its events. Each further index would cost
-- every writer.
create index events_xid on rowcast.events (xid, id);
create index events_grants on rowcast.events (xid) where grants is not null;

-- The order. Dense within a term. The events of a transaction are adjacent, and so are those of a topic within it.
create table rowcast.log (
    seq bigint primary key,
    tx_end bigint not null,  -- the seq of the last event of the same transaction
    xid xid8 not null,
    event_id bigint not null,
    topic text collate "C" not null,
    row_hash bigint  -- of the event's row; null for events that concern no single row
) partition by range (seq);
create index log_topic on rowcast.log (topic, seq);
create index log_row on rowcast.log (row_hash) where row_hash is not null;

-- The deleted rows whose earlier events may still have content, and the seq of their deletion.
create table rowcast.tombstones (
    watch integer not null,
    key text not null,
    seq bigint not null,
    primary key (watch, key, seq)
);

-- Where rights began. Null means every user, or every topic.
create table rowcast.grants (
    seq bigint not null,
    watch integer not null,
    user_id text,
    topic text
);
create index grants_who on rowcast.grants (topic, user_id, seq);
create index grants_seq on rowcast.grants (seq);

-- The log joined with its events, for the daemon and for people in psql. Times are RFC 3339 in UTC.
create view rowcast.changes as
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

-- One row per term of a leader. Its numbers are above `base`, which lies far beyond every number that an earlier term
-- can have given out and lost in a crash: a number that was sent never names another event.
create table rowcast.terms (
    term bigint primary key,
    base bigint not null,
    epoch text not null,
    system_identifier bigint not null,
    database_oid oid not null,
    timeline text not null,
    started_at timestamptz not null default clock_timestamp()
);

-- How far the numbering has come: the snapshot of each batch. A new leader continues from the newest one.
create table rowcast.batches (
    last_seq bigint primary key,
    term bigint not null,
    snapshot pg_snapshot not null
);

-- Changes that failed validation by their row model. They were not sent.
create table rowcast.dead_letters (
    seq bigint primary key,
    at timestamptz not null default clock_timestamp(),
    pack text not null,
    schema_name name not null,
    table_name name not null,
    topic text not null,
    kind rowcast.kind not null,
    key json not null,
    record json,
    reason text not null
);

-- Statements on lenient tables that could not be captured. Every subscriber of the pack got a reset.
create table rowcast.lost (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    xid xid8 not null default pg_current_xact_id(),
    watch integer not null,
    operation text not null,
    sqlstate text not null,
    reason text not null
);

-- The extensions that packs asked for, and whether Rowcast created them.
create table rowcast.extensions (
    name name not null,
    wanted_by name not null,  -- a pack's schema
    created boolean not null,
    primary key (name, wanted_by)
);

-- Creates an extension if the server can load it. Otherwise warns, since nothing may depend on it.
create function rowcast.want_extension(wanted_by name, name name) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    made boolean := false;
begin
    if not exists (select from pg_extension as e where e.extname = want_extension.name) then
        begin
            execute format('create extension %I with schema public', name);
            made := true;
        exception when others then
            raise warning 'extension % is not available here (%); nothing depends on it', name, sqlerrm;
            return;
        end;
    end if;
    insert into rowcast.extensions (name, wanted_by, created)
    values (name, wanted_by, made or exists (
        select from rowcast.extensions as x where x.name = want_extension.name and x.created
    ))
    on conflict do nothing;
end
$$;

-- Withdraws a pack's requests, and drops the extensions that Rowcast created and no other pack asked for.
create function rowcast.drop_extensions(wanted_by name) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gone record;
begin
    for gone in
        delete from rowcast.extensions as x where x.wanted_by = drop_extensions.wanted_by
        returning x.name, x.created
    loop
        if gone.created and not exists (select from rowcast.extensions as x where x.name = gone.name) then
            begin
                execute format('drop extension if exists %I', gone.name);
            exception when dependent_objects_still_exist then
                raise warning 'extension % stays: something else uses it', gone.name;
            end;
        end if;
    end loop;
end
$$;

-- Makes the next segment ahead of its use. Its tables are created on their own and attached, since `create table ...
-- partition of` would lock out all writers.
create function rowcast.make_segment() returns integer
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

-- Is the next segment due? It is once the open one is older than `age`, or has used most of its numbers.
create function rowcast.segment_due(age interval) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select s.opened_at < now() - age or (select max(l.seq) from rowcast.log as l) - (s.segment::bigint << 32) > 3::bigint << 30
    from rowcast.segments as s where s.opened_at is not null and s.closed_xid is null
$$;

-- Makes events continue in the next segment, if there is one. Run it in a transaction of its own before open_term: then
-- every transaction that begins after open_term's writes there.
create function rowcast.leave_segment() returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select setval('rowcast.event_ids', s.segment::bigint << 40, false)
    from rowcast.segments as s
    where s.opened_at is null and (select i.last_value from rowcast.event_ids as i) < s.segment::bigint << 40
    order by s.segment limit 1
$$;

-- Opens a term for a new leader, or, after leave_segment(), for a leader that continues in the next segment. The caller
-- must hold the leader lock, and commit synchronously.
-- The numbering continues from the stored snapshot: on the same timeline in the same epoch, on a new timeline in a new
-- one. In another cluster or database (a restore) old transaction ids mean nothing, so the log is emptied.
-- `first_segment`: the events of all segments before it are numbered.
create function rowcast.open_term(
    next_segment boolean,
    out term bigint, out epoch text, out base bigint, out snapshot pg_snapshot, out first_segment integer
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    far constant bigint := 10000000;
    system_identifier constant bigint := (pg_control_system()).system_identifier;
    database_oid constant oid := (select d.oid from pg_database as d where d.datname = current_database());
    timeline constant text := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    previous rowcast.terms;
    newest bigint;
    opening integer;
begin
    select t.* into previous from rowcast.terms as t order by t.term desc limit 1;
    newest := greatest(previous.base, (select max(l.seq) from rowcast.log as l));
    if previous.term is not null
       and (previous.system_identifier, previous.database_oid) is distinct from (system_identifier, database_oid)
    then
        truncate rowcast.events, rowcast.log, rowcast.batches, rowcast.tombstones, rowcast.grants;
        update rowcast.segments as s set closed_xid = '3', numbered_xid = '3' where s.closed_xid is not null;
        snapshot := pg_current_snapshot();
    else
        select b.snapshot into snapshot from rowcast.batches as b order by b.last_seq desc limit 1;
        snapshot := coalesce(snapshot, '3:3:');  -- 3 is the first normal transaction id: every event is new
    end if;
    term := coalesce(previous.term, 0) + 1;
    epoch := left(md5(concat_ws('/', system_identifier, database_oid, timeline)), 12);
    -- A promoted standby may have missed the last terms, so it jumps much farther.
    base := coalesce(newest + case when previous.timeline = timeline then far else 100 * far end, 0);
    if next_segment then
        select min(s.segment) into opening from rowcast.segments as s where s.opened_at is null;
        if opening is not null then
            update rowcast.segments as s
            set closed_xid = pg_current_xact_id(), last_seq = newest, numbered_xid = pg_snapshot_xmin(snapshot)
            where s.opened_at is not null and s.closed_xid is null;
            update rowcast.segments as s set opened_at = clock_timestamp() where s.segment = opening;
            base := greatest(base, opening::bigint << 32);
        end if;
    end if;
    select coalesce(min(s.segment), 0) into first_segment
    from rowcast.segments as s where s.closed_xid is null or s.closed_xid > pg_snapshot_xmin(snapshot);
    insert into rowcast.terms (term, base, epoch, system_identifier, database_oid, timeline)
    values (term, base, epoch, system_identifier, database_oid, timeline);
    insert into rowcast.batches (last_seq, term, snapshot) values (base, term, snapshot);
end
$$;

-- The last seq that was dropped from the log: changes up to it cannot be read any more.
create function rowcast.log_floor() returns bigint
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(max(s.last_seq), 0) from rowcast.segments as s where s.log_dropped
$$;

-- Marks segments that were closed more than `keep` ago. Their tables are detached and dropped afterwards: readers check
-- the floor after reading, so they notice. A segment's events are dropped only once every log segment that numbers them
-- is dropped too: the events of a long transaction get their numbers in a later segment.
create function rowcast.retire_segments(keep interval) returns void
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

-- Removes the content of earlier events and dead letters of deleted rows, then the rows' tombstones. The lock keeps dead
-- letters with that content from being stored meanwhile, and the statement after it sees all that are stored.
create function rowcast.purge(most integer, out rows bigint, out emptied bigint)
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

select rowcast.make_segment(), rowcast.make_segment();
update rowcast.segments set opened_at = clock_timestamp() where segment = 0;

revoke all on all tables in schema rowcast from public;
revoke all on all sequences in schema rowcast from public;
revoke all on all functions in schema rowcast from public;
grant usage on schema rowcast to public;
grant execute on function rowcast.ulid() to public;
do $$
begin
    grant usage on schema rowcast to rowcast_capture;
    grant insert on rowcast.events, rowcast.lost to rowcast_capture;
    grant usage on sequence rowcast.event_ids to rowcast_capture;
exception when undefined_object then
    null;  -- the role could not be created; a warning was raised then
end
$$;
