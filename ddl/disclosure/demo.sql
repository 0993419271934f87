-- Sample data: two people, and secrets in every state. `daemon up` and `daemon seed` load it; loading it again is safe.
--
-- The secrets are real ciphertext that anybody can open: AES-256-GCM under a key of 32 zero bytes, without additional
-- data. Here, nonces identify them, because their ids come from a sequence.

insert into disclosure.users (id, name, created_at)
select d.id, d.name, now() - interval '90 days'
from (values
    ('01JH000000VSER0000000A11CE', 'Alice Archer'),
    ('01JH000000VSER000000000B0B', 'Bob Baker')
) as d (id, name)
on conflict do nothing;

insert into disclosure.secrets (
    user_id, title, ciphertext, iv, auth_tag, key_id, check_in_days, last_check_in, status, retry_count, last_retry_at,
    created_at
)
select d.user_id, d.title, decode(d.ciphertext, 'hex'), decode(d.iv, 'hex'), decode(d.auth_tag, 'hex'), 'demo',
       d.check_in_days, now() - d.silence::interval, d.status, d.retry_count, now() - d.last_retry::interval,
       now() - interval '80 days'
from (values
    ('01JH000000VSER0000000A11CE', 'Safe deposit box', '000000000000000000000001',
     '7da941029f131efcdd6f7dd5f99ad4e6f0258d95e55610fe751bb94ef0f6ecaac462df6f0b79c52266b30cfeb4b11a5eeea9b753b906',
     'dfe538c7532827f725838f613555aec3', 30, '20 days', 'active', 0, null),
    ('01JH000000VSER000000000B0B', 'Will', '000000000000000000000002',
     'ea4453138e92d92641e1e1f6f03ecd0b3f911918a794550cc885a377f7644d8afd3885ad59dd7e',
     '71fa1ee61bedf70f0b40f29680132381', 30, '35 days', 'triggered', 1, '5 days'),
    ('01JH000000VSER0000000A11CE', 'The cat', '000000000000000000000003',
     'edab356685fd47ba526c408490050f67a65d42d208361ca0e06c50961f7bf931ec4c29316e2ded06b03192dd7260c1b275a43782d799dc01'
     || 'ce0f5905e1c251acb2887b4c',
     '0780427c2b1a01f5b56d994afe9c0555', 7, '10 days', 'paused', 0, null),
    ('01JH000000VSER000000000B0B', 'Spare key', '000000000000000000000004',
     '9c568b62132f33d359f1b3e1aad27f35cd4c8fa809de302225d45ac068b70b2c420c8eddcbd1d51d801a9d43535e01aff3ed43',
     '588ba55cf4bb1a4ad9bc71ca0a6c7bd6', 14, '20 days', 'failed', 6, '2 days')
) as d (user_id, title, iv, ciphertext, auth_tag, check_in_days, silence, status, retry_count, last_retry)
on conflict do nothing;

insert into disclosure.recipients (secret_id, email)
select s.id, d.email
from (values
    ('000000000000000000000001', 'carol@example.com'),
    ('000000000000000000000001', 'dave@example.com'),
    ('000000000000000000000002', 'carol@example.com'),
    ('000000000000000000000003', 'eve@example.com'),
    ('000000000000000000000004', 'nobody@mail.example.com')
) as d (iv, email)
join disclosure.secrets as s on s.key_id = 'demo' and s.iv = decode(d.iv, 'hex')
on conflict do nothing;

-- The will was sent at the second attempt; the spare key never reached its recipient.
insert into disclosure.disclosure_log (secret_id, recipient_email, status, error, created_at, sent_at)
select s.id, d.email, d.status, d.error, now() - d.age::interval,
       case when d.status = 'sent' then now() - d.age::interval end
from (values
    ('000000000000000000000002', 'carol@example.com', 'failed', '451 mailbox busy', '121 hours'),
    ('000000000000000000000002', 'carol@example.com', 'sent', null, '120 hours'),
    ('000000000000000000000004', 'nobody@mail.example.com', 'failed', '550 no such user', '48 hours')
) as d (iv, email, status, error, age)
join disclosure.secrets as s on s.key_id = 'demo' and s.iv = decode(d.iv, 'hex')
where not exists (
    select from disclosure.disclosure_log as l
    where l.secret_id = s.id and l.recipient_email = d.email and l.status = d.status
);
