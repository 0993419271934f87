-- The tables with their keys, checks and indexes.
--
-- `daemon check` enforces the names: <table>_pkey, <table>_<columns>_key, _fkey and _idx, and <table>_<condition> for a
-- check. Each foreign key says what a DELETE does, and has an index. A score is a double precision from 0 to 1; no
-- number is NaN or infinite, because JSON has neither. Decisions named here are in docs/packs/antone/decisions.

-- The people who work with Antone; `id` is the `sub` of their token. Not in the specification (decision 0034).
create table antone.operators (
    id uuid not null default gen_random_uuid(),
    name varchar(255) not null,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    deleted_at timestamptz,
    constraint operators_pkey primary key (id),
    constraint operators_name_not_empty check (name <> '')
);

-- Authors and their relationships are kept forever.
create table antone.authors (
    id uuid not null default gen_random_uuid(),
    platform antone.platform not null,
    platform_id varchar(100) not null,
    handle varchar(50) not null,
    display_name varchar(255),
    follower_count integer not null default 0,
    is_verified boolean not null default false,
    is_power_user boolean not null default false,
    power_tier_id uuid,
    archetype_tags text [] not null default '{}',
    relationship_score double precision not null default 0.5,
    interaction_history jsonb not null default '[]',
    first_seen_at timestamptz not null default current_timestamp,
    last_seen_at timestamptz not null default current_timestamp,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint authors_pkey primary key (id),
    constraint authors_platform_platform_id_key unique (platform, platform_id),
    constraint authors_power_tier_id_fkey foreign key (power_tier_id) references antone.power_tiers (id)
        on delete restrict,
    constraint authors_platform_id_not_empty check (platform_id <> ''),
    constraint authors_handle_is_handle check (handle ~ '^[a-zA-Z0-9_]+$'),
    constraint authors_follower_count_not_negative check (follower_count >= 0),
    constraint authors_archetype_tags_is_list check (
        coalesce(array_ndims(archetype_tags), 1) = 1 and array_position(archetype_tags, null) is null
    ),
    constraint authors_relationship_score_is_score check (relationship_score between 0 and 1),
    constraint authors_interaction_history_is_array check (jsonb_typeof(interaction_history) = 'array'),
    constraint authors_seen_in_order check (first_seen_at <= last_seen_at)
);

create table antone.posts (
    id uuid not null default gen_random_uuid(),
    platform antone.platform not null,
    platform_post_id varchar(100) not null,
    author_id uuid not null,
    content varchar(5000) not null,
    detected_at timestamptz not null default current_timestamp,
    processed_at timestamptz,
    keyword_matches text [] not null default '{}',
    keyword_categories text [] not null default '{}',
    spam_filtered boolean not null default false,
    raw_metrics jsonb not null default '{}',
    error_count integer not null default 0,
    error_message text,
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint posts_pkey primary key (id),
    constraint posts_platform_platform_post_id_key unique (platform, platform_post_id),
    -- Posts go with their author, unless one was answered: replies keep their decision (decision 0033).
    constraint posts_author_id_fkey foreign key (author_id) references antone.authors (id) on delete cascade,
    constraint posts_platform_post_id_is_id check (platform_post_id ~ '^[a-zA-Z0-9_-]+$'),
    constraint posts_content_not_empty check (content <> ''),
    constraint posts_keyword_matches_is_list check (
        coalesce(array_ndims(keyword_matches), 1) = 1 and array_position(keyword_matches, null) is null
    ),
    constraint posts_keyword_matches_not_too_many check (cardinality(keyword_matches) <= 50),
    constraint posts_keyword_categories_is_list check (
        coalesce(array_ndims(keyword_categories), 1) = 1 and array_position(keyword_categories, null) is null
    ),
    constraint posts_raw_metrics_is_object check (jsonb_typeof(raw_metrics) = 'object'),
    constraint posts_error_count_not_negative check (error_count >= 0)
);

create table antone.experiments (
    id uuid not null default gen_random_uuid(),
    name varchar(255) not null,
    description text,
    variant_a varchar(100) not null,
    variant_b varchar(100) not null,
    metric varchar(100) not null,
    traffic_split double precision not null default 0.5,
    status antone.experiment_status not null default 'DRAFT',
    start_date timestamptz,
    end_date timestamptz,
    results_json jsonb not null default '{}',
    winner varchar(100),
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint experiments_pkey primary key (id),
    constraint experiments_name_not_empty check (name <> ''),
    constraint experiments_variants_differ check (variant_a <> '' and variant_b <> '' and variant_a <> variant_b),
    constraint experiments_metric_not_empty check (metric <> ''),
    constraint experiments_traffic_split_is_score check (traffic_split between 0 and 1),
    constraint experiments_dates_in_order check (start_date <= end_date),
    constraint experiments_results_json_is_object check (jsonb_typeof(results_json) = 'object'),
    constraint experiments_winner_is_variant check (winner in (variant_a, variant_b))
);

