-- Access: which topics an operator may read, and which tables the application may write.

-- May this user follow this topic now? Never null: false for a topic that is unknown or malformed.
--   platform:<PLATFORM>  posts, decisions and replies of a platform: every operator
--   post:<id>            one post with its decisions and replies: every operator
--   escalations          all escalations: every operator
--   operator:<id>        an operator's own row: that operator
-- An operator's id must be spelled as Postgres writes it, lowercase with hyphens, because revocations name it so.
-- Security definer, because the daemon that calls it may not read the application's tables.
create function antone.may_read(user_id text, topic text) returns boolean
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select exists (
               select from antone.operators as o
               where o.deleted_at is null
                 and o.id = case when may_read.user_id ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$'
                                 then may_read.user_id::uuid end
           )
       and coalesce(
               may_read.topic = 'escalations'
               or may_read.topic = 'operator:' || may_read.user_id
               or may_read.topic ~ '^platform:(TWITTER|REDDIT|THREADS)$'
               or may_read.topic ~ '^post:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$',
               false
           )
$$;
comment on function antone.may_read(text, text) is 'Whether this user may follow this topic. Called at every subscribe.';

revoke execute on function antone.may_read(text, text) from public;

-- The application connects as this role, or as a member of it. The role may use rows, but not create tables, types or
-- functions. It has no password, because no file may contain one: `alter role antone_app login password ...`.
-- All databases of the cluster share the role; each database grants its own rights.
do $$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'antone_app') then
        create role antone_app nologin nosuperuser nocreatedb nocreaterole noreplication;
    end if;
exception
    when duplicate_object or unique_violation then
        null;  -- another database of this cluster created it first
    when insufficient_privilege then
        raise warning 'antone: % may not create the role antone_app. Create it, then run the grants of '
            '0005_access.up.sql.', current_user;
end
$$;

do $$
begin
    -- The schema comes from a qualified name, because only those follow `--schema`.
    execute format('grant usage on schema %I to antone_app', split_part('antone.posts', '.', 1));
    grant select, insert, update, delete on
        antone.archetypes, antone.power_tiers, antone.competitor_categories, antone.kpi_types,
        antone.escalation_reasons, antone.champion_tiers, antone.authors, antone.posts, antone.experiments,
        antone.decisions, antone.competitors, antone.competitive_mentions, antone.community_champions,
        antone.kpi_metrics, antone.escalations, antone.weight_adjustment_logs, antone.learning_events,
        antone.randomized_experiments, antone.segmented_weights
    to antone_app;
    -- The application cannot undo the audit trail, nor decide who may read the topics.
    grant select, insert, update on antone.replies to antone_app;
    grant select, insert on antone.audit_logs to antone_app;
    grant select on antone.operators, antone.archived_files to antone_app;
exception when undefined_object then
    null;  -- the role does not exist, and a warning said so
end
$$;
