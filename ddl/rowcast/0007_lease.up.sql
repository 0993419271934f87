-- Who numbers events, and until when by the clock of the database. One row, which only the daemon's role may write.
-- `xid` is the transaction that wrote the row: a row that a restore wrote has another xmin, and counts for nothing.
create table rowcast.lease (
    only_row boolean primary key default true constraint lease_has_one_row check (only_row),
    nonce uuid not null,  -- the leader's term
    renewed_at timestamptz not null,
    expires_at timestamptz not null,
    released boolean not null,  -- its holder stopped in order, and every number that it gave is on record
    backend_pid integer,  -- the connection that numbers: the lease ends with it
    backend_start timestamptz,
    xid xid8 not null default pg_current_xact_id()
);
insert into rowcast.lease (nonce, renewed_at, expires_at, released)
values (gen_random_uuid(), clock_timestamp(), clock_timestamp(), false);

-- The nonce names the term wherever it is remembered outside this database. `after_crash`: numbers of the term before
-- may have been lost. `xid` is as in rowcast.lease; null in terms that are older than this column.
alter table rowcast.terms add column nonce uuid;
alter table rowcast.terms add column after_crash boolean not null default true;
alter table rowcast.terms add column xid xid8;
-- squawk-ignore require-concurrent-index-creation -- a small table that only leaders write
create index terms_nonce on rowcast.terms (nonce);
-- squawk-ignore require-concurrent-index-creation
create index terms_base on rowcast.terms (base);

-- Events that could not be numbered and became `limit`, until their dead letters are stored.
create table rowcast.set_aside (
    xid xid8 not null,
    event_id bigint not null,
    after bigint not null,  -- its number will be greater
    watch integer not null,
    topic text not null,
    kind rowcast.kind not null,
    key json not null,
    reason text not null,
    primary key (xid, event_id)
);

-- The nonce of the term that leads; null if none does. A leader whose connection has ended does not lead. Its
-- connection is hidden from a role that may not see it: then the lease has to expire.
create function rowcast.lease_holder() returns uuid
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select l.nonce from rowcast.lease as l
    where l.expires_at > clock_timestamp() and l.xmin = l.xid::xid and exists (
        select from pg_stat_get_activity(l.backend_pid) as a where coalesce(a.backend_start = l.backend_start, true)
    )
$$;

-- Is this number on record: the base of a term, or in the log together with its event, or dropped since?
create function rowcast.on_record(seq bigint) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select seq <= rowcast.log_floor()
        or exists (select from rowcast.terms as t where t.base = on_record.seq)
        or exists (
            select from rowcast.log as l
            cross join lateral (
                select from rowcast.events as e where e.xid = l.xid and e.id = l.event_id offset 0
            ) as e
            where l.seq = on_record.seq
        )
$$;

-- How far a new term begins beyond the newest number on record. At least 2^17, since a crash undoes fewer numbers than
-- that. Then a random part. Then 100,000 numbers for each second since the log was last known to be alive: if this
-- database is an old copy of itself, the numbers that the other past gave in that time are passed over. After three
-- seconds that outweighs the random part, which is for clocks that went back too.
create function rowcast.term_jump(alive_at timestamptz) returns bigint
language sql volatile
set search_path = pg_catalog, pg_temp
as $$
    select 131072 + (random() * 262144)::bigint
        + greatest(0, least(1073741824, 100000 * extract(epoch from clock_timestamp() - alive_at)))::bigint
$$;

-- Is the next segment due? It is once the open one is older than `age`, or has used half of its numbers. Null for an age
-- asks for the numbers alone.
create or replace function rowcast.segment_due(age interval) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select s.opened_at < now() - age or coalesce(
        (select greatest(max(b.last_seq), (select max(l.seq) from rowcast.log as l)) from rowcast.batches as b)
            - (s.segment::bigint << 32) > 2::bigint << 30, false)
    from rowcast.segments as s where s.opened_at is not null and s.closed_xid is null
$$;

-- An older daemon would number without a lease. The lock waits for the batch that it is numbering, the function is what
-- it needs to lead again, and the new term makes it stop.
lock table rowcast.batches in access exclusive mode;
-- squawk-ignore ban-drop-function -- that is the purpose
drop function rowcast.open_term(boolean);
insert into rowcast.terms (term, base, epoch, system_identifier, database_oid, timeline)
select t.term + 1, t.base, t.epoch, t.system_identifier, t.database_oid, t.timeline
from rowcast.terms as t order by t.term desc limit 1;