create table antone.decisions (
    id uuid not null default gen_random_uuid(),
    post_id uuid not null,
    sss_score double precision not null,
    ars_score double precision not null,
    evs_score double precision not null,
    trs_score double precision not null,
    composite_score double precision not null,
    mode antone.operational_mode not null,
    archetype_id uuid,
    safety_flags text [] not null default '{}',
    signals_json jsonb not null default '{}',
    temporal_context jsonb not null default '{}',
    competitor_detected boolean not null default false,
    is_power_user boolean not null default false,
    experiment_id uuid,
    experiment_variant varchar(100),
    is_randomized_experiment boolean not null default false,
    predicted_mode antone.operational_mode,
    created_at timestamptz not null default current_timestamp,
    constraint decisions_pkey primary key (id),
    -- A decision is about a post.
    constraint decisions_post_id_fkey foreign key (post_id) references antone.posts (id) on delete cascade,
    constraint decisions_archetype_id_fkey foreign key (archetype_id) references antone.archetypes (id)
        on delete restrict,
    -- A decision without its experiment could not be evaluated: experiments are cancelled, not deleted.
    constraint decisions_experiment_id_fkey foreign key (experiment_id) references antone.experiments (id)
        on delete restrict,
    constraint decisions_sss_score_is_score check (sss_score between 0 and 1),
    constraint decisions_ars_score_is_score check (ars_score between 0 and 1),
    constraint decisions_evs_score_is_score check (evs_score between 0 and 1),
    constraint decisions_trs_score_is_score check (trs_score between 0 and 1),
    constraint decisions_composite_score_is_score check (composite_score between 0 and 1),
    constraint decisions_safety_flags_is_list check (
        coalesce(array_ndims(safety_flags), 1) = 1 and array_position(safety_flags, null) is null
    ),
    constraint decisions_signals_json_is_object check (jsonb_typeof(signals_json) = 'object'),
    constraint decisions_temporal_context_is_object check (jsonb_typeof(temporal_context) = 'object')
);

-- The permanent audit trail: replies are kept forever, and only soft-deleted, by `deleted_at`.
-- `platform_post_id` is the platform's id of the reply itself, once it is posted.
create table antone.replies (
    id uuid not null default gen_random_uuid(),
    decision_id uuid not null,
    content varchar(1000) not null,
    archetype_id uuid not null,
    platform antone.platform not null,
    platform_post_id varchar(100),
    utm_code varchar(100) not null,
    help_count integer not null default 0,
    approval_status antone.approval_status not null default 'PENDING',
    approved_by varchar(255),
    approved_at timestamptz,
    posted_at timestamptz,
    metrics_json jsonb not null default '{}',
    deleted_at timestamptz,
    delete_reason text,
    reply_type antone.reply_type not null default 'MANUAL',
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint replies_pkey primary key (id),
    -- The reason for a reply is part of it: its decision and post stay as long as the reply (decision 0033).
    constraint replies_decision_id_fkey foreign key (decision_id) references antone.decisions (id)
        on delete restrict,
    constraint replies_archetype_id_fkey foreign key (archetype_id) references antone.archetypes (id)
        on delete restrict,
    constraint replies_content_long_enough check (length(content) >= 10),
    constraint replies_content_is_signed check (position('—Antone (Vita)' in content) > 0),
    -- collate "C" makes case folding independent of the database's locale.
    constraint replies_content_makes_no_claim check (
        content collate "C" !~* '(cure|prevent|treat|clinically proven)'
    ),
    constraint replies_platform_post_id_is_id check (platform_post_id ~ '^[a-zA-Z0-9_-]+$'),
    constraint replies_utm_code_is_code check (utm_code ~ '^[a-z0-9_-]+$'),
    constraint replies_help_count_not_negative check (help_count >= 0),
    constraint replies_approved_by_somebody check (
        num_nonnulls(approved_by, approved_at) = case when approval_status = 'APPROVED' then 2 else 0 end
    ),
    constraint replies_metrics_json_is_object check (jsonb_typeof(metrics_json) = 'object'),
    constraint replies_deleted_for_a_reason check (delete_reason is null or deleted_at is not null)
);

