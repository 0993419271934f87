-- Sample data: two operators, five authors on each platform, and examples of each step from a post to a reply.
-- `daemon up` and `daemon seed` load it; loading it again is safe. Ids are hashes of names, so they are always the same.

insert into antone.operators (id, name)
select md5('antone demo operator ' || d.n)::uuid, d.name
from (values (1, 'Olga Operator'), (2, 'Piet Proofreader')) as d (n, name)
on conflict do nothing;

-- Five on each platform, with growing reach; the last two are power users.
insert into antone.authors (
    id, platform, platform_id, handle, display_name, follower_count, is_verified, is_power_user, power_tier_id,
    archetype_tags, relationship_score, interaction_history, first_seen_at, last_seen_at
)
select md5(format('antone demo author %s %s', p.platform, d.n))::uuid, p.platform, format('demo-%s', d.n),
       format('demo_%s_%s', lower(p.platform::text), d.name), initcap(d.name), d.followers, d.n = 5,
       d.tier is not null,
       (select t.id from antone.power_tiers as t where t.name = d.tier),
       d.tags::text [], 0.3 + d.n * 0.1, '[{"kind": "reply", "outcome": "thanked"}]',
       now() - interval '60 days', now() - interval '1 day'
from unnest(enum_range(null::antone.platform)) as p (platform)
cross join (values
    (1, 'anna', 120, null, '{}'),
    (2, 'bert', 480, null, '{CHECKLIST}'),
    (3, 'cleo', 2300, null, '{COACH,STORYLET}'),
    (4, 'dora', 18000, 'MICRO', '{CREDIBILITY_ANCHOR}'),
    (5, 'emil', 240000, 'MACRO', '{HUMOR_LIGHT}')
) as d (n, name, followers, tier, tags)
on conflict do nothing;

insert into antone.experiments (id, name, description, variant_a, variant_b, metric, status, start_date)
values
    (
        md5('antone demo experiment 1')::uuid, 'Coach or checklist', 'Which tone is thanked more often',
        'COACH', 'CHECKLIST', 'thanks', 'RUNNING', now() - interval '20 days'
    ),
    (
        md5('antone demo experiment 2')::uuid, 'With or without a source', 'Does a source change anything',
        'WITH_SOURCE', 'WITHOUT_SOURCE', 'clicks', 'DRAFT', null
    )
on conflict do nothing;

-- Two posts of each author, the newer one not processed yet.
insert into antone.posts (
    id, platform, platform_post_id, author_id, content, detected_at, processed_at, keyword_matches,
    keyword_categories, raw_metrics
)
select md5(format('antone demo post %s %s', a.id, d.n))::uuid, a.platform, format('demo-%s-%s', a.platform_id, d.n),
       a.id, d.content, now() - d.age::interval,
       case when d.n = 1 then now() - d.age::interval + interval '2 minutes' end,
       d.keywords::text [], d.categories::text [], jsonb_build_object('likes', 3 * d.n, 'answers', d.n)
from antone.authors as a
cross join (values
    (1, 'I wake up at three every night and cannot get back to sleep. What helps you?', '{sleep,awake}', '{sleep}',
     '3 days'),
    (2, 'Which of the magnesium powders is worth its price?', '{magnesium}', '{supplements}', '2 hours')
) as d (n, content, keywords, categories, age)
where a.platform_id like 'demo-_' and a.handle like 'demo\_%'
on conflict do nothing;

insert into antone.decisions (
    id, post_id, sss_score, ars_score, evs_score, trs_score, composite_score, mode, archetype_id, signals_json,
    is_power_user, experiment_id, experiment_variant, is_randomized_experiment, predicted_mode, created_at
)
select md5(format('antone demo decision %s', p.id))::uuid, p.id, 0.7, 0.6, 0.5, 0.8, 0.65,
       case when a.is_power_user then 'HYBRID' else 'HELPFUL' end::antone.operational_mode,
       (select t.id from antone.archetypes as t where t.name = 'COACH'), '{"question": true}', a.is_power_user,
       md5('antone demo experiment 1')::uuid, 'COACH', true, 'HELPFUL', p.processed_at
from antone.posts as p
join antone.authors as a on a.id = p.author_id
where a.handle like 'demo\_%' and p.platform_post_id like 'demo-demo-_-1'
on conflict do nothing;

insert into antone.randomized_experiments (id, decision_id, predicted_mode, actual_mode, predicted_outcome)
select md5(format('antone demo randomized experiment %s', d.id))::uuid, d.id, 'HELPFUL', d.mode, 0.6
from antone.decisions as d
join antone.posts as p on p.id = d.post_id
where p.platform_post_id like 'demo-demo-_-1' and d.experiment_id = md5('antone demo experiment 1')::uuid
on conflict do nothing;

