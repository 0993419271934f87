-- Who is present in which topic. Unlogged: after a crash of Postgres the daemons store their people again.
create unlogged table rowcast.presence_leases (
    process text primary key,  -- the process of a daemon that has people
    expires_at timestamptz not null  -- its people are present until then, unless it renews this
);
create unlogged table rowcast.people (
    process text not null,
    topic text not null,
    user_id text not null,
    device text not null,
    schema_name text not null,  -- of the pack that serves the topic
    data text not null,  -- what they say of themselves: a JSON object in ASCII
    since timestamptz not null,
    updated_at timestamptz not null,  -- when they said it
    leaves boolean not null,  -- is disconnected, and has gone unless they come back soon
    constraint people_pkey primary key (process, topic, user_id, device),
    constraint people_process_fkey foreign key (process) references rowcast.presence_leases (process) on delete cascade
);
create index people_place on rowcast.people (topic, user_id, device);

-- The users of whom a pack was told that they are present somewhere.
create table rowcast.users_present (
    schema_name text not null,
    user_id text not null,
    constraint users_present_pkey primary key (schema_name, user_id)
);

-- Up to where each device has processed everything, as it said itself.
create table rowcast.acks (
    user_id text not null,
    device text not null,
    position text not null,
    acked_at timestamptz not null,
    constraint acks_pkey primary key (user_id, device)
);

revoke all on rowcast.presence_leases, rowcast.people, rowcast.users_present, rowcast.acks from public;