create table antone.competitors (
    id uuid not null default gen_random_uuid(),
    name varchar(255) not null,
    category_id uuid not null,
    primary_mechanism text,
    price_point varchar(50),
    brand_keywords text [] not null default '{}',
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint competitors_pkey primary key (id),
    constraint competitors_category_id_fkey foreign key (category_id) references antone.competitor_categories (id)
        on delete restrict,
    constraint competitors_name_not_empty check (name <> ''),
    constraint competitors_brand_keywords_is_list check (
        coalesce(array_ndims(brand_keywords), 1) = 1 and array_position(brand_keywords, null) is null
    )
);

-- `sentiment` goes from -1 to 1.
create table antone.competitive_mentions (
    id uuid not null default gen_random_uuid(),
    post_id uuid not null,
    competitor_id uuid not null,
    sentiment double precision not null,
    satisfaction double precision,
    opportunity_score double precision not null,
    replied boolean not null default false,
    created_at timestamptz not null default current_timestamp,
    constraint competitive_mentions_pkey primary key (id),
    -- A mention means nothing without either end.
    constraint competitive_mentions_post_id_fkey foreign key (post_id) references antone.posts (id)
        on delete cascade,
    constraint competitive_mentions_competitor_id_fkey foreign key (competitor_id) references antone.competitors (id)
        on delete cascade,
    constraint competitive_mentions_sentiment_in_range check (sentiment between -1 and 1),
    constraint competitive_mentions_satisfaction_is_score check (satisfaction between 0 and 1),
    constraint competitive_mentions_opportunity_score_is_score check (opportunity_score between 0 and 1)
);

create table antone.community_champions (
    id uuid not null default gen_random_uuid(),
    author_id uuid not null,
    tier_id uuid not null,
    engagement_count integer not null default 0,
    dm_sent_at timestamptz,
    dm_response text,
    sample_sent boolean not null default false,
    converted boolean not null default false,
    advocate_status varchar(50) not null default 'CANDIDATE',
    created_at timestamptz not null default current_timestamp,
    updated_at timestamptz not null default current_timestamp,
    constraint community_champions_pkey primary key (id),
    constraint community_champions_author_id_key unique (author_id),
    -- An extension of the author's own row.
    constraint community_champions_author_id_fkey foreign key (author_id) references antone.authors (id)
        on delete cascade,
    constraint community_champions_tier_id_fkey foreign key (tier_id) references antone.champion_tiers (id)
        on delete restrict,
    constraint community_champions_engagement_count_not_negative check (engagement_count >= 0),
    constraint community_champions_advocate_status_is_word check (advocate_status ~ '^[A-Z][A-Z0-9_]*$')
);

create table antone.kpi_metrics (
    id uuid not null default gen_random_uuid(),
    date date not null default current_date,
    platform antone.platform not null,
    metric_type_id uuid not null,
    metric_name varchar(100) not null,
    value double precision not null,
    created_at timestamptz not null default current_timestamp,
    constraint kpi_metrics_pkey primary key (id),
    constraint kpi_metrics_date_platform_metric_type_id_metric_name_key
        unique (date, platform, metric_type_id, metric_name),
    constraint kpi_metrics_metric_type_id_fkey foreign key (metric_type_id) references antone.kpi_types (id)
        on delete restrict,
    constraint kpi_metrics_date_is_finite check (isfinite(date)),
    constraint kpi_metrics_metric_name_not_empty check (metric_name <> ''),
    constraint kpi_metrics_value_is_finite check (value > '-infinity' and value < 'infinity')
);

-- An escalation may be about any of the three and outlives them, so that its outcome is kept.
create table antone.escalations (
    id uuid not null default gen_random_uuid(),
    post_id uuid,
    decision_id uuid,
    reply_id uuid,
    reason_id uuid not null,
    priority antone.escalation_priority not null default 'MEDIUM',
    status antone.escalation_status not null default 'OPEN',
    assigned_to varchar(255),
    resolved_by varchar(255),
    resolution_notes text,
    created_at timestamptz not null default current_timestamp,
    resolved_at timestamptz,
    constraint escalations_pkey primary key (id),
    constraint escalations_post_id_fkey foreign key (post_id) references antone.posts (id) on delete set null,
    constraint escalations_decision_id_fkey foreign key (decision_id) references antone.decisions (id)
        on delete set null,
    constraint escalations_reply_id_fkey foreign key (reply_id) references antone.replies (id) on delete set null,
    constraint escalations_reason_id_fkey foreign key (reason_id) references antone.escalation_reasons (id)
        on delete restrict,
    constraint escalations_resolved_by_somebody check (
        num_nonnulls(resolved_by, resolved_at) = case when status in ('RESOLVED', 'DISMISSED') then 2 else 0 end
    )
);

