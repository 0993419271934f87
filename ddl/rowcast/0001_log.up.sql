-- Rowcast's own schema: what the capture triggers write, and the one order that every client sees.

-- The capture functions belong to this role. It may write events and nothing else, so that a hostile caller
-- who bends a trigger gains nothing by it. Roles are shared by all databases of the cluster.
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
        null;  -- another database of this cluster was faster
    when insufficient_privilege then
        raise warning 'rowcast: % may not create the role rowcast_capture; capture functions will run as %. '
            'Create the role and grant it to % to separate them.', current_user, current_user, current_user;
end
$$;

-- A ULID: 48 bits of milliseconds, 10 bits of microseconds within, 70 random bits. Ids of one statement sort
-- in the order they were made; no state is kept, since a rolled-back counter would hand out an id twice.
-- plpgsql, since it keeps its expressions prepared between calls: a fifth of the cost of the same in SQL.
create function rowcast.ulid() returns text
language plpgsql volatile parallel safe
as $$
declare
    a constant bytea := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    u constant bytea := uuid_send(gen_random_uuid());  -- its byte 6 holds a version, the rest is random
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

-- Which tables are captured, and how. Written by rowcast.watch(); a row outlives its table, since events name it.
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
    function_name name,  -- null once it is no longer watched
    definition text not null,
    constraint watched_table_once unique (schema_name, table_name)
);

-- Events and log are kept in segments, which are dropped as a whole once they are old enough. Which one a row goes
-- into is in its number, and no clock has a say in it: segment n of the events holds the ids from n << 40 on, segment n
-- of the log the seqs from n << 32 on. A new segment is begun by going on from there, which no writer notices.
create table rowcast.segments (
    segment integer primary key,
    opened_at timestamptz,  -- null: made ahead
    closed_xid xid8,        -- transactions from here on have written no event into it; null: it is still open
    last_seq bigint,        -- its newest number, once it is closed
    numbered_xid xid8,      -- the events of all transactions before this one have numbers up to last_seq
    log_dropped boolean not null default false,
    events_dropped boolean not null default false
);

create sequence rowcast.event_ids as bigint;

-- One row per change and topic, written in the application's own transaction. Its id says nothing about the
-- order of commits: only the log does. There are no foreign keys here, since writers must never wait.
create table rowcast.events (
    id bigint not null default nextval('rowcast.event_ids'),
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default statement_timestamp(),
    watch integer not null,
    topic text not null,
    kind rowcast.kind not null,
    key json not null,
    record json,  -- null for what carries none, and for the earlier content of a row that was deleted
    changed name [],
    actor text,
    grants jsonb,  -- the right that began with this row
    revokes jsonb  -- the right that ended with this row
) partition by range (id);
-- By this the sequencer looks up what became visible since its last snapshot, and the log what it orders: every index
-- more costs every writer.
create index events_xid on rowcast.events (xid, id);
create index events_grants on rowcast.events (xid) where grants is not null;

-- The order. Dense within a term; transactions are whole, and so are the topics within each of them.
create table rowcast.log (
    seq bigint primary key,
    tx_end bigint not null,  -- the seq of the last event of the same transaction
    xid xid8 not null,
    event_id bigint not null,
    topic text collate "C" not null,
    row_hash bigint  -- of the row that the event is about; null for what is about no single row
) partition by range (seq);
create index log_topic on rowcast.log (topic, seq);
create index log_row on rowcast.log (row_hash) where row_hash is not null;

-- Rows that were deleted, and where, for as long as earlier events of theirs may still have content.
create table rowcast.tombstones (
    watch integer not null,
    key text not null,
    seq bigint not null,
    primary key (watch, key, seq)
);

-- Where rights began. Null stands for every user, or every topic.
create table rowcast.grants (
    seq bigint not null,
    watch integer not null,
    user_id text,
    topic text
);
create index grants_who on rowcast.grants (topic, user_id, seq);
create index grants_seq on rowcast.grants (seq);

