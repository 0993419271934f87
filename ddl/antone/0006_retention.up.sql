-- Retention: views of the rows that `daemon archive antone` may move to files. All others are kept forever: replies,
-- authors, and the rest. Times are in UTC; a period is archived when all of it is old enough.

-- Posts with their decisions, by day, 90 days after detection. A post stays with its decisions if one of them was
-- answered, because the reply stays (decision 0033). It also stays while it or one of its decisions has an open
-- escalation, and until its newest decision is 90 days old.
create view antone.posts_to_archive as
select p.id, p.detected_at as at, to_char(p.detected_at at time zone 'UTC', 'YYYY-MM-DD') as period
from antone.posts as p
where isfinite(p.detected_at)
  and p.detected_at < (date_trunc('day', now() at time zone 'UTC') - interval '90 days') at time zone 'UTC'
  and not exists (
      select from antone.escalations as e where e.post_id = p.id and e.status in ('OPEN', 'IN_PROGRESS')
  )
  and not exists (
      select from antone.decisions as d
      where d.post_id = p.id and (
          d.created_at >= (date_trunc('day', now() at time zone 'UTC') - interval '90 days') at time zone 'UTC'
          or exists (select from antone.replies as r where r.decision_id = d.id)
          or exists (
              select from antone.escalations as e where e.decision_id = d.id and e.status in ('OPEN', 'IN_PROGRESS')
          )
      )
  );

-- Metrics, by quarter, two years after their day.
create view antone.kpi_metrics_to_archive as
select k.id, k.date as at, to_char(k.date, 'YYYY-"Q"Q') as period
from antone.kpi_metrics as k
where k.date < date_trunc('quarter', now() at time zone 'UTC' - interval '2 years')::date;

-- Audit logs, by year, three years after they were written.
create view antone.audit_logs_to_archive as
select a.id, a.created_at as at, to_char(a.created_at at time zone 'UTC', 'YYYY') as period
from antone.audit_logs as a
where isfinite(a.created_at)
  and a.created_at < date_trunc('year', now() at time zone 'UTC' - interval '3 years') at time zone 'UTC';