-- Who did what. It has no foreign keys, so that an entry outlives the row it is about.
create table antone.audit_logs (
    id uuid not null default gen_random_uuid(),
    entity_type varchar(50) not null,
    entity_id uuid not null,
    action varchar(50) not null,
    actor varchar(255) not null,
    details_json jsonb not null default '{}',
    created_at timestamptz not null default current_timestamp,
    constraint audit_logs_pkey primary key (id),
    constraint audit_logs_entity_type_not_empty check (entity_type <> ''),
    constraint audit_logs_action_not_empty check (action <> ''),
    constraint audit_logs_actor_not_empty check (actor <> ''),
    constraint audit_logs_details_json_is_object check (jsonb_typeof(details_json) = 'object')
);

create table antone.weight_adjustment_logs (
    id uuid not null default gen_random_uuid(),
    date date not null default current_date,
    action varchar(50) not null,
    reason text,
    valid_segments integer not null default 0,
    total_segments integer not null default 0,
    sample_sizes jsonb not null default '{}',
    old_weights jsonb not null default '{}',
    new_weights jsonb not null default '{}',
    predicted_improvement double precision,
    created_at timestamptz not null default current_timestamp,
    constraint weight_adjustment_logs_pkey primary key (id),
    constraint weight_adjustment_logs_action_not_empty check (action <> ''),
    constraint weight_adjustment_logs_segments_add_up check (valid_segments between 0 and total_segments),
    constraint weight_adjustment_logs_sample_sizes_is_object check (jsonb_typeof(sample_sizes) = 'object'),
    constraint weight_adjustment_logs_old_weights_is_object check (jsonb_typeof(old_weights) = 'object'),
    constraint weight_adjustment_logs_new_weights_is_object check (jsonb_typeof(new_weights) = 'object'),
    constraint weight_adjustment_logs_predicted_improvement_is_finite check (
        predicted_improvement > '-infinity' and predicted_improvement < 'infinity'
    )
);

create table antone.learning_events (
    id uuid not null default gen_random_uuid(),
    date date not null default current_date,
    adjustment_type varchar(50) not null,
    adjustment jsonb not null default '{}',
    predicted_improvement double precision not null,
    baseline_performance double precision not null,
    actual_improvement double precision,
    accuracy double precision,
    evaluated_at timestamptz,
    created_at timestamptz not null default current_timestamp,
    constraint learning_events_pkey primary key (id),
    constraint learning_events_adjustment_type_not_empty check (adjustment_type <> ''),
    constraint learning_events_adjustment_is_object check (jsonb_typeof(adjustment) = 'object'),
    constraint learning_events_predicted_improvement_is_finite check (
        predicted_improvement > '-infinity' and predicted_improvement < 'infinity'
    ),
    constraint learning_events_baseline_performance_is_finite check (
        baseline_performance > '-infinity' and baseline_performance < 'infinity'
    ),
    constraint learning_events_actual_improvement_is_finite check (
        actual_improvement > '-infinity' and actual_improvement < 'infinity'
    ),
    constraint learning_events_accuracy_is_score check (accuracy between 0 and 1)
);

create table antone.randomized_experiments (
    id uuid not null default gen_random_uuid(),
    decision_id uuid not null,
    predicted_mode antone.operational_mode not null,
    actual_mode antone.operational_mode not null,
    predicted_outcome double precision,
    actual_outcome double precision,
    created_at timestamptz not null default current_timestamp,
    constraint randomized_experiments_pkey primary key (id),
    -- An experiment's result is deleted, and archived, with its decision.
    constraint randomized_experiments_decision_id_fkey foreign key (decision_id) references antone.decisions (id)
        on delete cascade,
    constraint randomized_experiments_predicted_outcome_is_finite check (
        predicted_outcome > '-infinity' and predicted_outcome < 'infinity'
    ),
    constraint randomized_experiments_actual_outcome_is_finite check (
        actual_outcome > '-infinity' and actual_outcome < 'infinity'
    )
);

