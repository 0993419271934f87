-- The role by which the application logs in, what it may do, and which tables are captured.
-- E-mail addresses, unsubscribe URLs, reasons of failures and OAuth tokens are never published.
--   senders      what is known of each sender, by its domain
--   history      unsubscribe attempts
--   allow_list   the allow list, by its domains
--   audit        the audit log, without addresses and URLs
--   account:<id>    the user and the user's sessions
-- Applied at every `daemon --apply-ddl`; watch() does nothing where nothing changed.

-- The application's own credentials: a role that has this schema and nothing else, so that whoever gets hold of them
-- reaches nothing else. It has no password until the operator sets one (\password in psql), and no file ever holds it.
-- Roles are shared by all databases of the cluster.
do $$
declare
    home constant name := split_part('email_unsubscribe.users', '.', 1);  -- follows `--schema`
    app constant name := left(home, 59) || '_app';
begin
    if not exists (select from pg_catalog.pg_roles as r where r.rolname = app) then
        begin
            execute format('create role %I login', app);
        exception
            when duplicate_object or unique_violation then
                null;  -- another database of this cluster was faster
            when insufficient_privilege then
                raise warning 'rowcast: % may not create the role %. Create it (create role % login), then apply again.',
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
        raise warning 'rowcast: the role % may do more than its schema needs: take that from it', app;
    end if;
    execute format('grant usage on schema %I to %I', home, app);
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
        'grant execute on function email_unsubscribe.in_one_form(text), email_unsubscribe.entry_in_one_form(text, text) to %I',
        app
    );
    -- It refuses to work on a schema that is not current, and so it must see at which revision this one is.
    execute format('grant select on email_unsubscribe.alembic_version to %I', app);
end
$$;

-- A deleted user loses every topic.
select rowcast.watch(
    'email_unsubscribe.users', pack => 'email_unsubscribe',
    topic => $$'account:' || r.id$$,
    columns => '{id, created_at}',
    revokes => $$jsonb_build_object('user', r.id)$$
);

select rowcast.watch(
    'email_unsubscribe.sessions', pack => 'email_unsubscribe',
    topic => $$'account:' || r.user_id$$,
    columns => '{id, user_id, started_at, ended_at, end_reason}'
);

select rowcast.watch(
    'email_unsubscribe.senders', pack => 'email_unsubscribe',
    topic => $$'senders'$$,
    columns => '{id, domain, first_seen, last_seen, unsubscribed_at, emails_after_unsubscribe}'
);

select rowcast.watch(
    'email_unsubscribe.unsubscribe_history', pack => 'email_unsubscribe',
    topic => $$'history'$$,
    columns => '{id, domain, method, attempted_at, status}'
);

select rowcast.watch(
    'email_unsubscribe.allow_list', pack => 'email_unsubscribe',
    topic => $$'allow_list'$$,
    columns => '{id, entry_type, domain, created_at}'
);

select rowcast.watch(
    'email_unsubscribe.audit_log', pack => 'email_unsubscribe',
    topic => $$'audit'$$,
    columns => '{id, occurred_at, action, method, outcome, entry_type, user_id}'
);
