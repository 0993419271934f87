-- Sample data: a mailbox with four senders. `daemon up` and `daemon seed` load it; loading it again is safe.
--
-- It has no OAuth tokens, because only the application has the key that encrypts them.

insert into email_unsubscribe.users (id, subject, created_at)
values ('01JH000000VSER00000000WNER', 'demo|owner', now() - interval '30 days')
on conflict do nothing;

insert into email_unsubscribe.sessions (id, user_id, started_at)
values ('01JH000000SESS00000000000A', '01JH000000VSER00000000WNER', now() - interval '1 hour')
on conflict do nothing;

insert into email_unsubscribe.allow_list (id, entry_type, value, created_at)
values
    ('01JH000000A110W00000000001', 'domain', 'bank.example', now() - interval '20 days'),
    ('01JH000000A110W00000000002', 'email', 'grandma@family.example', now() - interval '20 days')
on conflict do nothing;

-- One statement, so that each sender is published once, with complete data.
with attempts as (
    insert into email_unsubscribe.unsubscribe_history
        (id, sender, unsubscribe_url, method, attempted_at, status, failure_reason)
    select d.id, d.sender, d.unsubscribe_url, d.method, now() - d.age::interval, d.status, d.failure_reason
    from (values
        ('01JH000000TRY0000000000001', 'news@shop.example', 'https://shop.example/u?token=demo', 'one_click', '9 days',
         'succeeded', null),
        ('01JH000000TRY0000000000002', 'offers@pushy.example', 'https://pushy.example/leave/demo', 'link', '8 days',
         'succeeded', null),
        ('01JH000000TRY0000000000003', 'digest@forum.example', 'mailto:leave@forum.example?subject=demo', 'mailto',
         '7 days', 'failed', 'the letter came back')
    ) as d (id, sender, unsubscribe_url, method, age, status, failure_reason)
    on conflict do nothing
    returning 1
), emails as (
    insert into email_unsubscribe.sender_emails (message_id, sender, received_at)
    select d.message_id, d.sender, now() - d.age::interval
    from (values
        ('demo-1', 'news@shop.example', '20 days'),
        ('demo-2', 'news@shop.example', '12 days'),
        ('demo-3', 'offers@pushy.example', '19 days'),
        ('demo-4', 'offers@pushy.example', '6 days'),
        ('demo-5', 'offers@pushy.example', '2 days'),
        ('demo-6', 'digest@forum.example', '10 days'),
        ('demo-7', 'statement@bank.example', '15 days')
    ) as d (message_id, sender, age)
    on conflict do nothing
    returning 1
)
select (select count(*) from attempts) as attempts, (select count(*) from emails) as emails;
