-- Which tables are captured, their topics, and which columns are published: ids, times, counts and statuses.
-- Ciphertexts and their parameters, titles, names, addresses and error texts are never published.
--   owner:<id>    the user and the user's secrets
--   secret:<id>   the secret and the log of its disclosure
-- Applied at every `daemon --apply-ddl`; watch() does nothing if nothing changed. The rows contain the
-- ids for the topics, so the capture functions look nothing up and need no grants.
-- Tables come before those that they refer to, in the order in which a writer locks them.

select rowcast.watch(
    'disclosure.disclosure_log', pack => 'disclosure',
    topic => $$'secret:' || r.secret_id$$,
    columns => '{id, secret_id, status, created_at, sent_at}',
    rows => $$r.secret_id = case when topic ~ '^secret:[1-9][0-9]{0,17}$' then split_part(topic, ':', 2)::bigint end$$
);

-- The right to a secret's topic ends when the secret is deleted or gets another owner.
select rowcast.watch(
    'disclosure.secrets', pack => 'disclosure',
    topic => $$array['owner:' || r.user_id, 'secret:' || r.id]$$,
    columns => '{id, user_id, status, check_in_days, last_check_in, next_check_in, retry_count, last_retry_at,
                 processing_started_at, created_at}',
    revokes => $$jsonb_build_object('user', r.user_id, 'topic', 'secret:' || r.id)$$,
    rows => $$r.user_id = split_part(topic, 'owner:', 2) or r.id = case when topic ~ '^secret:[1-9][0-9]{0,17}$' then split_part(topic, ':', 2)::bigint end$$
);

-- A deleted user loses every topic.
select rowcast.watch(
    'disclosure.users', pack => 'disclosure',
    topic => $$'owner:' || r.id$$,
    columns => '{id, created_at}',
    revokes => $$jsonb_build_object('user', r.id)$$,
    rows => $$r.id = split_part(topic, 'owner:', 2)$$
);
