-- Which tables of AsyncOps are captured, in which topics, and which of their columns are published.
-- E-mail addresses and password hashes never are.
--   team:members, team:status_updates, team:incidents, team:blockers, team:decisions, team:summaries: what concerns all
--   user:<id>      the incidents assigned to the user, and the decisions that the user takes part in
-- Applied at every `daemon --apply-ddl`; watch() does nothing where nothing changed.

-- The application's role reads and writes rows; what the database writes by itself it only reads. Here and not in a
-- revision, so that a role that was made afterwards gets its rights as well.
do $$
begin
    -- The schema's name is read off a qualified one, which follows `--schema`.
    execute format('grant usage on schema %I to asyncops_app', split_part('asyncops.users', '.', 1));
    grant select, insert, update, delete on asyncops.users, asyncops.status_updates, asyncops.incidents, asyncops.blockers,
        asyncops.decisions, asyncops.decision_participants to asyncops_app;
    grant usage on sequence asyncops.users_id_seq, asyncops.status_updates_id_seq, asyncops.incidents_id_seq,
        asyncops.blockers_id_seq, asyncops.decisions_id_seq, asyncops.decision_participants_id_seq to asyncops_app;
    grant select on asyncops.decision_audit_log, asyncops.daily_summaries, asyncops.live_status_updates,
        asyncops.live_incidents, asyncops.live_blockers to asyncops_app;
    grant execute on function asyncops.generate_daily_summary(date), asyncops.archive(integer, timestamptz) to asyncops_app;
exception when undefined_object then
    null;  -- there is no such role: a warning has said so
end
$$;

-- Whoever is deactivated or deleted loses every topic, and gets them back when activated again.
select rowcast.watch(
    'asyncops.users', pack => 'asyncops',
    topic => $$'team:members'$$,
    columns => '{id, full_name, role, is_active, created_at, updated_at}',
    revokes => $$case when r.is_active then jsonb_build_object('user', r.id::text) end$$
);

-- What is archived leaves the feeds, as it leaves the default reads.
select rowcast.watch(
    'asyncops.status_updates', pack => 'asyncops',
    topic => $$'team:status_updates'$$,
    columns => '{id, user_id, title, content, tags, created_at, updated_at}',
    soft_delete => 'archived_at'
);

select rowcast.watch(
    'asyncops.incidents', pack => 'asyncops',
    topic => $$array['team:incidents', 'user:' || r.assigned_to_id]$$,
    columns => '{id, reported_by_id, assigned_to_id, title, description, severity, status, resolution_notes, created_at,
                 updated_at, resolved_at}',
    soft_delete => 'archived_at'
);

select rowcast.watch(
    'asyncops.blockers', pack => 'asyncops',
    topic => $$'team:blockers'$$,
    columns => '{id, reported_by_id, description, impact, status, resolution_notes, related_status_id,
                 related_incident_id, created_at, updated_at, resolved_at}',
    soft_delete => 'archived_at'
);

select rowcast.watch(
    'asyncops.decisions', pack => 'asyncops',
    topic => $$'team:decisions'$$,
    columns => '{id, created_by_id, title, description, context, outcome, decision_date, tags, created_at, updated_at}'
);

select rowcast.watch(
    'asyncops.decision_participants', pack => 'asyncops',
    topic => $$array['team:decisions', 'user:' || r.user_id]$$,
    columns => '{id, decision_id, user_id, created_at}'
);

select rowcast.watch(
    'asyncops.decision_audit_log', pack => 'asyncops',
    topic => $$'team:decisions'$$,
    columns => '{id, decision_id, changed_by_id, change_type, field_name, old_value, new_value, changed_at}'
);

select rowcast.watch(
    'asyncops.daily_summaries', pack => 'asyncops',
    topic => $$'team:summaries'$$,
    columns => '{id, summary_date, content, status_updates_count, incidents_count, blockers_count, decisions_count,
                 generated_at, created_at}'
);
