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

-- One row per change and topic, written in the application's own transaction. Its id says nothing about the
-- order of commits: only the log does. There are no foreign keys here, since writers must never wait.
create table rowcast.events (
    id bigint generated always as identity primary key,
    xid xid8 not null default pg_current_xact_id(),
    at timestamptz not null default statement_timestamp(),
    watch integer not null,
    topic text not null,
    kind rowcast.kind not null,
    key json not null,
    record json,
    changed name [],
    actor text,
    revokes jsonb
);
-- The sequencer looks up what became visible since its last snapshot.
create index events_xid on rowcast.events (xid);

-- The order. Dense within a term; transactions are whole, and so are the topics within each of them.
create table rowcast.log (
    seq bigint primary key,
    tx_end bigint not null,  -- the seq of the last event of the same transaction
    event_id bigint not null,
    topic text collate "C" not null
);
create index log_topic on rowcast.log (topic, seq);

-- The log with what it orders, for whoever reads: the daemon, and people in psql. Times are RFC 3339 in UTC.
create view rowcast.changes as
select l.seq, l.tx_end, e.xid::text as tx,
       to_char(e.at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') as at,
       w.schema_name, w.table_name, w.model, l.topic, e.kind::text as kind,
       e.key::text as key, e.record::text as record, e.changed, e.actor,
       e.revokes is not null as revokes, e.revokes ->> 'user' as revokes_user, e.revokes ->> 'topic' as revokes_topic
from rowcast.log as l
join rowcast.events as e on e.id = l.event_id
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

-- Begins the reign of a new leader, who must hold the leader's lock. Commit it synchronously.
-- Within one database and timeline the numbering goes on from the stored snapshot. On a new timeline too, under
-- a new epoch. In another cluster or database (a restore) old transaction ids mean nothing: the log starts anew.
create function rowcast.open_term(
    out term bigint, out epoch text, out base bigint, out snapshot pg_snapshot
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
begin
    select t.* into previous from rowcast.terms as t order by t.term desc limit 1;
    if previous.term is not null
       and (previous.system_identifier, previous.database_oid) is distinct from (system_identifier, database_oid)
    then
        truncate rowcast.events, rowcast.log, rowcast.batches;
        snapshot := pg_current_snapshot();
    else
        select b.snapshot into snapshot from rowcast.batches as b order by b.last_seq desc limit 1;
        snapshot := coalesce(snapshot, '3:3:');  -- 3 is the first transaction id there is: everything is new
    end if;
    term := coalesce(previous.term, 0) + 1;
    epoch := left(md5(concat_ws('/', system_identifier, database_oid, timeline)), 12);
    base := greatest(previous.base, (select max(l.seq) from rowcast.log as l)) + far;
    base := coalesce(base, 0);
    insert into rowcast.terms (term, base, epoch, system_identifier, database_oid, timeline)
    values (term, base, epoch, system_identifier, database_oid, timeline);
    insert into rowcast.batches (last_seq, term, snapshot) values (base, term, snapshot);
end
$$;

revoke all on all tables in schema rowcast from public;
revoke all on all functions in schema rowcast from public;
grant usage on schema rowcast to public;
grant execute on function rowcast.ulid() to public;
do $$
begin
    grant usage on schema rowcast to rowcast_capture;
    grant insert on rowcast.events, rowcast.lost to rowcast_capture;
exception when undefined_object then
    null;  -- the role could not be made, and a warning has said so
end
$$;
