-- Which tables of the pack are captured, in which topics, and which of their columns are published: ids, times, counts
-- and states. What is encrypted and how, titles, names, addresses and error texts never are.
--   owner:<id>     the user and his secrets
--   secret:<id>   the secret and the log of its disclosure
-- Applied at every `daemon --apply-ddl`; watch() does nothing where nothing changed. The topics are in the rows
-- themselves, so the capture functions look nothing up and need no grants.

-- A user who is deleted loses every topic.
select rowcast.watch(
    'disclosure.users', pack => 'disclosure',
    topic => $$'owner:' || r.id$$,
    columns => '{id, created_at}',
    revokes => $$jsonb_build_object('user', r.id)$$
);

-- A secret is its owner's: with the row, or with another owner, the right to its topic ends.
select rowcast.watch(
    'disclosure.secrets', pack => 'disclosure',
    topic => $$array['owner:' || r.user_id, 'secret:' || r.id]$$,
    columns => '{id, user_id, status, check_in_days, last_check_in, next_check_in, retry_count, last_retry_at,
                 processing_started_at, created_at}',
    revokes => $$jsonb_build_object('user', r.user_id, 'topic', 'secret:' || r.id)$$
);

select rowcast.watch(
    'disclosure.disclosure_log', pack => 'disclosure',
    topic => $$'secret:' || r.secret_id$$,
    columns => '{id, secret_id, status, created_at, sent_at}'
);
