-- What is on record about each job. A run belongs to the one that has locked the row, or whose nonce is the claim: a claim
-- that has expired can be taken over, and what its former owner then writes here finds another nonce.
create table rowcast.jobs (
    key text primary key,  -- the job's name; name@schema for a pack that lives in another schema than its own
    due_at timestamptz not null,  -- the first due time without a successful run
    retry_at timestamptz,  -- after a failure: when it is tried again
    claim uuid,
    claimed_until timestamptz,
    started_at timestamptz,  -- of the run that is claimed
    last_due_at timestamptz,  -- the due time that the last run was for
    last_started_at timestamptz,
    last_ended_at timestamptz,
    succeeded_at timestamptz,  -- when a run last succeeded
    failures integer not null default 0,  -- since then
    reason text,  -- why the last run failed; null if it did not
    constraint jobs_claim_has_an_end check ((claim is null) = (claimed_until is null))
);
revoke all on rowcast.jobs from public;