-- The log with what it orders, for whoever reads: the daemon, and people in psql. Times are RFC 3339 in UTC.
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

-- One row per reign of a leader. Its numbers are above `base`, which lies far beyond every number that an
-- earlier leader can have given out and lost in a crash: a number once sent never names another event.
create table rowcast.terms (
    term bigint primary key,
    base bigint not null,
    epoch text not null,
    system_identifier bigint not null,
    database_oid oid not null,
    timeline text not null,
    started_at timestamptz not null default clock_timestamp()
);

-- How far the numbering has come: the snapshot in which events were last looked for. A new leader goes on there.
create table rowcast.batches (
    last_seq bigint primary key,
    term bigint not null,
    snapshot pg_snapshot not null
);

-- Changes that their row model refused. They were not sent.
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

-- Statements of lenient tables whose capture failed. Every subscriber of the pack was told to start afresh.
create table rowcast.lost (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    xid xid8 not null default pg_current_xact_id(),
    watch integer not null,
    operation text not null,
    sqlstate text not null,
    reason text not null
);

-- Which extensions a pack asked for, and whether it was Rowcast that created them.
create table rowcast.extensions (
    name name not null,
    wanted_by name not null,  -- a pack's schema
    created boolean not null,
    primary key (name, wanted_by)
);

-- Creates an extension where the server can load it; elsewhere warns, since nothing may depend on it.
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

-- Forgets what a pack asked for, and drops what Rowcast created and no other pack wants.
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

-- Makes the next segment, to be there when it is needed. It is attached and not created in its place, since creating
-- it there would lock out everybody who writes.
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

-- Is it time for the next segment? The one that is open is old enough, or most of its numbers are taken.
create function rowcast.segment_due(age interval) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select s.opened_at < now() - age or (select max(l.seq) from rowcast.log as l) - (s.segment::bigint << 32) > 3::bigint << 30
    from rowcast.segments as s where s.opened_at is not null and s.closed_xid is null
$$;

-- Lets events go on in the next segment, if that is made. A statement and transaction of its own, before open_term:
-- then transactions that begin later than that one write there.
create function rowcast.leave_segment() returns void
language sql
set search_path = pg_catalog, pg_temp
as $$
    select setval('rowcast.event_ids', s.segment::bigint << 40, false)
    from rowcast.segments as s
    where s.opened_at is null and (select i.last_value from rowcast.event_ids as i) < s.segment::bigint << 40
    order by s.segment limit 1
$$;

-- Begins the reign of a new leader, who must hold the leader's lock, or of one that goes on in the next segment after
-- leave_segment(). Commit it synchronously.
-- Within one database and timeline the numbering goes on from the stored snapshot. On a new timeline too, under
-- a new epoch. In another cluster or database (a restore) old transaction ids mean nothing: the log starts anew.
-- `first_segment`: the events of those before it all have their numbers.
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
        snapshot := coalesce(snapshot, '3:3:');  -- 3 is the first transaction id there is: everything is new
    end if;
    term := coalesce(previous.term, 0) + 1;
    epoch := left(md5(concat_ws('/', system_identifier, database_oid, timeline)), 12);
    -- A standby that took over may know nothing of the last reigns: then much farther.
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

-- Up to where the log has been dropped: what came before cannot be told any more.
create function rowcast.log_floor() returns bigint
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(max(s.last_seq), 0) from rowcast.segments as s where s.log_dropped
$$;

-- Closed segments that nobody needs any more are marked here, and their tables detached and dropped afterwards: who
-- reads the log asks for the floor after it has read. Events go only when all of them were numbered in segments of
-- the log that are gone too: a transaction that was open for long has its numbers in a later one.
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

-- Takes the content out of the earlier events and letters of rows that were deleted, and forgets their tombstones.
-- Nobody writes a letter meanwhile, since its content would come from before this: hence the lock, and a statement
-- behind it that sees all letters.
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
    null;  -- the role could not be made, and a warning has said so
end
$$;