-- On each platform three posts are answered: one reply is posted, one is approved, one is pending.
insert into antone.replies (
    id, decision_id, content, archetype_id, platform, platform_post_id, utm_code, approval_status, approved_by,
    approved_at, posted_at
)
select md5(format('antone demo reply %s', p.id))::uuid, md5(format('antone demo decision %s', p.id))::uuid,
       'Three things that many people find worth a try: no screen in bed, the same hour every day, a cool room. '
       '—Antone (Vita)',
       (select t.id from antone.archetypes as t where t.name = 'COACH'), p.platform,
       case when d.posted then format('demo-reply-%s', d.n) end, 'demo-sleep', d.status::antone.approval_status,
       case when d.status = 'APPROVED' then 'Olga Operator' end,
       case when d.status = 'APPROVED' then now() - interval '2 days' end,
       case when d.posted then now() - interval '2 days' end
from (values (1, 'APPROVED', true), (2, 'APPROVED', false), (3, 'PENDING', false)) as d (n, status, posted)
join antone.posts as p on p.platform_post_id = format('demo-demo-%s-1', d.n)
on conflict do nothing;

insert into antone.escalations (id, post_id, decision_id, reason_id, priority, status, assigned_to)
select md5(format('antone demo escalation %s', p.id))::uuid, p.id, md5(format('antone demo decision %s', p.id))::uuid,
       (select r.id from antone.escalation_reasons as r where r.name = 'POWER_USER'), 'HIGH', 'OPEN',
       'Piet Proofreader'
from antone.posts as p
where p.platform_post_id = 'demo-demo-5-1'
on conflict do nothing;

insert into antone.competitors (id, name, category_id, primary_mechanism, price_point, brand_keywords)
select md5('antone demo competitor ' || d.n)::uuid, d.name,
       (select c.id from antone.competitor_categories as c where c.name = d.category), d.mechanism, d.price,
       d.keywords::text []
from (values
    (1, 'Slumbera', 'DIRECT', 'magnesium glycinate', 'premium', '{slumbera}'),
    (2, 'Night Tea', 'INDIRECT', 'valerian', 'low', '{nighttea,"night tea"}')
) as d (n, name, category, mechanism, price, keywords)
on conflict do nothing;

insert into antone.competitive_mentions (id, post_id, competitor_id, sentiment, satisfaction, opportunity_score)
select md5(format('antone demo mention %s', p.id))::uuid, p.id, md5('antone demo competitor 1')::uuid, -0.2, 0.4, 0.7
from antone.posts as p
where p.platform_post_id = 'demo-demo-3-2'
on conflict do nothing;

insert into antone.community_champions (id, author_id, tier_id, engagement_count)
select md5(format('antone demo champion %s', a.id))::uuid, a.id,
       (select t.id from antone.champion_tiers as t where t.name = 'SUPPORTER'), 4
from antone.authors as a
where a.platform_id = 'demo-3' and a.handle like 'demo\_%'
on conflict do nothing;

insert into antone.kpi_metrics (id, date, platform, metric_type_id, metric_name, value)
select md5(format('antone demo metric %s %s', p.platform, d.name))::uuid, current_date - 1, p.platform,
       (select t.id from antone.kpi_types as t where t.name = d.type), d.name, d.value
from unnest(enum_range(null::antone.platform)) as p (platform)
cross join (values ('ENGAGEMENT', 'thanks', 12), ('SAFETY', 'escalations', 1)) as d (type, name, value)
where not exists (
    select from antone.kpi_metrics as k where k.id = md5(format('antone demo metric %s %s', p.platform, d.name))::uuid
);

insert into antone.audit_logs (id, entity_type, entity_id, action, actor)
select md5(format('antone demo audit %s', r.id))::uuid, 'reply', r.id, 'approve', 'Olga Operator'
from antone.replies as r
where r.utm_code = 'demo-sleep' and r.approval_status = 'APPROVED'
on conflict do nothing;

insert into antone.weight_adjustment_logs (
    id, action, reason, valid_segments, total_segments, sample_sizes, old_weights, new_weights, predicted_improvement
)
values (
    md5('antone demo weights')::uuid, 'adjust', 'Enough samples in two of three segments', 2, 3,
    '{"TWITTER": 140, "REDDIT": 90, "THREADS": 11}', '{"sss": 0.3, "ars": 0.2, "evs": 0.2, "trs": 0.3}',
    '{"sss": 0.35, "ars": 0.2, "evs": 0.15, "trs": 0.3}', 0.02
)
on conflict do nothing;

insert into antone.learning_events (
    id, adjustment_type, adjustment, predicted_improvement, baseline_performance
)
values (md5('antone demo learning')::uuid, 'weights', '{"sss": 0.05, "evs": -0.05}', 0.02, 0.61)
on conflict do nothing;

insert into antone.segmented_weights (
    id, segment_type, segment_key, sss_weight, ars_weight, evs_weight, trs_weight, sample_size, performance
)
select md5(format('antone demo segment %s', p.platform))::uuid, 'demo_platform', p.platform::text, 0.35, 0.2, 0.15,
       0.3, 100, 0.6
from unnest(enum_range(null::antone.platform)) as p (platform)
on conflict do nothing;
