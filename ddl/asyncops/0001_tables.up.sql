-- The eight tables of AsyncOps with their keys, checks and indexes, in the order of the specification.
--
-- Times are timestamptz, because a published time needs an offset (decision 0029). Columns that name a row's author are
-- nullable, so that the row outlives the account, but a new row must have an author (0002_rules, decision 0030). Checks
-- called <table>_<column>_known list the values of an enumeration; those called <table>_<column>_length limit the text
-- in characters. Tests compare the row models with both. Decisions are in docs/packs/asyncops/decisions.

-- Hashes the password of the first admin; an existing hash needs no extension.
-- The schema comes from a qualified name, because only those follow `--schema`.
select rowcast.want_extension(split_part('asyncops.users', '.', 1)::name, 'pgcrypto');

create table asyncops.users (
    id serial not null,
    email varchar(255) not null,
    password_hash varchar(255) not null,
    full_name varchar(255) not null,
    role varchar(20) not null default 'member',
    is_active boolean not null default true,
    must_change_password boolean not null default false,  -- at the next login; cleared by a new password
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint users_pkey primary key (id),
    constraint idx_users_email unique (email),
    constraint users_role_known check (role in ('admin', 'member')),
    -- Refuses plain passwords and weaker hashes.
    constraint users_password_hash_is_bcrypt check (
        password_hash ~ '^\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}$'
    )
);

create table asyncops.status_updates (
    id serial not null,
    user_id integer not null,
    title varchar(200) not null,
    content text not null,  -- markdown
    tags text [],
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    archived_at timestamptz,
    constraint status_updates_pkey primary key (id),
    constraint status_updates_user_id_fkey foreign key (user_id) references asyncops.users (id) on delete cascade,
    constraint status_updates_content_length check (char_length(content) <= 10000),
    -- One-dimensional and without nulls. The case avoids calling array_position on more dimensions, which raises an
    -- error.
    constraint status_updates_tags_are_words check (
        case when array_ndims(tags) > 1 then false else array_position(tags, null::text) is null end
    )
);

create table asyncops.incidents (
    id serial not null,
    reported_by_id integer,
    assigned_to_id integer,
    title varchar(200) not null,
    description text not null,
    severity varchar(20) not null default 'medium',
    status varchar(20) not null default 'open',
    resolution_notes text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    resolved_at timestamptz,
    archived_at timestamptz,
    constraint incidents_pkey primary key (id),
    constraint incidents_reported_by_id_fkey foreign key (reported_by_id) references asyncops.users (id)
        on delete set null,
    constraint incidents_assigned_to_id_fkey foreign key (assigned_to_id) references asyncops.users (id)
        on delete set null,
    constraint incidents_severity_known check (severity in ('low', 'medium', 'high', 'critical')),
    constraint incidents_status_known check (status in ('open', 'in_progress', 'resolved', 'closed')),
    constraint incidents_description_length check (char_length(description) <= 5000)
);

create table asyncops.blockers (
    id serial not null,
    reported_by_id integer,
    description text not null,
    impact text not null,
    status varchar(20) not null default 'active',
    resolution_notes text,
    related_status_id integer,
    related_incident_id integer,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    resolved_at timestamptz,
    archived_at timestamptz,
    constraint blockers_pkey primary key (id),
    constraint blockers_reported_by_id_fkey foreign key (reported_by_id) references asyncops.users (id)
        on delete set null,
    constraint blockers_related_status_id_fkey foreign key (related_status_id) references asyncops.status_updates (id)
        on delete set null,
    constraint blockers_related_incident_id_fkey foreign key (related_incident_id) references asyncops.incidents (id)
        on delete set null,
    constraint blockers_status_known check (status in ('active', 'resolved')),
    constraint blockers_description_length check (char_length(description) <= 2000),
    constraint blockers_impact_length check (char_length(impact) <= 1000)
);

create table asyncops.decisions (
    id serial not null,
    created_by_id integer,
    title varchar(200) not null,
    description text not null,
    context text not null,
    outcome text not null,
    decision_date date not null,
    tags text [],
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    constraint decisions_pkey primary key (id),
    constraint decisions_created_by_id_fkey foreign key (created_by_id) references asyncops.users (id)
        on delete set null,
    -- JSON has no infinite date.
    constraint decisions_decision_date_is_a_day check (decision_date between '0001-01-01' and '9999-12-31'),
    constraint decisions_description_length check (char_length(description) <= 5000),
    constraint decisions_context_length check (char_length(context) <= 5000),
    constraint decisions_outcome_length check (char_length(outcome) <= 5000),
    constraint decisions_tags_are_words check (
        case when array_ndims(tags) > 1 then false else array_position(tags, null::text) is null end
    )
);

