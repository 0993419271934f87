-- The statements of the pack's jobs, by name. Each returns whether there is more to do: then it is run again, in another
-- transaction.

-- name: summary
-- The summary of the day that has ended.
-- $1 when the run was due
select false as more from asyncops.generate_daily_summary(($1::timestamptz at time zone 'UTC')::date - 1);

-- name: archive
-- One batch of rows that are old enough.
-- $1 when the run was due
select a.status_updates + a.incidents + a.blockers > 0 as more from asyncops.archive(as_of => $1::timestamptz) as a;
