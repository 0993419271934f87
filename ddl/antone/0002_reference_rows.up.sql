-- The first rows of the lookup tables. Their ids are the same in every database, so that a dashboard, an archive or a
-- test can refer to them. Data only: a revision that changes tables changes no rows.

insert into antone.archetypes (id, name, description)
values
    ('a0000000-0000-4000-8000-000000000001', 'CHECKLIST', 'Steps to tick off, one by one'),
    ('a0000000-0000-4000-8000-000000000002', 'MYTHBUST', 'A common error, and what is true instead'),
    ('a0000000-0000-4000-8000-000000000003', 'COACH', 'Encouragement and one next step'),
    ('a0000000-0000-4000-8000-000000000004', 'STORYLET', 'A short story that somebody may know from themselves'),
    ('a0000000-0000-4000-8000-000000000005', 'HUMOR_LIGHT', 'A light tone where the topic bears it'),
    ('a0000000-0000-4000-8000-000000000006', 'CREDIBILITY_ANCHOR', 'A source or a number that can be checked'),
    ('a0000000-0000-4000-8000-000000000007', 'CONFIDENT_RECOMMENDER', 'One recommendation, with its reason'),
    ('a0000000-0000-4000-8000-000000000008', 'PROBLEM_SOLUTION_DIRECT', 'The problem in a line, then the way out');

insert into antone.power_tiers (id, name, follower_threshold, description)
values
    ('b0000000-0000-4000-8000-000000000001', 'MICRO', 10000, 'Known within one community'),
    ('b0000000-0000-4000-8000-000000000002', 'MACRO', 100000, 'Known across communities'),
    ('b0000000-0000-4000-8000-000000000003', 'MEGA', 1000000, 'Known to the public');

insert into antone.competitor_categories (id, name, description)
values
    ('c0000000-0000-4000-8000-000000000001', 'DIRECT', 'The same kind of product for the same people'),
    ('c0000000-0000-4000-8000-000000000002', 'INDIRECT', 'Another kind of product for the same need'),
    ('c0000000-0000-4000-8000-000000000003', 'SUBSTITUTE', 'What people do without any product');

insert into antone.kpi_types (id, name, description, aggregation_type)
values
    ('d0000000-0000-4000-8000-000000000001', 'ENGAGEMENT', 'Likes, answers, shares', 'SUM'),
    ('d0000000-0000-4000-8000-000000000002', 'REACH', 'How many people have seen a reply', 'SUM'),
    ('d0000000-0000-4000-8000-000000000003', 'CONVERSION', 'Visits and orders by UTM code', 'SUM'),
    ('d0000000-0000-4000-8000-000000000004', 'QUALITY', 'How good replies are held to be', 'AVG'),
    ('d0000000-0000-4000-8000-000000000005', 'SAFETY', 'Escalations and rejected replies', 'SUM');

insert into antone.escalation_reasons (id, name, description, severity)
values
    ('e0000000-0000-4000-8000-000000000001', 'MEDICAL_CLAIM', 'A reply might promise a medical effect', 5),
    ('e0000000-0000-4000-8000-000000000002', 'SAFETY_FLAG', 'Somebody may be in danger', 5),
    ('e0000000-0000-4000-8000-000000000003', 'POWER_USER', 'Many people will read the answer', 3),
    ('e0000000-0000-4000-8000-000000000004', 'LOW_CONFIDENCE', 'The scores do not agree with one another', 2),
    ('e0000000-0000-4000-8000-000000000005', 'NEGATIVE_REACTION', 'A posted reply was received badly', 4);

insert into antone.champion_tiers (id, name, min_engagement, benefits)
values
    ('f0000000-0000-4000-8000-000000000001', 'SUPPORTER', 3, 'A word of thanks'),
    ('f0000000-0000-4000-8000-000000000002', 'ADVOCATE', 10, 'A sample'),
    ('f0000000-0000-4000-8000-000000000003', 'AMBASSADOR', 25, 'Samples, and new products before anybody else');