-- Takes the lease, or keeps the one that is held under the nonce `held`, and opens a term under a new nonce. Returns a
-- null term if another leads. The caller commits synchronously.
-- The lease's row is locked first. A leader that is numbering shares that lock: it still leads, however long its batch
-- takes. What it numbers afterwards finds another nonce, and is not written. Everything below is read under the lock.
--
-- Numbering continues from the stored snapshot. The epoch stays the same while the log is known to be the one that the
-- last term wrote. It changes if the timeline did, if the rows were written by a restore, if a term that the caller has
-- seen (`known`) or a number that it knows to be flushed (`known_seq`) is gone, or if what was last numbered is gone.
-- In another cluster or database old transaction ids mean nothing, so the log is emptied.
-- A term without numbers is succeeded at its own base, so leaders that come and go without events use up nothing. (The
-- first batch of a term is flushed before it is sent, hence no such number can have been sent and lost.)
-- `first_segment`: the events of all segments before it are numbered.
create function rowcast.open_term(
    nonce uuid, held uuid, length interval, next_segment boolean, known uuid, known_seq bigint,
    out term bigint, out epoch text, out base bigint, out snapshot pg_snapshot, out first_segment integer
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    system_identifier constant bigint := (pg_control_system()).system_identifier;
    database_oid constant oid := (select d.oid from pg_database as d where d.datname = current_database());
    timeline constant text := left(pg_walfile_name(pg_current_wal_lsn()), 8);
    lease record;
    holder uuid;
    previous record;
    batch rowcast.batches;
    newest bigint;
    is_foreign boolean;
    same boolean;
    opening integer;
begin
    select l.*, l.xmin = l.xid::xid as genuine into lease from rowcast.lease as l for no key update skip locked;
    if not found then
        if exists (select from rowcast.lease) then
            return;
        end if;
        insert into rowcast.lease (nonce, renewed_at, expires_at, released)
        values (open_term.nonce, clock_timestamp(), clock_timestamp(), false)
        returning *, false as genuine into lease;
    end if;
    holder := rowcast.lease_holder();
    if holder is not null and holder is distinct from held then
        return;
    end if;
    update rowcast.lease as l
    set nonce = open_term.nonce, renewed_at = clock_timestamp(), expires_at = clock_timestamp() + length,
        released = false, backend_pid = pg_backend_pid(), xid = pg_current_xact_id(),
        backend_start = (select a.backend_start from pg_stat_get_activity(pg_backend_pid()) as a);

    select t.*, t.xid is null or t.xmin = t.xid::xid as genuine into previous
    from rowcast.terms as t order by t.term desc limit 1;
    select b.* into batch from rowcast.batches as b order by b.last_seq desc limit 1;
    newest := coalesce(greatest(
        previous.base, batch.last_seq,
        (select max(l.seq) from rowcast.log as l), (select max(s.last_seq) from rowcast.segments as s)), 0);
    is_foreign := previous.term is not null and (
        (previous.system_identifier, previous.database_oid) is distinct from (system_identifier, database_oid)
        or coalesce(pg_snapshot_xmax(batch.snapshot) > pg_snapshot_xmax(pg_current_snapshot()), false));
    if is_foreign then
        truncate rowcast.events, rowcast.log, rowcast.batches, rowcast.tombstones, rowcast.grants, rowcast.set_aside;
        update rowcast.segments as s set closed_xid = '3', numbered_xid = '3' where s.closed_xid is not null;
        batch := null;
    end if;
    -- A leader that has numbered nothing yet continues with every event: 3 is the first normal transaction id.
    snapshot := coalesce(batch.snapshot, case when newest = 0 then '3:3:'::pg_snapshot else pg_current_snapshot() end);
    same := previous.term is not null and previous.timeline = timeline and previous.genuine and not is_foreign
        and batch.last_seq is not null and rowcast.on_record(batch.last_seq)
        and (newest = previous.base or rowcast.on_record(previous.base + 1))
        and (known is null or known_seq < rowcast.log_floor() or rowcast.on_record(known_seq) and exists (
            select from rowcast.terms as t where t.nonce = known and t.xmin = t.xid::xid));

    term := greatest(previous.term, batch.term, 0) + 1;
    epoch := case when same then previous.epoch else left(replace(gen_random_uuid()::text, '-', ''), 12) end;
    base := case
        when newest = 0 or same and newest = previous.base and batch.last_seq = newest then newest
        else newest + rowcast.term_jump(lease.renewed_at)
    end;
    if next_segment then
        select min(s.segment) into opening from rowcast.segments as s where s.opened_at is null;
        if opening is not null then
            update rowcast.segments as s
            set closed_xid = pg_current_xact_id(), last_seq = newest, numbered_xid = pg_snapshot_xmin(snapshot)
            where s.opened_at is not null and s.closed_xid is null;
            update rowcast.segments as s set opened_at = clock_timestamp() where s.segment = opening;
            base := greatest(base, opening::bigint << 32) + (random() * 1073741824)::bigint;
        end if;
    end if;
    select coalesce(min(s.segment), 0) into first_segment
    from rowcast.segments as s where s.closed_xid is null or s.closed_xid > pg_snapshot_xmin(snapshot);
    insert into rowcast.terms (
        term, base, epoch, system_identifier, database_oid, timeline, nonce, xid, after_crash
    )
    values (
        term, base, epoch, system_identifier, database_oid, timeline, open_term.nonce, pg_current_xact_id(),
        not coalesce(lease.genuine and lease.nonce = previous.nonce and (lease.released or lease.nonce = held), false)
    );
    insert into rowcast.batches (last_seq, term, snapshot) values (base, term, snapshot)
    on conflict (last_seq) do update set term = excluded.term, snapshot = excluded.snapshot;
    delete from rowcast.terms as t
    where t.base = open_term.base and t.term < open_term.term and t.started_at < now() - interval '7 days';
end
$$;

-- Turns an event that cannot be numbered into a `limit` event in its place, without reading what may be unreadable, and
-- queues its dead letter. The rights that it ends or begins are kept. If that does not suffice (`attempt` 2), the whole
-- pack is reset, since the topic may be at fault; then (3) every right of the pack ends or begins there too.
-- A row whose deletion is set aside gets no tombstone: its earlier content is removed here.
-- Returns nothing unless the caller leads.
create function rowcast.set_aside(
    leader uuid, event_xid xid8, event_id bigint, after bigint, attempt integer, reason text,
    out pack text, out schema_name name, out table_name name
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    event record;
    shown json := '{}';
    place record;
begin
    perform from rowcast.lease as l where l.nonce = leader and l.xmin = l.xid::xid for share;
    if not found then
        return;
    end if;
    select e.watch, e.kind, e.key, w.pack, w.schema_name, w.table_name into event
    from rowcast.events as e join rowcast.watched as w on w.id = e.watch
    where e.xid = event_xid and e.id = set_aside.event_id;
    pack := event.pack;
    schema_name := event.schema_name;
    table_name := event.table_name;
    if attempt = 1 then
        begin
            if octet_length(convert_to(event.key::text, 'UTF8')) <= 1000 then
                shown := event.key;
            end if;
        exception when others then
            null;  -- the key is what cannot be read
        end;
        insert into rowcast.set_aside (xid, event_id, after, watch, topic, kind, key, reason)
        values (event_xid, set_aside.event_id, after, event.watch, '*' || event.pack, event.kind, shown, reason);
        if event.kind = 'delete' then
            begin
                for place in
                    select l.xid, l.event_id from rowcast.log as l
                    where l.row_hash = hashtextextended(event.key::text, event.watch)
                    union
                    select e.xid, e.id from rowcast.events as e
                    where e.xid >= (
                        select pg_snapshot_xmin(b.snapshot) from rowcast.batches as b order by b.last_seq desc limit 1
                    )
                loop
                    update rowcast.events as e set record = null
                    where e.xid = place.xid and e.id = place.event_id and e.id < set_aside.event_id
                      and e.watch = event.watch and e.key::text = event.key::text and e.record is not null;
                end loop;
                update rowcast.dead_letters as d set record = null
                where (d.schema_name, d.table_name) = (event.schema_name, event.table_name)
                  and d.key::text = event.key::text and d.record is not null;
            exception when data_exception or program_limit_exceeded or internal_error or data_corrupted then
                null;  -- a key that cannot be read is nobody else's
            end;
        end if;
        update rowcast.events as e
        set kind = 'limit', key = '{}', record = null, changed = null, actor = null, bytes = null
        where e.xid = event_xid and e.id = set_aside.event_id;
    else
        update rowcast.events as e
        set topic = '*' || event.pack,
            revokes = case when attempt = 2 then e.revokes when e.revokes is not null then '{}' end,
            grants = case when attempt = 2 then e.grants when e.grants is not null then '{}' end
        where e.xid = event_xid and e.id = set_aside.event_id;
    end if;
end
$$;

revoke all on rowcast.lease, rowcast.set_aside from public;
revoke all on function
    rowcast.lease_holder(), rowcast.on_record(bigint), rowcast.term_jump(timestamptz),
    rowcast.open_term(uuid, uuid, interval, boolean, uuid, bigint),
    rowcast.set_aside(uuid, xid8, bigint, bigint, integer, text)
from public;
