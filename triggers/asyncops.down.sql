-- What triggers/asyncops.sql granted on the schema, which may stay when the tables go. Their own grants go with them.
do $$
begin
    execute format('revoke usage on schema %I from asyncops_app', split_part('asyncops.users', '.', 1));
exception when undefined_object then
    null;  -- there never was such a role
end
$$;
