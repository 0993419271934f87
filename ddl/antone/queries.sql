-- The core queries of an application; take them from here. Tests check that the plan of each uses its intended index,
-- over tables large enough for the planner to care.

-- name: author_by_platform_id
-- $1 platform   $2 the platform's id of the author
select a.* from antone.authors as a where a.platform = $1 and a.platform_id = $2;

-- name: author_by_handle
-- $1 platform   $2 handle
select a.* from antone.authors as a where a.platform = $1 and a.handle = $2;

-- name: power_users
-- Power users are few: the index finds them, and sorting them is cheap.
select a.* from antone.authors as a where a.is_power_user order by a.last_seen_at desc limit 50;

-- name: post_by_platform_id
-- $1 platform   $2 the platform's id of the post
select p.* from antone.posts as p where p.platform = $1 and p.platform_post_id = $2;

-- name: newest_posts_of_platform
-- $1 platform   $2 how many. For the next page add: and p.detected_at < (the last row's)
select p.* from antone.posts as p where p.platform = $1 order by p.detected_at desc limit $2;

-- name: posts_to_process
-- $1 how many
select p.* from antone.posts as p where p.processed_at is null limit $1;

-- name: newest_posts_of_author
-- $1 author   $2 how many
select p.* from antone.posts as p where p.author_id = $1 order by p.detected_at desc limit $2;

-- name: decisions_of_post
-- $1 post
select d.* from antone.decisions as d where d.post_id = $1;

-- name: newest_decisions
-- $1 how many
select d.* from antone.decisions as d order by d.created_at desc limit $1;

-- name: best_decisions
-- $1 how many
select d.* from antone.decisions as d order by d.composite_score desc limit $1;

-- name: decisions_of_mode
-- For a rare mode, such as DISENGAGED. $1 mode
select d.* from antone.decisions as d where d.mode = $1;

-- name: decisions_of_variant
-- $1 variant
select d.* from antone.decisions as d where d.experiment_variant = $1;

-- name: randomized_decisions
select d.* from antone.decisions as d where d.is_randomized_experiment;

-- name: replies_to_approve
-- $1 how many, oldest first: few are pending at any time
select r.* from antone.replies as r where r.approval_status = 'PENDING' order by r.created_at limit $1;

-- name: newest_replies
-- $1 since when
select r.* from antone.replies as r where r.posted_at >= $1 order by r.posted_at desc;

-- name: newest_replies_of_platform
-- $1 platform   $2 before when: the last row's posted_at of the previous page   $3 how many
select r.* from antone.replies as r
where r.platform = $1 and r.posted_at < $2 order by r.posted_at desc limit $3;

-- name: reply_by_platform_post_id
-- $1 the platform's id of the reply
select r.* from antone.replies as r where r.platform_post_id = $1;

-- name: replies_of_decision
-- $1 decision
select r.* from antone.replies as r where r.decision_id = $1;

-- name: open_escalations
-- The most urgent first.
select e.* from antone.escalations as e where e.status = 'OPEN' order by e.priority desc limit 50;

-- name: newest_escalations
-- $1 how many
select e.* from antone.escalations as e order by e.created_at desc limit $1;

-- name: weight_adjustments_since
-- $1 date
select w.* from antone.weight_adjustment_logs as w where w.date >= $1 order by w.date;
