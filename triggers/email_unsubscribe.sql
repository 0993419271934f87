-- The role that the application logs in as, what it may do, and which tables are captured.
-- E-mail addresses, unsubscribe URLs, failure reasons and OAuth tokens are never published.
--   senders        what is known about each sender, by its domain
--   history        unsubscribe attempts
--   allow_list     the allow list, by its domains
--   audit          the audit log, without addresses and URLs
--   account:<id>   the user and the user's sessions
-- Applied at every `daemon --apply-ddl`; watch() does nothing if nothing changed.
-- Tables come before those that they refer to, in the order in which a writer locks them.

-- The application's own credentials: a role that has access to this schema only, so that leaked credentials reach
-- nothing else. It can log in once the operator lets it and sets a password, which no file ever contains. All databases
-- of the cluster share its roles.
do $$
declare
    own_schema constant name := split_part('email_unsubscribe.users', '.', 1);  -- follows `--schema`
    -- `daemon check` runs this file in a schema of another name, and says in this setting which one it stands for.
    instead_of constant name := nullif(pg_catalog.current_setting('rowcast.instead_of', true), '');
    app constant name := left(coalesce(instead_of, own_schema), 59) || '_app';
begin
    if not exists (select from pg_catalog.pg_roles as r where r.rolname = app) then
        begin
            execute format('create role %I nologin', app);
        exception
            when duplicate_object or unique_violation then
                null;  -- another database of this cluster created it first
            when insufficient_privilege then
                raise warning 'rowcast: % may not create the role %. Create it (create role % nologin), then apply again.',
                    current_user, app, app;
                return;
        end;
    end if;
    if exists (
        select from pg_catalog.pg_roles as r
        where r.rolname = app
          and (r.rolsuper or r.rolcreaterole or r.rolcreatedb or r.rolreplication or r.rolbypassrls
               or exists (select from pg_catalog.pg_auth_members as m where m.member = r.oid))
    ) then
        raise warning 'rowcast: the role % has more rights than the application needs: revoke them', app;
    end if;
    -- Up to PostgreSQL 14, PUBLIC may create objects in `public`. Others may rely on it, so an operator decides.
    if has_schema_privilege(app, to_regnamespace('public'), 'create') then
        raise warning 'rowcast: the role % may create objects in the schema public: revoke create on schema public from public',
            app;
    end if;
    execute format('grant usage on schema %I to %I', own_schema, app);
    execute format('grant select, insert, delete on email_unsubscribe.users to %I', app);
    execute format('grant select, insert, update (ended_at, end_reason) on email_unsubscribe.sessions to %I', app);
    execute format('grant select, insert, update, delete on email_unsubscribe.oauth_tokens to %I', app);
    execute format('grant select, insert, delete on email_unsubscribe.allow_list to %I', app);
    execute format('grant select, insert on email_unsubscribe.sender_emails to %I', app);
    execute format(
        'grant select, insert, update (status, failure_reason) on email_unsubscribe.unsubscribe_history to %I', app
    );
    execute format('grant select on email_unsubscribe.senders, email_unsubscribe.audit_log to %I', app);
    execute format(
        'grant execute on function email_unsubscribe.normalised_address(text), email_unsubscribe.normalised_entry(text, text) to %I',
        app
    );
    -- The application refuses a schema that is not current, so it must be able to read its revision.
    execute format('grant select on email_unsubscribe.alembic_version to %I', app);
end
$$;

select rowcast.watch(
    'email_unsubscribe.audit_log', pack => 'email_unsubscribe',
    topic => $$'audit'$$,
    columns => '{id, occurred_at, action, method, outcome, entry_type, user_id}',
    rows => $$topic = 'audit'$$
);

select rowcast.watch(
    'email_unsubscribe.allow_list', pack => 'email_unsubscribe',
    topic => $$'allow_list'$$,
    columns => '{id, entry_type, domain, created_at}',
    rows => $$topic = 'allow_list'$$
);

select rowcast.watch(
    'email_unsubscribe.unsubscribe_history', pack => 'email_unsubscribe',
    topic => $$'history'$$,
    columns => '{id, domain, method, attempted_at, status}',
    rows => $$topic = 'history'$$
);

select rowcast.watch(
    'email_unsubscribe.senders', pack => 'email_unsubscribe',
    topic => $$'senders'$$,
    columns => '{id, domain, first_seen, last_seen, unsubscribed_at, emails_after_unsubscribe}',
    rows => $$topic = 'senders'$$
);

select rowcast.watch(
    'email_unsubscribe.sessions', pack => 'email_unsubscribe',
    topic => $$'account:' || r.user_id$$,
    columns => '{id, user_id, started_at, ended_at, end_reason}',
    rows => $$r.user_id = split_part(topic, 'account:', 2)$$
);

-- A deleted user loses every topic.
select rowcast.watch(
    'email_unsubscribe.users', pack => 'email_unsubscribe',
    topic => $$'account:' || r.id$$,
    columns => '{id, created_at}',
    revokes => $$jsonb_build_object('user', r.id)$$,
    rows => $$r.id = split_part(topic, 'account:', 2)$$
);
