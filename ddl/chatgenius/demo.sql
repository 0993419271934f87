-- Sample data: five people, three channels, a few rows in every table. `daemon up` and `daemon seed` load it; loading
-- it again is safe.
--
-- Ids are valid ULIDs and readable: O is written 0, and I and L are written 1, as in Crockford's base 32.
-- To see rights from two sides: Alice owns and sees all three channels; Eve, a guest, sees only #random.

insert into chatgenius.users (id, auth0_id, email, username, full_name, avatar_url, created_at, updated_at)
select d.id, 'demo|' || d.username, d.username || '@example.com', d.username, d.full_name, null,
       now() - interval '30 days', now() - interval '30 days'
from (values
    ('01JH000000VSER0000000A11CE', 'alice', 'Alice Archer'),
    ('01JH000000VSER000000000B0B', 'bob', 'Bob Baker'),
    ('01JH000000VSER0000000CAR01', 'carol', 'Carol Carter'),
    ('01JH000000VSER00000000DAVE', 'dave', 'Dave Dyer'),
    ('01JH000000VSER000000000EVE', 'eve', 'Eve Ellis')
) as d (id, username, full_name)
on conflict do nothing;

insert into chatgenius.channels (id, name, description, created_at, updated_at)
select d.id, d.name, d.description, now() - interval '29 days', now() - interval '29 days'
from (values
    ('01JH000000CHAN00000GENERA1', 'general', 'What concerns everybody who works here'),
    ('01JH000000CHAN000000RAND0M', 'random', 'Everything else; guests welcome'),
    ('01JH000000CHAN00000001EADS', 'leads', 'Alice and Bob among themselves')
) as d (id, name, description)
on conflict do nothing;

insert into chatgenius.channel_members (channel_id, user_id, role, joined_at)
select d.channel_id, d.user_id, d.role, now() - interval '28 days'
from (values
    ('01JH000000CHAN00000GENERA1', '01JH000000VSER0000000A11CE', 'owner'),
    ('01JH000000CHAN00000GENERA1', '01JH000000VSER000000000B0B', 'admin'),
    ('01JH000000CHAN00000GENERA1', '01JH000000VSER0000000CAR01', 'member'),
    ('01JH000000CHAN00000GENERA1', '01JH000000VSER00000000DAVE', 'member'),
    ('01JH000000CHAN000000RAND0M', '01JH000000VSER0000000A11CE', 'owner'),
    ('01JH000000CHAN000000RAND0M', '01JH000000VSER0000000CAR01', 'member'),
    ('01JH000000CHAN000000RAND0M', '01JH000000VSER000000000EVE', 'guest'),
    ('01JH000000CHAN00000001EADS', '01JH000000VSER0000000A11CE', 'owner'),
    ('01JH000000CHAN00000001EADS', '01JH000000VSER000000000B0B', 'member')
) as d (channel_id, user_id, role)
on conflict do nothing;

insert into chatgenius.messages (id, channel_id, user_id, content, metadata, created_at, updated_at)
select d.id, d.channel_id, d.user_id, d.content, d.metadata::jsonb, now() - d.age::interval, now() - d.age::interval
from (values
    ('01JH000000MSG0000000000001', '01JH000000CHAN00000GENERA1', '01JH000000VSER0000000A11CE', 'Good morning! The new build is out.', null, '3 hours'),
    ('01JH000000MSG0000000000002', '01JH000000CHAN00000GENERA1', '01JH000000VSER000000000B0B', 'Installed, works here.', null, '2 hours 50 minutes'),
    ('01JH000000MSG0000000000003', '01JH000000CHAN00000GENERA1', '01JH000000VSER0000000CAR01', 'The release notes are attached, @dave.', '{"mentions": ["01JH000000VSER00000000DAVE"]}', '2 hours 40 minutes'),
    ('01JH000000MSG0000000000004', '01JH000000CHAN00000GENERA1', '01JH000000VSER00000000DAVE', 'Thank you, I will read them after lunch.', null, '2 hours 35 minutes'),
    ('01JH000000MSG0000000000005', '01JH000000CHAN000000RAND0M', '01JH000000VSER000000000EVE', 'Hello everybody, I am new here.', null, '50 minutes'),
    ('01JH000000MSG0000000000006', '01JH000000CHAN000000RAND0M', '01JH000000VSER0000000CAR01', 'Welcome, Eve!', null, '45 minutes'),
    ('01JH000000MSG0000000000007', '01JH000000CHAN00000001EADS', '01JH000000VSER000000000B0B', 'Shall we tell them on Friday?', null, '20 minutes'),
    ('01JH000000MSG0000000000008', '01JH000000CHAN00000001EADS', '01JH000000VSER0000000A11CE', 'Friday it is.', null, '15 minutes')
) as d (id, channel_id, user_id, content, metadata, age)
on conflict do nothing;

insert into chatgenius.reactions (id, message_id, user_id, emoji, created_at)
select d.id, d.message_id, d.user_id, d.emoji, now() - d.age::interval
from (values
    ('01JH000000REACT00000000001', '01JH000000MSG0000000000001', '01JH000000VSER000000000B0B', '🎉', '2 hours 55 minutes'),
    ('01JH000000REACT00000000002', '01JH000000MSG0000000000001', '01JH000000VSER0000000CAR01', '👍', '2 hours 45 minutes'),
    ('01JH000000REACT00000000003', '01JH000000MSG0000000000005', '01JH000000VSER0000000A11CE', '👋', '40 minutes')
) as d (id, message_id, user_id, emoji, age)
on conflict do nothing;

insert into chatgenius.files (id, message_id, name, type, size, url, created_at)
values (
    '01JH000000F11E000000000001', '01JH000000MSG0000000000003', 'release-notes.pdf', 'application/pdf', 48213,
    'https://files.example.com/release-notes.pdf', now() - interval '2 hours 40 minutes'
)
on conflict do nothing;

insert into chatgenius.message_reads (message_id, user_id, read_at)
values
    ('01JH000000MSG0000000000001', '01JH000000VSER000000000B0B', now() - interval '2 hours 56 minutes'),
    ('01JH000000MSG0000000000001', '01JH000000VSER0000000CAR01', now() - interval '2 hours 46 minutes'),
    ('01JH000000MSG0000000000007', '01JH000000VSER0000000A11CE', now() - interval '16 minutes')
on conflict do nothing;

insert into chatgenius.user_settings (user_id, theme, notifications_enabled, preferences)
values
    ('01JH000000VSER0000000A11CE', 'dark', true, '{"locale": "en"}'),
    ('01JH000000VSER000000000B0B', 'system', true, '{}'),
    ('01JH000000VSER0000000CAR01', 'light', false, '{}')
on conflict do nothing;

insert into chatgenius.user_status (user_id, status, last_seen, custom_status)
values
    ('01JH000000VSER0000000A11CE', 'online', now(), null),
    ('01JH000000VSER000000000B0B', 'busy', now() - interval '5 minutes', 'Reviewing'),
    ('01JH000000VSER0000000CAR01', 'away', now() - interval '30 minutes', null),
    ('01JH000000VSER00000000DAVE', 'offline', now() - interval '2 hours', 'At lunch'),
    ('01JH000000VSER000000000EVE', 'online', now(), null)
on conflict do nothing;

insert into chatgenius.sync_state (id, user_id, last_sync, sync_type, metadata)
values (
    '01JH000000SYNC000000000001', '01JH000000VSER0000000A11CE', now() - interval '1 hour', 'full',
    '{"device": "laptop"}'
)
on conflict do nothing;
