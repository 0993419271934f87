-- Enumerations of two kinds. Those that belong to the algorithm or a fixed workflow are enum types. Those that the
-- business extends are lookup tables, so that a new archetype or a new reason to escalate needs no revision and no
-- release.

create type antone.platform as enum ('TWITTER', 'REDDIT', 'THREADS');
create type antone.operational_mode as enum ('HELPFUL', 'ENGAGEMENT', 'HYBRID', 'DISENGAGED');
create type antone.approval_status as enum ('PENDING', 'APPROVED', 'REJECTED');
create type antone.reply_type as enum ('MANUAL', 'AUTO');
create type antone.experiment_status as enum ('DRAFT', 'RUNNING', 'COMPLETED', 'CANCELLED');
create type antone.escalation_priority as enum ('LOW', 'MEDIUM', 'HIGH', 'CRITICAL');
create type antone.escalation_status as enum ('OPEN', 'IN_PROGRESS', 'RESOLVED', 'DISMISSED');

-- Every reference to these tables is ON DELETE RESTRICT: a value in use can be retired, not removed.

create table antone.archetypes (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    description text not null,
    is_active boolean not null default true,
    constraint archetypes_pkey primary key (id),
    constraint archetypes_name_key unique (name),
    constraint archetypes_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$')
);

-- An author belongs to the highest tier whose `follower_threshold` they reach.
create table antone.power_tiers (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    follower_threshold integer not null,
    description text not null,
    constraint power_tiers_pkey primary key (id),
    constraint power_tiers_name_key unique (name),
    constraint power_tiers_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$'),
    constraint power_tiers_follower_threshold_not_negative check (follower_threshold >= 0)
);

create table antone.competitor_categories (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    description text not null,
    constraint competitor_categories_pkey primary key (id),
    constraint competitor_categories_name_key unique (name),
    constraint competitor_categories_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$')
);

-- `aggregation_type` says how to combine the values of several days.
create table antone.kpi_types (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    description text not null,
    aggregation_type varchar(20) not null,
    constraint kpi_types_pkey primary key (id),
    constraint kpi_types_name_key unique (name),
    constraint kpi_types_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$'),
    constraint kpi_types_aggregation_type_known check (aggregation_type in ('SUM', 'AVG', 'MIN', 'MAX', 'LAST'))
);

-- `severity` goes from 1 (lowest) to 5.
create table antone.escalation_reasons (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    description text not null,
    severity integer not null,
    constraint escalation_reasons_pkey primary key (id),
    constraint escalation_reasons_name_key unique (name),
    constraint escalation_reasons_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$'),
    constraint escalation_reasons_severity_in_range check (severity between 1 and 5)
);

create table antone.champion_tiers (
    id uuid not null default gen_random_uuid(),
    name varchar(50) not null,
    min_engagement integer not null,
    benefits text not null,
    constraint champion_tiers_pkey primary key (id),
    constraint champion_tiers_name_key unique (name),
    constraint champion_tiers_name_is_word check (name ~ '^[A-Z][A-Z0-9_]*$'),
    constraint champion_tiers_min_engagement_not_negative check (min_engagement >= 0)
);
