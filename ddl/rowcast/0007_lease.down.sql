drop function rowcast.open_term(uuid, uuid, interval, boolean, uuid, bigint);
drop function rowcast.set_aside(uuid, xid8, bigint, bigint, integer, text);
drop function rowcast.term_jump(timestamptz);
drop function rowcast.on_record(bigint);
drop function rowcast.lease_holder();
drop table rowcast.lease, rowcast.set_aside;
drop index rowcast.terms_base;
alter table rowcast.terms drop column nonce, drop column after_crash, drop column xid;

-- Is the next segment due? It is once the open one is older than `age`, or has used most of its numbers.
create or replace function rowcast.segment_due(age interval) returns boolean
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select s.opened_at < now() - age or (select max(l.seq) from rowcast.log as l) - (s.segment::bigint << 32) > 3::bigint << 30
    from rowcast.segments as s where s.opened_at is not null and s.closed_xid is null
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

revoke all on function rowcast.open_term(boolean) from public;
