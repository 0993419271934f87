-- user_status follows who is connected, and sync_state what devices have acknowledged.
-- Both functions are security definer, because the daemon that calls them may not write to the application's tables.

-- Who has come is online, unless they chose to be away or busy; who has gone is offline.
create function chatgenius.presence_changed(came text [], went text []) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    insert into chatgenius.user_status as s (user_id, status, last_seen)
    select u.id, 'online', current_timestamp
    from chatgenius.users as u
    where u.id = any (came) and u.deleted_at is null
    order by u.id
    on conflict (user_id) do update
    set status = case when s.status = 'offline' then excluded.status else s.status end, last_seen = excluded.last_seen;

    update chatgenius.user_status as s
    set status = 'offline', last_seen = current_timestamp
    where s.user_id = any (went);
$$;
comment on function chatgenius.presence_changed(text [], text []) is
'Called by the daemon with the users who are present again, and those who are not any more.';

-- One row for each device, and a new time at most every 5 minutes: the change is published to the very device, which
-- acknowledges it in turn. The daemon's transaction holds the locks of these devices in rowcast.acks.
create function chatgenius.acknowledged(users text [], devices text []) returns void
language sql security definer
set search_path = pg_catalog, pg_temp
as $$
    update chatgenius.sync_state as s
    set last_sync = current_timestamp
    from unnest(users, devices) as a (user_id, device)
    where s.user_id = a.user_id and s.sync_type = 'incremental' and s.metadata ->> 'rowcast_device' = a.device
      and s.last_sync < current_timestamp - interval '5 minutes';

    insert into chatgenius.sync_state (user_id, sync_type, metadata)
    select u.id, 'incremental', jsonb_build_object('rowcast_device', a.device)
    from unnest(users, devices) as a (user_id, device)
    join chatgenius.users as u on u.id = a.user_id and u.deleted_at is null
    where not exists (
        select from chatgenius.sync_state as s
        where s.user_id = a.user_id and s.sync_type = 'incremental' and s.metadata ->> 'rowcast_device' = a.device
    );
$$;
comment on function chatgenius.acknowledged(text [], text []) is
'Called by the daemon with the devices that have acknowledged a position, each with its user.';

revoke execute on function chatgenius.presence_changed(text [], text []) from public;
revoke execute on function chatgenius.acknowledged(text [], text []) from public;
