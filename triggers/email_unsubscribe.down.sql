-- What triggers/email_unsubscribe.sql granted on the schema, which may stay when the tables go. Their own grants go with
-- them. The role itself stays: it belongs to the cluster, and another database may use it.
do $$
begin
    execute format('revoke usage on schema %I from %I', split_part('email_unsubscribe.users', '.', 1),
                   left(split_part('email_unsubscribe.users', '.', 1), 59) || '_app');
exception when undefined_object then
    null;  -- there never was such a role
end
$$;
