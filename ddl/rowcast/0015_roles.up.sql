-- A daemon's role owns nothing. What needs more than reading and writing rows of the log runs with the rights of the
-- functions' owner. All of them have a pinned search_path, and only daemons may call them.
alter function rowcast.leave_segment() security definer;
alter function rowcast.open_term(uuid, uuid, interval, boolean, uuid, bigint) security definer;
alter function rowcast.set_aside(uuid, xid8, bigint, bigint, integer, text) security definer;
alter function rowcast.reset_emptied() security definer;
alter function rowcast.purge(integer) security definer;
alter function rowcast.retire_segments(interval) security definer;
alter function rowcast.capture_canary() security definer;

-- Keeps one segment ahead, ready to be opened. Locks the newest one meanwhile: the leader and the retention may both find
-- that the next is missing.
create function rowcast.make_next_segment() returns integer
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform from rowcast.segments as s order by s.segment desc limit 1 for update;
    if exists (select from rowcast.segments as s where s.opened_at is null) then
        return null;
    end if;
    return rowcast.make_segment();
end
$$;

-- Drops a table of a retired segment, for a role that owns no table. Unlike its owner, it cannot detach concurrently, which
-- no function can. So it waits for open readers only as long as the writers behind it may wait; it is tried again.
create function rowcast.drop_retired(parent text, number integer) returns void
language plpgsql security definer
set search_path = pg_catalog, pg_temp
set lock_timeout = '100ms'
as $$
begin
    if exists (
        select from rowcast.segments as s
        where s.segment = number and case parent when 'log' then s.log_dropped when 'events' then s.events_dropped end
    ) then
        execute format('drop table if exists rowcast.%I', parent || '_' || number);
    end if;
end
$$;

revoke all on function rowcast.make_next_segment(), rowcast.drop_retired(text, integer) from public;
