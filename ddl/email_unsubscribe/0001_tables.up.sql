-- The eight tables of the unsubscriber for one mailbox, with their keys, checks and indexes.
--
-- Ids are ULIDs: text that sorts by creation time. Ids and the columns that reference them compare byte by byte
-- (collate "C"), which is creation order and the cheapest collation. Addresses and domains are lowercase: triggers of
-- the next revision convert them, and the checks here enforce it.

-- Who may look at the mailbox. `subject` is the identity provider's name for the account, not an e-mail address.
create table email_unsubscribe.users (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    subject varchar(255) not null,
    created_at timestamptz not null default current_timestamp,
    constraint users_pkey primary key (id),
    constraint users_subject_key unique (subject),
    constraint users_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint users_subject_not_empty check (subject <> '')
);

-- From login to logout. No row here authenticates anybody: the application keeps session tokens elsewhere.
create table email_unsubscribe.sessions (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    user_id varchar(26) collate "C" not null,
    started_at timestamptz not null default current_timestamp,
    ended_at timestamptz,
    end_reason varchar(50),
    constraint sessions_pkey primary key (id),
    constraint sessions_user_id_fkey foreign key (user_id) references email_unsubscribe.users (id) on delete cascade,
    constraint sessions_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint sessions_end_reason_known check (end_reason in ('logout', 'expired', 'revoked')),
    constraint sessions_end_is_whole check ((ended_at is null) = (end_reason is null)),
    constraint sessions_end_behind_start check (ended_at >= started_at)
);
create index sessions_user_id on email_unsubscribe.sessions (user_id);

-- Tokens of the mailbox's account. The application encrypts them: the checks accept only Fernet's form, so a plain
-- token cannot be stored. `expiry` is the access token's.
create table email_unsubscribe.oauth_tokens (
    account varchar(255) not null,
    access_token text not null,
    refresh_token text,
    expiry timestamptz not null,
    encrypted_at timestamptz not null,
    constraint oauth_tokens_pkey primary key (account),
    constraint oauth_tokens_account_not_empty check (account <> ''),
    constraint oauth_tokens_access_token_is_encrypted check (access_token ~ '^gAAAAA[A-Za-z0-9_-]{92,}={0,2}$'),
    constraint oauth_tokens_refresh_token_is_encrypted check (refresh_token ~ '^gAAAAA[A-Za-z0-9_-]{92,}={0,2}$')
);

-- Senders that the user wants to keep hearing from: an address, or a whole domain.
create table email_unsubscribe.allow_list (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    entry_type varchar(50) not null,
    value varchar(320) not null,
    created_at timestamptz not null default current_timestamp,
    domain varchar(255) not null generated always as (substring(value from '[^@]*$')) stored,
    constraint allow_list_pkey primary key (id),
    constraint allow_list_entry_type_value_key unique (entry_type, value),
    constraint allow_list_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint allow_list_entry_type_known check (entry_type in ('email', 'domain')),
    constraint allow_list_value_fits_type check (
        case entry_type when 'email' then value ~ '^[^[:space:]]+@[^@[:space:]]+$' else value ~ '^[^@[:space:]]+$' end
    ),
    constraint allow_list_value_in_small_letters check (value = lower(value))
);

-- What is known about each sender. Only triggers write here, from sender_emails and unsubscribe_history.
create table email_unsubscribe.senders (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    sender varchar(320) not null,
    first_seen timestamptz not null,
    last_seen timestamptz not null,
    unsubscribed_at timestamptz,
    emails_after_unsubscribe integer not null,
    domain varchar(255) not null generated always as (substring(sender from '[^@]*$')) stored,
    constraint senders_pkey primary key (id),
    constraint senders_sender_key unique (sender),
    constraint senders_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint senders_seen_in_order check (first_seen <= last_seen),
    constraint senders_emails_after_unsubscribe_not_negative check (emails_after_unsubscribe >= 0),
    constraint senders_emails_after_unsubscribe_need_one check (
        emails_after_unsubscribe = 0 or unsubscribed_at is not null
    )
);

