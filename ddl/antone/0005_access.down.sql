-- The role stays, because other databases of the cluster may use it. Its grants in this schema are revoked.
do $$
begin
    execute format('revoke usage on schema %I from antone_app', split_part('antone.posts', '.', 1));
    revoke all on
        antone.archetypes, antone.power_tiers, antone.competitor_categories, antone.kpi_types,
        antone.escalation_reasons, antone.champion_tiers, antone.authors, antone.posts, antone.experiments,
        antone.decisions, antone.competitors, antone.competitive_mentions, antone.community_champions,
        antone.kpi_metrics, antone.escalations, antone.weight_adjustment_logs, antone.learning_events,
        antone.randomized_experiments, antone.segmented_weights, antone.replies, antone.audit_logs,
        antone.operators, antone.archived_files
    from antone_app;
exception when undefined_object then
    null;  -- the role does not exist
end
$$;
drop function antone.may_read(text, text);
