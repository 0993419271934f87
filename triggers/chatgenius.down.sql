-- Revokes what triggers/chatgenius.sql granted on the schema, which may outlive the tables. Grants on tables go with
-- them.
do $$
begin
    execute format('revoke usage on schema %I from rowcast_capture', split_part('chatgenius.messages', '.', 1));
exception when undefined_object then
    null;  -- the role does not exist
end
$$;
