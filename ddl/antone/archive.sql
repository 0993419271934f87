-- The statements of daemon/extensions/antone/archive.py, by name.

-- name: unfinished
-- Files of an interrupted run: their rows were not deleted.
select f.name, f.host, f.directory from antone.archived_files as f where f.completed_at is null order by f.name;

-- name: forget
-- $1 file
delete from antone.archived_files as f where f.name = $1 and f.completed_at is null;

-- name: begin_file
-- $1 file   $2 table   $3 period   $4 host   $5 directory
insert into antone.archived_files (name, table_name, period, host, directory) values ($1, $2, $3, $4, $5);

-- name: complete_file
-- $1 file   $2 rows   $3 hash of the file, in hexadecimal
update antone.archived_files as f set row_count = $2, sha256 = $3, completed_at = now()
where f.name = $1 and f.completed_at is null;

-- name: posts_due
select a.period, min(a.at) as first, max(a.at) as last, count(*) as rows
from antone.posts_to_archive as a group by a.period order by a.period;

-- name: posts_lock
-- Rows locked by others are left for the next run.
-- $1 from when   $2 until when   $3 how many
select p.id
from antone.posts as p join antone.posts_to_archive as a on a.id = p.id
where p.detected_at between $1 and $2
order by p.detected_at, p.id limit $3
for update of p skip locked;

-- name: posts_lock_children
-- The locks on the posts prevent new children; these locks prevent changes to children, and replies to a decision.
-- $1 posts
with d as (
    select x.id from antone.decisions as x where x.post_id = any ($1::uuid []) order by x.id for update
), r as (
    select x.id from antone.randomized_experiments as x join antone.decisions as y on y.id = x.decision_id
    where y.post_id = any ($1::uuid []) order by x.id for update of x
), m as (
    select x.id from antone.competitive_mentions as x where x.post_id = any ($1::uuid []) order by x.id for update
)
select (select count(*) from d) + (select count(*) from r) + (select count(*) from m);

-- name: posts_rows
-- Runs when all locks are held, and leaves out posts that were answered in the meantime. A record has everything that
-- the DELETE removes, and the ids of the escalations that stay.
-- $1 posts
select p.id, (to_jsonb(p) || jsonb_build_object(
    'decisions', coalesce((
        select jsonb_agg(to_jsonb(d) || jsonb_build_object('randomized_experiments', coalesce((
            select jsonb_agg(to_jsonb(r) order by r.created_at, r.id)
            from antone.randomized_experiments as r where r.decision_id = d.id
        ), '[]')) order by d.created_at, d.id)
        from antone.decisions as d where d.post_id = p.id
    ), '[]'),
    'competitive_mentions', coalesce((
        select jsonb_agg(to_jsonb(m) order by m.created_at, m.id)
        from antone.competitive_mentions as m where m.post_id = p.id
    ), '[]'),
    'escalations', coalesce((
        select jsonb_agg(e.id order by e.created_at, e.id) from antone.escalations as e
        where e.post_id = p.id or e.decision_id in (select d.id from antone.decisions as d where d.post_id = p.id)
    ), '[]')
))::text as record
from antone.posts as p join antone.posts_to_archive as a on a.id = p.id
where p.id = any ($1::uuid [])
order by p.detected_at, p.id;

-- name: posts_delete_children
-- One statement, where the trigger on posts would delete post by post: capture runs once per statement.
-- $1 posts
delete from antone.decisions as d where d.post_id = any ($1::uuid []);

-- name: posts_delete
-- $1 posts
delete from antone.posts as p where p.id = any ($1::uuid []);

-- name: kpi_metrics_due
select a.period, min(a.at) as first, max(a.at) as last, count(*) as rows
from antone.kpi_metrics_to_archive as a group by a.period order by a.period;

-- name: kpi_metrics_lock
-- $1 from when   $2 until when   $3 how many
select k.id
from antone.kpi_metrics as k join antone.kpi_metrics_to_archive as a on a.id = k.id
where k.date between $1 and $2
order by k.date, k.id limit $3
for update of k skip locked;

-- name: kpi_metrics_rows
-- Each value as it is written to the file. The metric type also has its name, so that the file is readable on its own.
-- $1 metrics
select k.id, json_build_object(
    'id', k.id, 'date', k.date, 'platform', k.platform, 'metric_type', t.name, 'metric_type_id', k.metric_type_id,
    'metric_name', k.metric_name, 'value', k.value::text,
    'created_at', to_char(k.created_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
)::text as record
from antone.kpi_metrics as k join antone.kpi_types as t on t.id = k.metric_type_id
where k.id = any ($1::uuid [])
order by k.date, k.id;

-- name: kpi_metrics_delete
-- $1 metrics
delete from antone.kpi_metrics as k where k.id = any ($1::uuid []);

-- name: audit_logs_due
select a.period, min(a.at) as first, max(a.at) as last, count(*) as rows
from antone.audit_logs_to_archive as a group by a.period order by a.period;

-- name: audit_logs_lock
-- $1 from when   $2 until when   $3 how many
select l.id
from antone.audit_logs as l join antone.audit_logs_to_archive as a on a.id = l.id
where l.created_at between $1 and $2
order by l.created_at, l.id limit $3
for update of l skip locked;

-- name: audit_logs_rows
-- $1 logs
select l.id, to_jsonb(l)::text as record
from antone.audit_logs as l
where l.id = any ($1::uuid [])
order by l.created_at, l.id;

-- name: audit_logs_delete
-- $1 logs
delete from antone.audit_logs as l where l.id = any ($1::uuid []);
