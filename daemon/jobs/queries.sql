-- The statements of the scheduler, by name. A clock of null means the clock of the database, which all daemons share.

-- name: states
-- What is on record about these jobs, also if that is nothing.
-- $1 keys text[]   $2 clock
select
    k.key, t.now, j.due_at, j.retry_at, j.started_at, j.claimed_until, j.last_due_at, j.last_started_at, j.last_ended_at,
    j.succeeded_at, coalesce(j.failures, 0) as failures, j.reason
from (select coalesce($2::timestamptz, clock_timestamp()) as now) as t
cross join unnest($1::text []) with ordinality as k (key, place)
left join rowcast.jobs as j on j.key = k.key
order by k.place;

-- name: register
-- $1 key   $2 when it is due for the first time
insert into rowcast.jobs (key, due_at) values ($1, $2) on conflict (key) do nothing;

-- name: claim
-- Claims a run, unless another daemon has it. In a transaction that stays open, the lock on the row is the claim, and ends
-- with the connection. Once it is committed, it has to be renewed.
-- $1 key   $2 clock   $3 claim whether or not it is due   $4 nonce   $5 how long the claim holds
with claimable as (
    select j.key, t.now
    from (select coalesce($2::timestamptz, clock_timestamp()) as now) as t
    cross join rowcast.jobs as j
    where j.key = $1
      and ($3 or (j.due_at <= t.now and (j.retry_at is null or j.retry_at <= t.now)))
      and (j.claimed_until is null or j.claimed_until <= t.now)
    for update of j skip locked
)
update rowcast.jobs as j set claim = $4::uuid, claimed_until = c.now + $5::interval, started_at = c.now
from claimable as c where j.key = c.key
returning j.due_at, j.failures, c.now;

-- name: renew
-- Null if the claim has been lost: it expired, and another daemon has the run.
-- $1 key   $2 clock   $3 nonce   $4 how long the claim holds from now on
update rowcast.jobs as j set claimed_until = coalesce($2::timestamptz, clock_timestamp()) + $4::interval
where j.key = $1 and j.claim = $3
returning true;

-- name: release
-- Gives a claim up: the run has more to do.
-- $1 key   $2 nonce
update rowcast.jobs as j set claim = null, claimed_until = null, started_at = null where j.key = $1 and j.claim = $2;

-- name: succeed
-- Null if the claim has been lost.
-- $1 key   $2 clock   $3 nonce   $4 the due time that the run was for   $5 the next due time
update rowcast.jobs as j
set due_at = greatest(j.due_at, $5::timestamptz), last_due_at = $4::timestamptz, last_started_at = j.started_at,
    last_ended_at = coalesce($2::timestamptz, clock_timestamp()),
    succeeded_at = coalesce($2::timestamptz, clock_timestamp()),
    failures = 0, reason = null, retry_at = null, started_at = null, claim = null, claimed_until = null
where j.key = $1 and j.claim = $3
returning true;

-- name: fail
-- Null if the claim has been lost.
-- $1 key   $2 clock   $3 nonce   $4 the due time that the run was for   $5 reason   $6 delay of the next attempt
update rowcast.jobs as j
set last_due_at = $4::timestamptz, last_started_at = j.started_at,
    last_ended_at = coalesce($2::timestamptz, clock_timestamp()),
    retry_at = coalesce($2::timestamptz, clock_timestamp()) + $6::interval,
    failures = j.failures + 1, reason = $5, started_at = null, claim = null, claimed_until = null
where j.key = $1 and j.claim = $3
returning true;
