-- What `daemon check` verifies in Antone's schema: one row for each problem, with its remedy; no rows if all is well.
-- It only reads catalogs. The schema must be as the revisions made it, and additions must follow the same rules: each
-- foreign key says what a DELETE does, each required timestamp has a default, names follow one pattern.
with pack as (
    select n.oid, n.nspname as name
    from pg_namespace as n where n.nspname = split_part('antone.posts', '.', 1)
), tables as (
    select c.oid, c.relname as name, format('%I.%I', p.name, c.relname) as place
    from pg_class as c join pack as p on p.oid = c.relnamespace
    where c.relkind in ('r', 'p') and c.relname <> 'alembic_version'
), columns as (
    select t.oid, t.name as table_name, format('%s.%I', t.place, a.attname) as place, a.attname as name, a.attnum,
           format_type(a.atttypid, a.atttypmod) as type, a.attnotnull, a.atthasdef,
           format_type(a.atttypid, a.atttypmod) || case when a.attnotnull then ' not null' else '' end as definition
    from tables as t join pg_attribute as a on a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
), constraints as (
    select c.*, t.name as table_name, format('%s on %s', quote_ident(c.conname), t.place) as place,
           (select string_agg(x.name, '_' order by k.n) from unnest(c.conkey) with ordinality as k (attnum, n)
            join columns as x on x.oid = c.conrelid and x.attnum = k.attnum) as columns
    from tables as t join pg_constraint as c on c.conrelid = t.oid and c.contype in ('p', 'u', 'f', 'c')
), indexes as (
    select i.*, t.name as table_name, c.relname as name, format('%I.%I', p.name, c.relname) as place,
           (select string_agg(x.name, ' ' order by k.n)
            from unnest(i.indkey::smallint []) with ordinality as k (attnum, n)
            join columns as x on x.oid = i.indrelid and x.attnum = k.attnum) as columns
    from tables as t join pg_index as i on i.indrelid = t.oid
    join pg_class as c on c.oid = i.indexrelid cross join pack as p
), expected_columns as (
    select e.table_name, split_part(line, ' ', 1) as name,
           substr(line, length(split_part(line, ' ', 1)) + 2) as definition
    from (values
        ('archetypes', $$
            id uuid not null
            name character varying(50) not null
            description text not null
            is_active boolean not null
        $$),
        ('power_tiers', $$
            id uuid not null
            name character varying(50) not null
            follower_threshold integer not null
            description text not null
        $$),
        ('competitor_categories', $$
            id uuid not null
            name character varying(50) not null
            description text not null
        $$),
        ('kpi_types', $$
            id uuid not null
            name character varying(50) not null
            description text not null
            aggregation_type character varying(20) not null
        $$),
        ('escalation_reasons', $$
            id uuid not null
            name character varying(50) not null
            description text not null
            severity integer not null
        $$),
        ('champion_tiers', $$
            id uuid not null
            name character varying(50) not null
            min_engagement integer not null
            benefits text not null
        $$),
        ('operators', $$
            id uuid not null
            name character varying(255) not null
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
            deleted_at timestamp with time zone
        $$),
        ('authors', $$
            id uuid not null
            platform antone.platform not null
            platform_id character varying(100) not null
            handle character varying(50) not null
            display_name character varying(255)
            follower_count integer not null
            is_verified boolean not null
            is_power_user boolean not null
            power_tier_id uuid
            archetype_tags text[] not null
            relationship_score double precision not null
            interaction_history jsonb not null
            first_seen_at timestamp with time zone not null
            last_seen_at timestamp with time zone not null
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('posts', $$
            id uuid not null
            platform antone.platform not null
            platform_post_id character varying(100) not null
            author_id uuid not null
            content character varying(5000) not null
            detected_at timestamp with time zone not null
            processed_at timestamp with time zone
            keyword_matches text[] not null
            keyword_categories text[] not null
            spam_filtered boolean not null
            raw_metrics jsonb not null
            error_count integer not null
            error_message text
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('experiments', $$
            id uuid not null
            name character varying(255) not null
            description text
            variant_a character varying(100) not null
            variant_b character varying(100) not null
            metric character varying(100) not null
            traffic_split double precision not null
            status antone.experiment_status not null
            start_date timestamp with time zone
            end_date timestamp with time zone
            results_json jsonb not null
            winner character varying(100)
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('decisions', $$
            id uuid not null
            post_id uuid not null
            sss_score double precision not null
            ars_score double precision not null
            evs_score double precision not null
            trs_score double precision not null
            composite_score double precision not null
            mode antone.operational_mode not null
            archetype_id uuid
            safety_flags text[] not null
            signals_json jsonb not null
            temporal_context jsonb not null
            competitor_detected boolean not null
            is_power_user boolean not null
            experiment_id uuid
            experiment_variant character varying(100)
            is_randomized_experiment boolean not null
            predicted_mode antone.operational_mode
            created_at timestamp with time zone not null
        $$),
        ('replies', $$
            id uuid not null
            decision_id uuid not null
            content character varying(1000) not null
            archetype_id uuid not null
            platform antone.platform not null
            platform_post_id character varying(100)
            utm_code character varying(100) not null
            help_count integer not null
            approval_status antone.approval_status not null
            approved_by character varying(255)
            approved_at timestamp with time zone
            posted_at timestamp with time zone
            metrics_json jsonb not null
            deleted_at timestamp with time zone
            delete_reason text
            reply_type antone.reply_type not null
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('competitors', $$
            id uuid not null
            name character varying(255) not null
            category_id uuid not null
            primary_mechanism text
            price_point character varying(50)
            brand_keywords text[] not null
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('competitive_mentions', $$
            id uuid not null
            post_id uuid not null
            competitor_id uuid not null
            sentiment double precision not null
            satisfaction double precision
            opportunity_score double precision not null
            replied boolean not null
            created_at timestamp with time zone not null
        $$),
        ('community_champions', $$
            id uuid not null
            author_id uuid not null
            tier_id uuid not null
            engagement_count integer not null
            dm_sent_at timestamp with time zone
            dm_response text
            sample_sent boolean not null
            converted boolean not null
            advocate_status character varying(50) not null
            created_at timestamp with time zone not null
            updated_at timestamp with time zone not null
        $$),
        ('kpi_metrics', $$
            id uuid not null
            date date not null
            platform antone.platform not null
            metric_type_id uuid not null
            metric_name character varying(100) not null
            value double precision not null
            created_at timestamp with time zone not null
        $$),
        ('escalations', $$
            id uuid not null
            post_id uuid
            decision_id uuid
            reply_id uuid
            reason_id uuid not null
            priority antone.escalation_priority not null
            status antone.escalation_status not null
            assigned_to character varying(255)
            resolved_by character varying(255)
            resolution_notes text
            created_at timestamp with time zone not null
            resolved_at timestamp with time zone
        $$),
        ('audit_logs', $$
            id uuid not null
            entity_type character varying(50) not null
            entity_id uuid not null
            action character varying(50) not null
            actor character varying(255) not null
            details_json jsonb not null
            created_at timestamp with time zone not null
        $$),
        ('weight_adjustment_logs', $$
            id uuid not null
            date date not null
            action character varying(50) not null
            reason text
            valid_segments integer not null
            total_segments integer not null
            sample_sizes jsonb not null
            old_weights jsonb not null
            new_weights jsonb not null
            predicted_improvement double precision
            created_at timestamp with time zone not null
        $$),
        ('learning_events', $$
            id uuid not null
            date date not null
            adjustment_type character varying(50) not null
            adjustment jsonb not null
            predicted_improvement double precision not null
            baseline_performance double precision not null
            actual_improvement double precision
            accuracy double precision
            evaluated_at timestamp with time zone
            created_at timestamp with time zone not null
        $$),
        ('randomized_experiments', $$
            id uuid not null
            decision_id uuid not null
            predicted_mode antone.operational_mode not null
            actual_mode antone.operational_mode not null
            predicted_outcome double precision
            actual_outcome double precision
            created_at timestamp with time zone not null
        $$),
        ('segmented_weights', $$
            id uuid not null
            segment_type character varying(50) not null
            segment_key character varying(100) not null
            sss_weight double precision not null
            ars_weight double precision not null
            evs_weight double precision not null
            trs_weight double precision not null
            sample_size integer not null
            performance double precision
            updated_at timestamp with time zone not null
            created_at timestamp with time zone not null
        $$),
        ('archived_files', $$
            name character varying(255) not null
            table_name character varying(63) not null
            period character varying(20) not null
            created_at timestamp with time zone not null
            row_count integer
            sha256 character varying(64)
            completed_at timestamp with time zone
        $$)
    ) as e (table_name, columns), regexp_split_to_table(trim(both e'\n ' from e.columns), '\n +') as line
), expected_constraints as (
    select split_part(line, ' ', 1) as name, nullif(substr(line, length(split_part(line, ' ', 1)) + 2), '') as action
    from regexp_split_to_table(trim(both e'\n ' from $$
        archetypes_name_is_word
        archetypes_pkey
        archetypes_name_key
        power_tiers_follower_threshold_not_negative
        power_tiers_name_is_word
        power_tiers_pkey
        power_tiers_name_key
        competitor_categories_name_is_word
        competitor_categories_pkey
        competitor_categories_name_key
        kpi_types_aggregation_type_known
        kpi_types_name_is_word
        kpi_types_pkey
        kpi_types_name_key
        escalation_reasons_name_is_word
        escalation_reasons_severity_in_range
        escalation_reasons_pkey
        escalation_reasons_name_key
        champion_tiers_min_engagement_not_negative
        champion_tiers_name_is_word
        champion_tiers_pkey
        champion_tiers_name_key
        operators_name_not_empty
        operators_pkey
        authors_archetype_tags_is_list
        authors_follower_count_not_negative
        authors_handle_is_handle
        authors_interaction_history_is_array
        authors_platform_id_not_empty
        authors_relationship_score_is_score
        authors_seen_in_order
        authors_power_tier_id_fkey restrict
        authors_pkey
        authors_platform_platform_id_key
        posts_content_not_empty
        posts_error_count_not_negative
        posts_keyword_categories_is_list
        posts_keyword_matches_is_list
        posts_keyword_matches_not_too_many
        posts_platform_post_id_is_id
        posts_raw_metrics_is_object
        posts_author_id_fkey cascade
        posts_pkey
        posts_platform_platform_post_id_key
        experiments_dates_in_order
        experiments_metric_not_empty
        experiments_name_not_empty
        experiments_results_json_is_object
        experiments_traffic_split_is_score
        experiments_variants_differ
        experiments_winner_is_variant
        experiments_pkey
        decisions_ars_score_is_score
        decisions_composite_score_is_score
        decisions_evs_score_is_score
        decisions_safety_flags_is_list
        decisions_signals_json_is_object
        decisions_sss_score_is_score
        decisions_temporal_context_is_object
        decisions_trs_score_is_score
        decisions_archetype_id_fkey restrict
        decisions_experiment_id_fkey restrict
        decisions_post_id_fkey cascade
        decisions_pkey
        replies_approved_by_somebody
        replies_content_is_signed
        replies_content_long_enough
        replies_content_makes_no_claim
        replies_deleted_for_a_reason
        replies_help_count_not_negative
        replies_metrics_json_is_object
        replies_platform_post_id_is_id
        replies_utm_code_is_code
        replies_archetype_id_fkey restrict
        replies_decision_id_fkey restrict
        replies_pkey
        competitors_brand_keywords_is_list
        competitors_name_not_empty
        competitors_category_id_fkey restrict
        competitors_pkey
        competitive_mentions_opportunity_score_is_score
        competitive_mentions_satisfaction_is_score
        competitive_mentions_sentiment_in_range
        competitive_mentions_competitor_id_fkey cascade
        competitive_mentions_post_id_fkey cascade
        competitive_mentions_pkey
        community_champions_advocate_status_is_word
        community_champions_engagement_count_not_negative
        community_champions_author_id_fkey cascade
        community_champions_tier_id_fkey restrict
        community_champions_pkey
        community_champions_author_id_key
        kpi_metrics_date_is_finite
        kpi_metrics_metric_name_not_empty
        kpi_metrics_value_is_finite
        kpi_metrics_metric_type_id_fkey restrict
        kpi_metrics_pkey
        kpi_metrics_date_platform_metric_type_id_metric_name_key
        escalations_resolved_by_somebody
        escalations_decision_id_fkey set null
        escalations_post_id_fkey set null
        escalations_reason_id_fkey restrict
        escalations_reply_id_fkey set null
        escalations_pkey
        audit_logs_action_not_empty
        audit_logs_actor_not_empty
        audit_logs_details_json_is_object
        audit_logs_entity_type_not_empty
        audit_logs_pkey
        weight_adjustment_logs_action_not_empty
        weight_adjustment_logs_new_weights_is_object
        weight_adjustment_logs_old_weights_is_object
        weight_adjustment_logs_predicted_improvement_is_finite
        weight_adjustment_logs_sample_sizes_is_object
        weight_adjustment_logs_segments_add_up
        weight_adjustment_logs_pkey
        learning_events_accuracy_is_score
        learning_events_actual_improvement_is_finite
        learning_events_adjustment_is_object
        learning_events_adjustment_type_not_empty
        learning_events_baseline_performance_is_finite
        learning_events_predicted_improvement_is_finite
        learning_events_pkey
        randomized_experiments_actual_outcome_is_finite
        randomized_experiments_predicted_outcome_is_finite
        randomized_experiments_decision_id_fkey cascade
        randomized_experiments_pkey
        segmented_weights_ars_weight_is_score
        segmented_weights_evs_weight_is_score
        segmented_weights_performance_is_finite
        segmented_weights_sample_size_not_negative
        segmented_weights_segment_not_empty
        segmented_weights_sss_weight_is_score
        segmented_weights_trs_weight_is_score
        segmented_weights_pkey
        segmented_weights_segment_type_segment_key_key
        archived_files_complete_or_not
        archived_files_row_count_positive
        archived_files_sha256_is_hash
        archived_files_pkey
    $$), '\n +') as line
), expected_indexes (table_name, columns) as (
    values
    -- from the specification
    ('decisions', 'created_at'),
    ('decisions', 'experiment_variant'),
    ('decisions', 'is_randomized_experiment'),
    ('decisions', 'mode'),
    ('decisions', 'composite_score'),
    ('replies', 'posted_at'),
    ('replies', 'approval_status'),
    ('replies', 'platform posted_at'),
    ('replies', 'platform_post_id'),
    ('weight_adjustment_logs', 'date'),
    ('authors', 'is_power_user'),
    ('authors', 'platform handle'),
    ('posts', 'processed_at'),
    ('posts', 'platform detected_at'),
    ('escalations', 'status priority'),
    ('escalations', 'created_at'),
    -- for the archive
    ('posts', 'detected_at id'),
    ('audit_logs', 'created_at id')
), actions (code, action) as (
    values ('a', 'no action'), ('r', 'restrict'), ('c', 'cascade'), ('n', 'set null'), ('d', 'set default')
), problems (place, problem, remedy) as (
    select format('%I.%I', p.name, e.table_name), 'the table is missing', 'restore it from a backup'
    from (select distinct table_name from expected_columns) as e cross join pack as p
    where not exists (select from tables as t where t.name = e.table_name)
    union all
    select format('%s.%I', t.place, e.name), 'the column is missing', 'add it again: ' || e.definition
    from expected_columns as e join tables as t on t.name = e.table_name
    where not exists (select from columns as c where (c.oid, c.name) = (t.oid, e.name))
    union all
    select c.place, format('it is %s, not %s', c.definition, e.definition), 'change it back'
    from expected_columns as e join columns as c on (c.table_name, c.name) = (e.table_name, e.name)
    where c.definition <> e.definition
    union all
    select c.place, 'no revision creates this column', 'drop it, or write a revision'
    from columns as c
    where exists (select from expected_columns as e where e.table_name = c.table_name)
      and not exists (select from expected_columns as e where (e.table_name, e.name) = (c.table_name, c.name))
    union all
    select e.name, 'the constraint is missing', 'add it again, as in the revisions'
    from expected_constraints as e
    where not exists (select from constraints as c where c.conname = e.name)
    union all
    select c.place, format('it has ON DELETE %s, not %s', upper(a.action), upper(e.action)),
           'drop it and create it again, as in the revisions'
    from expected_constraints as e join constraints as c on c.conname = e.name
    join actions as a on a.code = c.confdeltype::text
    where a.action <> e.action
    union all
    select c.place, 'it has no ON DELETE action', 'drop it and create it again with one'
    from constraints as c
    where c.contype = 'f' and c.confdeltype = 'a'
      and not exists (select from expected_constraints as e where e.name = c.conname)
    union all
    select c.place, 'it was never validated', 'alter table ... validate constraint'
    from constraints as c where not c.convalidated
    union all
    select c.place, 'no index begins with its columns', 'create one'
    from constraints as c
    where c.contype = 'f' and not exists (
        select from indexes as i
        where i.indrelid = c.conrelid and i.indkey[0] = c.conkey[1] and i.indisvalid and i.indpred is null
    )
    union all
    select format('%I.%I', p.name, e.table_name), format('no index on (%s)', replace(e.columns, ' ', ', ')),
           'create it again'
    from expected_indexes as e cross join pack as p
    where exists (select from tables as t where t.name = e.table_name) and not exists (
        select from indexes as i
        where i.table_name = e.table_name and i.columns = e.columns and i.indisvalid and i.indpred is null
    )
    union all
    select i.place, 'the index is invalid', 'reindex it, or drop it and create it again'
    from indexes as i where not i.indisvalid
    union all
    select c.place, 'the required timestamp has no default', 'alter column ... set default current_timestamp'
    from columns as c where c.type like 'timestamp%' and c.attnotnull and not c.atthasdef
    union all
    select c.place, 'the timestamp has no time zone', 'make it a timestamptz'
    from columns as c where c.type like 'timestamp%without%'
    union all
    select t.place, 'no trigger maintains updated_at', 'create or enable its trigger again'
    from tables as t join columns as c on c.oid = t.oid and c.name = 'updated_at'
    where not exists (
        select from pg_trigger as g join pg_proc as f on f.oid = g.tgfoid
        where g.tgrelid = t.oid and f.proname = 'set_updated_at' and g.tgenabled in ('O', 'A')
    )
    union all
    select t.place, 'the name contains characters other than a-z, 0-9 and _', 'rename it'
    from (select place, name from tables union all select place, name from columns) as t
    where t.name !~ '^[a-z][a-z0-9_]*$'
    union all
    select c.place, format('it should be called %s_%s', c.table_name,
                           case c.contype when 'p' then 'pkey' when 'u' then c.columns || '_key'
                                          when 'f' then c.columns || '_fkey' else '...' end), 'rename it'
    from constraints as c
    where case c.contype when 'p' then c.conname <> c.table_name || '_pkey'
                         when 'u' then c.conname <> c.table_name || '_' || c.columns || '_key'
                         when 'f' then c.conname <> c.table_name || '_' || c.columns || '_fkey'
                         else not starts_with(c.conname, c.table_name || '_') end
    union all
    select i.place, format('it should be called %s_%s_idx', i.table_name, replace(i.columns, ' ', '_')), 'rename it'
    from indexes as i
    where i.name <> i.table_name || '_' || replace(i.columns, ' ', '_') || '_idx'
      and not exists (select from pg_constraint as c where c.conindid = i.indexrelid)
    union all
    select 'role antone_app', 'it is a superuser', 'alter role antone_app nosuperuser'
    from pg_roles as r where r.rolname = 'antone_app' and r.rolsuper
    union all
    select 'role antone_app', format('it may create objects in schema %I', p.name),
           format('revoke create on schema %I from it', p.name)
    from pg_roles as r cross join pack as p
    where r.rolname = 'antone_app' and not r.rolsuper and has_schema_privilege(r.oid, p.oid, 'CREATE')
)
select place, problem, remedy from problems order by place, problem;