create table asyncops.decision_participants (
    id serial not null,
    decision_id integer not null,
    user_id integer not null,
    created_at timestamptz not null default now(),
    constraint decision_participants_pkey primary key (id),
    constraint decision_participants_decision_id_user_id_key unique (decision_id, user_id),
    constraint decision_participants_decision_id_fkey foreign key (decision_id) references asyncops.decisions (id)
        on delete cascade,
    constraint decision_participants_user_id_fkey foreign key (user_id) references asyncops.users (id)
        on delete cascade
);

-- No foreign key to the decision: it would delete the history with the decision, and refuse the entry for the deletion
-- (decision 0030). Only the trigger on decisions writes here, and nobody can change its entries.
create table asyncops.decision_audit_log (
    id serial not null,
    decision_id integer not null,
    changed_by_id integer,
    change_type varchar(20) not null,
    field_name varchar(100),
    old_value text,
    new_value text,
    changed_at timestamptz not null default now(),
    constraint decision_audit_log_pkey primary key (id),
    constraint decision_audit_log_changed_by_id_fkey foreign key (changed_by_id) references asyncops.users (id)
        on delete set null,
    constraint decision_audit_log_change_type_known check (change_type in ('created', 'updated', 'deleted')),
    constraint decision_audit_log_update_names_its_field check ((change_type = 'updated') = (field_name is not null))
);

create table asyncops.daily_summaries (
    id serial not null,
    summary_date date not null,
    content jsonb not null,
    status_updates_count integer not null default 0,
    incidents_count integer not null default 0,
    blockers_count integer not null default 0,
    decisions_count integer not null default 0,
    generated_at timestamptz not null default now(),
    created_at timestamptz not null default now(),
    constraint daily_summaries_pkey primary key (id),
    constraint daily_summaries_summary_date_is_a_day check (summary_date between '0001-01-01' and '9999-12-31'),
    constraint daily_summaries_content_is_structured check (
        coalesce(
            jsonb_typeof(content -> 'status_updates') = 'array'
            and jsonb_typeof(content -> 'incidents') = 'array'
            and jsonb_typeof(content -> 'blockers') = 'array'
            and jsonb_typeof(content -> 'recent_decisions') = 'array'
            and jsonb_typeof(content -> 'statistics') = 'object',
            false
        )
    ),
    constraint daily_summaries_counts_not_negative check (
        least(status_updates_count, incidents_count, blockers_count, decisions_count) >= 0
    )
);

-- Indexes. The constraint idx_users_email has created its own.

create index idx_users_role on asyncops.users (role);

-- One address must not have two accounts, regardless of case.
create unique index users_email_lower_key on asyncops.users (lower(email));

create index idx_status_updates_user_id on asyncops.status_updates (user_id);
create index idx_status_updates_created_at on asyncops.status_updates (created_at desc);
create index idx_status_updates_tags on asyncops.status_updates using gin (tags);

create index idx_incidents_reported_by on asyncops.incidents (reported_by_id);
create index idx_incidents_assigned_to on asyncops.incidents (assigned_to_id);
create index idx_incidents_status on asyncops.incidents (status);
create index idx_incidents_severity on asyncops.incidents (severity);
create index idx_incidents_created_at on asyncops.incidents (created_at desc);
create index idx_incidents_status_severity on asyncops.incidents (status, severity);

create index idx_blockers_reported_by on asyncops.blockers (reported_by_id);
create index idx_blockers_status on asyncops.blockers (status);
create index idx_blockers_created_at on asyncops.blockers (created_at desc);
create index idx_blockers_related_status on asyncops.blockers (related_status_id);
create index idx_blockers_related_incident on asyncops.blockers (related_incident_id);

create index idx_decisions_created_by on asyncops.decisions (created_by_id);
create index idx_decisions_decision_date on asyncops.decisions (decision_date desc);
create index idx_decisions_tags on asyncops.decisions using gin (tags);
-- Searches must use the same expression. It names the language, because the session's default may differ.
create index idx_decisions_search on asyncops.decisions
using gin (to_tsvector('pg_catalog.english'::regconfig, title || ' ' || description));

create index idx_decision_participants_decision on asyncops.decision_participants (decision_id);
create index idx_decision_participants_user on asyncops.decision_participants (user_id);

create index idx_decision_audit_decision on asyncops.decision_audit_log (decision_id);
create index idx_decision_audit_changed_by on asyncops.decision_audit_log (changed_by_id);
create index idx_decision_audit_changed_at on asyncops.decision_audit_log (changed_at desc);

-- One summary per date. An index, because a unique constraint cannot have a sort order.
create unique index idx_daily_summaries_date on asyncops.daily_summaries (summary_date desc);
create index idx_daily_summaries_generated_at on asyncops.daily_summaries (generated_at desc);

-- Rows that can be archived, oldest first. These indexes exclude archived rows, so a run never scans the archive.
create index status_updates_to_archive on asyncops.status_updates (created_at) where archived_at is null;
create index incidents_to_archive on asyncops.incidents (created_at)
where archived_at is null and status in ('resolved', 'closed');
create index blockers_to_archive on asyncops.blockers (resolved_at)
where archived_at is null and status = 'resolved';