-- One row for each e-mail that was seen, by the mailbox's id for it, so that none is counted twice. No content is
-- stored.
create table email_unsubscribe.sender_emails (
    message_id varchar(255) not null,
    sender varchar(320) not null,
    received_at timestamptz not null,
    constraint sender_emails_pkey primary key (message_id),
    -- Deferred: a trigger creates the sender's row at the end of the statement.
    constraint sender_emails_sender_fkey foreign key (sender) references email_unsubscribe.senders (sender)
        deferrable initially deferred,
    constraint sender_emails_message_id_not_empty check (message_id <> ''),
    constraint sender_emails_sender_is_address check (
        sender ~ '^[^[:space:]]+@[^@[:space:]]+$' and sender = lower(sender)
    )
);
create index sender_emails_sender_received_at on email_unsubscribe.sender_emails (sender, received_at);

-- One row for each attempt: pending until it succeeds or fails. Keep the URL secret: it is enough to unsubscribe the
-- user.
create table email_unsubscribe.unsubscribe_history (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    sender varchar(320) not null,
    unsubscribe_url text not null,
    method varchar(50) not null,
    attempted_at timestamptz not null default current_timestamp,
    status varchar(50) not null default 'pending',
    failure_reason text,
    domain varchar(255) not null generated always as (substring(sender from '[^@]*$')) stored,
    constraint unsubscribe_history_pkey primary key (id),
    constraint unsubscribe_history_sender_fkey foreign key (sender) references email_unsubscribe.senders (sender)
        deferrable initially deferred,
    constraint unsubscribe_history_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint unsubscribe_history_sender_is_address check (
        sender ~ '^[^[:space:]]+@[^@[:space:]]+$' and sender = lower(sender)
    ),
    constraint unsubscribe_history_method_known check (method in ('one_click', 'link', 'mailto')),
    -- A one-click request is a POST over TLS (RFC 8058); an e-mail goes to an address.
    constraint unsubscribe_history_url_fits_method check (
        unsubscribe_url ~* case method
            when 'one_click' then '^https://.'
            when 'link' then '^https?://.'
            else '^mailto:.'
        end
    ),
    constraint unsubscribe_history_status_known check (status in ('pending', 'succeeded', 'failed')),
    constraint unsubscribe_history_failure_has_reason check ((status = 'failed') = (coalesce(failure_reason, '') <> ''))
);
create index unsubscribe_history_newest on email_unsubscribe.unsubscribe_history (attempted_at desc, id desc);
create index unsubscribe_history_sender_attempted_at on email_unsubscribe.unsubscribe_history (sender, attempted_at);

-- What was done, for later investigation. Only triggers write here, and nothing is ever changed. There are no foreign
-- keys, so that entries outlive the rows they describe.
create table email_unsubscribe.audit_log (
    id varchar(26) collate "C" not null default rowcast.ulid(),
    occurred_at timestamptz not null default clock_timestamp(),
    action varchar(50) not null,
    db_role text not null default session_user,
    sender varchar(320),
    unsubscribe_url text,
    method varchar(50),
    outcome varchar(50),
    entry_type varchar(50),
    entry_value varchar(320),
    user_id varchar(26) collate "C",
    session_id varchar(26) collate "C",
    constraint audit_log_pkey primary key (id),
    constraint audit_log_id_is_ulid check (id ~ '^[0-7][0-9A-HJKMNP-TV-Z]{25}$'),
    constraint audit_log_action_known check (
        action in (
            'unsubscribe', 'allow_list_add', 'allow_list_remove', 'login', 'logout', 'session_expired', 'session_revoked'
        )
    ),
    constraint audit_log_method_known check (method in ('one_click', 'link', 'mailto')),
    constraint audit_log_outcome_known check (outcome in ('pending', 'succeeded', 'failed')),
    constraint audit_log_entry_type_known check (entry_type in ('email', 'domain')),
    constraint audit_log_tells_all check (
        case
            when action = 'unsubscribe' then
                num_nonnulls(sender, unsubscribe_url, method, outcome) = 4
                and num_nonnulls(entry_type, entry_value, user_id, session_id) = 0
            when action in ('allow_list_add', 'allow_list_remove') then
                num_nonnulls(entry_type, entry_value) = 2
                and num_nonnulls(sender, unsubscribe_url, method, outcome, user_id, session_id) = 0
            else
                num_nonnulls(user_id, session_id) = 2
                and num_nonnulls(sender, unsubscribe_url, method, outcome, entry_type, entry_value) = 0
        end
    )
);
create index audit_log_newest on email_unsubscribe.audit_log (occurred_at desc, id desc);
