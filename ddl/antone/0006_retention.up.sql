-- How long rows are kept, as views of what may go: `daemon archive antone` moves that to files. What no view shows is
-- kept for ever: replies, authors, and all else. Times are in UTC; a period is archived once all of it is old enough.

-- Posts, each with its decisions, 90 days after it was found, by the day. One that was answered stays with its
-- decisions, since the reply does; one that a person still has to look at stays until that is done; one that was
-- decided on lately stays until the decision is as old (0033).
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

-- Metrics, two years after their day, by the quarter.
create view antone.kpi_metrics_to_archive as
select k.id, k.date as at, to_char(k.date, 'YYYY-"Q"Q') as period
from antone.kpi_metrics as k
where k.date < date_trunc('quarter', now() at time zone 'UTC' - interval '2 years')::date;

-- Audit logs, three years after they were written, by the year.
create view antone.audit_logs_to_archive as
select a.id, a.created_at as at, to_char(a.created_at at time zone 'UTC', 'YYYY') as period
from antone.audit_logs as a
where isfinite(a.created_at)
  and a.created_at < date_trunc('year', now() at time zone 'UTC' - interval '3 years') at time zone 'UTC';
