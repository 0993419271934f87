-- Revokes what triggers/email_unsubscribe.sql granted on the schema, which may outlive the tables. Grants on tables
-- go with them. The role stays: it belongs to the cluster, and another database may use it.
do $$
begin
    execute format('revoke usage on schema %I from %I', split_part('email_unsubscribe.users', '.', 1),
                   left(split_part('email_unsubscribe.users', '.', 1), 59) || '_app');
exception when undefined_object then
    null;  -- the role does not exist
end
$$;