create table antone.segmented_weights (
    id uuid not null default gen_random_uuid(),
    segment_type varchar(50) not null,
    segment_key varchar(100) not null,
    sss_weight double precision not null,
    ars_weight double precision not null,
    evs_weight double precision not null,
    trs_weight double precision not null,
    sample_size integer not null default 0,
    performance double precision,
    updated_at timestamptz not null default current_timestamp,
    created_at timestamptz not null default current_timestamp,
    constraint segmented_weights_pkey primary key (id),
    constraint segmented_weights_segment_type_segment_key_key unique (segment_type, segment_key),
    constraint segmented_weights_segment_not_empty check (segment_type <> '' and segment_key <> ''),
    constraint segmented_weights_sss_weight_is_score check (sss_weight between 0 and 1),
    constraint segmented_weights_ars_weight_is_score check (ars_weight between 0 and 1),
    constraint segmented_weights_evs_weight_is_score check (evs_weight between 0 and 1),
    constraint segmented_weights_trs_weight_is_score check (trs_weight between 0 and 1),
    constraint segmented_weights_sample_size_not_negative check (sample_size >= 0),
    constraint segmented_weights_performance_is_finite check (performance > '-infinity' and performance < 'infinity')
);

-- The archive's ledger: one row for each file that rows move to. The row exists before the file, and the transaction
-- that deletes the archived rows marks it complete. If a file is not complete here, its rows are still in their table
-- (decision 0035).
create table antone.archived_files (
    name varchar(255) not null,
    table_name varchar(63) not null,
    period varchar(20) not null,
    created_at timestamptz not null default current_timestamp,
    row_count integer,
    sha256 varchar(64),
    completed_at timestamptz,
    constraint archived_files_pkey primary key (name),
    constraint archived_files_row_count_positive check (row_count > 0),
    constraint archived_files_sha256_is_hash check (sha256 ~ '^[0-9a-f]{64}$'),
    constraint archived_files_complete_or_not check (num_nonnulls(row_count, sha256, completed_at) in (0, 3))
);

-- Indexes: those of the specification, and one for each foreign key that they do not cover.

create index authors_platform_handle_idx on antone.authors (platform, handle);
create index authors_is_power_user_idx on antone.authors (is_power_user);
create index authors_power_tier_id_idx on antone.authors (power_tier_id);

create index posts_processed_at_idx on antone.posts (processed_at);
create index posts_platform_detected_at_idx on antone.posts (platform, detected_at);
-- Also serves an author's newest posts.
create index posts_author_id_detected_at_idx on antone.posts (author_id, detected_at);
-- The archive reads posts in this order.
create index posts_detected_at_id_idx on antone.posts (detected_at, id);

create index decisions_created_at_idx on antone.decisions (created_at);
create index decisions_experiment_variant_idx on antone.decisions (experiment_variant);
create index decisions_is_randomized_experiment_idx on antone.decisions (is_randomized_experiment);
create index decisions_mode_idx on antone.decisions (mode);
create index decisions_composite_score_idx on antone.decisions (composite_score);
create index decisions_post_id_idx on antone.decisions (post_id);
create index decisions_archetype_id_idx on antone.decisions (archetype_id);
create index decisions_experiment_id_idx on antone.decisions (experiment_id);

create index replies_posted_at_idx on antone.replies (posted_at);
create index replies_approval_status_idx on antone.replies (approval_status);
create index replies_platform_posted_at_idx on antone.replies (platform, posted_at);
create index replies_platform_post_id_idx on antone.replies (platform_post_id);
create index replies_decision_id_idx on antone.replies (decision_id);
create index replies_archetype_id_idx on antone.replies (archetype_id);

create index competitors_category_id_idx on antone.competitors (category_id);
create index competitive_mentions_post_id_idx on antone.competitive_mentions (post_id);
create index competitive_mentions_competitor_id_idx on antone.competitive_mentions (competitor_id);
create index community_champions_tier_id_idx on antone.community_champions (tier_id);
create index kpi_metrics_metric_type_id_idx on antone.kpi_metrics (metric_type_id);

create index escalations_status_priority_idx on antone.escalations (status, priority);
create index escalations_created_at_idx on antone.escalations (created_at);
create index escalations_post_id_idx on antone.escalations (post_id);
create index escalations_decision_id_idx on antone.escalations (decision_id);
create index escalations_reply_id_idx on antone.escalations (reply_id);
create index escalations_reason_id_idx on antone.escalations (reason_id);

create index audit_logs_entity_type_entity_id_idx on antone.audit_logs (entity_type, entity_id);
create index audit_logs_created_at_id_idx on antone.audit_logs (created_at, id);

create index weight_adjustment_logs_date_idx on antone.weight_adjustment_logs (date);
create index randomized_experiments_decision_id_idx on antone.randomized_experiments (decision_id);
