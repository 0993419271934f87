-- Which tables of Antone are captured, their topics, and which columns are published.
--   platform:<PLATFORM>  the platform's posts, decisions and replies
--   post:<id>            one post, its decisions and its replies
--   escalations          all escalations, with their outcome
--   operator:<id>        an operator's own row
-- Authors, raw metrics, signals, error messages and notes are not published: of people, only their posts are.
-- Applied at every `daemon --apply-ddl`; watch() does nothing if nothing changed.
-- Tables come before those that they refer to, in the order in which a writer locks them.

-- The capture functions run as rowcast_capture, which may read only what the topic expressions look up.
do $$
begin
    -- The schema comes from a qualified name, because only those follow `--schema`.
    execute format('grant usage on schema %I to rowcast_capture', split_part('antone.posts', '.', 1));
    grant select (id, platform) on antone.posts to rowcast_capture;
    grant select (id, post_id) on antone.decisions to rowcast_capture;
exception when undefined_object then
    null;  -- the role does not exist: a warning said so, and the functions belong to the role that applies this
end
$$;

-- The application's rights, as in revision 0005: granted again here, so that a role created later gets them too.
do $$
begin
    execute format('grant usage on schema %I to antone_app', split_part('antone.posts', '.', 1));
    grant select, insert, update, delete on
        antone.archetypes, antone.power_tiers, antone.competitor_categories, antone.kpi_types,
        antone.escalation_reasons, antone.champion_tiers, antone.authors, antone.posts, antone.experiments,
        antone.decisions, antone.competitors, antone.competitive_mentions, antone.community_champions,
        antone.kpi_metrics, antone.escalations, antone.weight_adjustment_logs, antone.learning_events,
        antone.randomized_experiments, antone.segmented_weights
    to antone_app;
    grant select, insert, update on antone.replies to antone_app;
    grant select, insert on antone.audit_logs to antone_app;
    grant select on antone.operators, antone.archived_files to antone_app;
exception when undefined_object then
    null;  -- the role does not exist, and a warning said so
end
$$;

select rowcast.soft_deletes(t.relation::regclass, 'deleted_at')
from (values ('antone.replies'), ('antone.operators')) as t (relation);

select rowcast.watch(
    'antone.escalations', pack => 'antone',
    topic => $$'escalations'$$,
    columns => '{id, post_id, decision_id, reply_id, reason_id, priority, status, assigned_to, resolved_by, '
        'created_at, resolved_at}',
    rows => $$topic = 'escalations'$$
);

-- A decision cannot be deleted before its reply, so the lookup also works when the reply is deleted.
select rowcast.watch(
    'antone.replies', pack => 'antone',
    topic => $$array[
        'platform:' || r.platform, (select 'post:' || d.post_id from antone.decisions as d where d.id = r.decision_id)
    ]$$,
    columns => '{id, decision_id, content, archetype_id, platform, platform_post_id, utm_code, help_count, '
        'approval_status, approved_by, approved_at, posted_at, reply_type, created_at, updated_at}',
    soft_delete => 'deleted_at',
    rows => $$r.platform = case when topic ~ '^platform:(TWITTER|REDDIT|THREADS)$' then split_part(topic, ':', 2)::antone.platform end
        or r.decision_id in (
        select d.id from antone.decisions as d
        where d.post_id = case when topic ~ '^post:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then split_part(topic, ':', 2)::uuid end
    )$$
);

select rowcast.watch(
    'antone.decisions', pack => 'antone',
    topic => $$array[
        (select 'platform:' || p.platform from antone.posts as p where p.id = r.post_id), 'post:' || r.post_id
    ]$$,
    columns => '{id, post_id, sss_score, ars_score, evs_score, trs_score, composite_score, mode, archetype_id, '
        'safety_flags, competitor_detected, is_power_user, experiment_id, experiment_variant, '
        'is_randomized_experiment, predicted_mode, created_at}',
    rows => $$r.post_id = case when topic ~ '^post:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then split_part(topic, ':', 2)::uuid end
        or r.post_id in (
            select p.id from antone.posts as p
            where p.platform = case when topic ~ '^platform:(TWITTER|REDDIT|THREADS)$' then split_part(topic, ':', 2)::antone.platform end
        )$$
);

select rowcast.watch(
    'antone.posts', pack => 'antone',
    topic => $$array['platform:' || r.platform, 'post:' || r.id]$$,
    columns => '{id, platform, platform_post_id, author_id, content, detected_at, processed_at, keyword_matches, '
        'keyword_categories, spam_filtered, created_at, updated_at}',
    rows => $$r.platform = case when topic ~ '^platform:(TWITTER|REDDIT|THREADS)$' then split_part(topic, ':', 2)::antone.platform end
        or r.id = case when topic ~ '^post:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then split_part(topic, ':', 2)::uuid end$$
);

-- A deleted operator, softly or not, loses every topic.
select rowcast.watch(
    'antone.operators', pack => 'antone',
    topic => $$'operator:' || r.id$$,
    columns => '{id, name, created_at, updated_at}',
    soft_delete => 'deleted_at',
    revokes => $$jsonb_build_object('user', r.id)$$,
    rows => $$r.id = case when topic ~ '^operator:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then split_part(topic, ':', 2)::uuid end$$
);
