-- What triggers/antone.sql granted on the schema, which may stay when the tables go. Their own grants go with them.
do $$
begin
    execute format('revoke usage on schema %I from rowcast_capture', split_part('antone.posts', '.', 1));
exception when undefined_object then
    null;  -- there never was such a role
end
$$;
