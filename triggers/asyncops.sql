-- Which tables of AsyncOps are captured, their topics, and which columns are published.
-- E-mail addresses and password hashes never are.
--   team:members, team:status_updates, team:incidents, team:blockers, team:decisions, team:summaries: the whole team
--   user:<id>      the incidents assigned to the user, and the decisions that the user takes part in
-- Applied at every `daemon --apply-ddl`; watch() does nothing if nothing changed.
-- Tables come before those that they refer to, in the order in which a writer locks them.

-- The application's role may read and write rows, and may only read what triggers write. These grants are here and not
-- in a revision, so that a role created later gets its rights too.
do $$
begin
    -- The schema comes from a qualified name, because only those follow `--schema`.
    execute format('grant usage on schema %I to asyncops_app', split_part('asyncops.users', '.', 1));
    grant select, insert, update, delete on asyncops.users, asyncops.status_updates, asyncops.incidents, asyncops.blockers,
        asyncops.decisions, asyncops.decision_participants to asyncops_app;
    grant usage on sequence asyncops.users_id_seq, asyncops.status_updates_id_seq, asyncops.incidents_id_seq,
        asyncops.blockers_id_seq, asyncops.decisions_id_seq, asyncops.decision_participants_id_seq to asyncops_app;
    grant select on asyncops.decision_audit_log, asyncops.daily_summaries, asyncops.live_status_updates,
        asyncops.live_incidents, asyncops.live_blockers to asyncops_app;
    grant execute on function asyncops.generate_daily_summary(date), asyncops.archive(integer, timestamptz) to asyncops_app;
exception when undefined_object then
    null;  -- the role does not exist, and a warning said so
end
$$;

select rowcast.watch(
    'asyncops.daily_summaries', pack => 'asyncops',
    topic => $$'team:summaries'$$,
    columns => '{id, summary_date, content, status_updates_count, incidents_count, blockers_count, decisions_count,
                 generated_at, created_at}',
    rows => $$topic = 'team:summaries'$$
);

select rowcast.watch(
    'asyncops.decision_audit_log', pack => 'asyncops',
    topic => $$'team:decisions'$$,
    columns => '{id, decision_id, changed_by_id, change_type, field_name, old_value, new_value, changed_at}',
    rows => $$topic = 'team:decisions'$$
);

select rowcast.watch(
    'asyncops.decision_participants', pack => 'asyncops',
    topic => $$array['team:decisions', 'user:' || r.user_id]$$,
    columns => '{id, decision_id, user_id, created_at}',
    rows => $$topic = 'team:decisions' or r.user_id = case when topic ~ '^user:[1-9][0-9]{0,8}$' then split_part(topic, ':', 2)::integer end$$
);

select rowcast.watch(
    'asyncops.decisions', pack => 'asyncops',
    topic => $$'team:decisions'$$,
    columns => '{id, created_by_id, title, description, context, outcome, decision_date, tags, created_at, updated_at}',
    rows => $$topic = 'team:decisions'$$
);

select rowcast.watch(
    'asyncops.blockers', pack => 'asyncops',
    topic => $$'team:blockers'$$,
    columns => '{id, reported_by_id, description, impact, status, resolution_notes, related_status_id,
                 related_incident_id, created_at, updated_at, resolved_at}',
    soft_delete => 'archived_at',
    rows => $$topic = 'team:blockers'$$
);

select rowcast.watch(
    'asyncops.incidents', pack => 'asyncops',
    topic => $$array['team:incidents', 'user:' || r.assigned_to_id]$$,
    columns => '{id, reported_by_id, assigned_to_id, title, description, severity, status, resolution_notes, created_at,
                 updated_at, resolved_at}',
    soft_delete => 'archived_at',
    rows => $$topic = 'team:incidents' or r.assigned_to_id = case when topic ~ '^user:[1-9][0-9]{0,8}$' then split_part(topic, ':', 2)::integer end$$
);

-- Archived rows leave the feeds, as they leave the default reads.
select rowcast.watch(
    'asyncops.status_updates', pack => 'asyncops',
    topic => $$'team:status_updates'$$,
    columns => '{id, user_id, title, content, tags, created_at, updated_at}',
    soft_delete => 'archived_at',
    rows => $$topic = 'team:status_updates'$$
);

-- A deactivated or deleted user loses every topic; activating the account restores them.
select rowcast.watch(
    'asyncops.users', pack => 'asyncops',
    topic => $$'team:members'$$,
    columns => '{id, full_name, role, is_active, created_at, updated_at}',
    revokes => $$case when r.is_active then jsonb_build_object('user', r.id::text) end$$,
    rows => $$topic = 'team:members'$$
);
