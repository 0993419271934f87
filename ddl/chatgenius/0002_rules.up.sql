-- Triggers: maintain updated_at, and delete a message's children before the message.

-- clock_timestamp(), not the start of the transaction: the trigger runs after the row is locked, so the later of two
-- versions of a row has the later time even if its transaction began first.
create function chatgenius.set_updated_at() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.updated_at := clock_timestamp();
    return new;
end
$$;

-- An UPDATE that changes nothing leaves updated_at alone.
create trigger users_set_updated_at
before update on chatgenius.users
for each row when (old.* is distinct from new.*)
execute function chatgenius.set_updated_at();

create trigger channels_set_updated_at
before update on chatgenius.channels
for each row when (old.* is distinct from new.*)
execute function chatgenius.set_updated_at();

create trigger messages_set_updated_at
before update on chatgenius.messages
for each row when (old.* is distinct from new.*)
execute function chatgenius.set_updated_at();

-- Reactions, receipts and files are published in their message's channel, which capture looks up. A foreign key acts
-- after the message is gone: the lookup would find nothing, and no subscriber would learn of the deletion. So this
-- trigger deletes them, and detaches files, while the message still exists.
-- Security definer, like a foreign key's own action: deleting a message requires no rights on its reactions.
create function chatgenius.release_message_children() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Check first: a statement that finds no row still runs the capture triggers.
    if exists (select from chatgenius.reactions as r where r.message_id = old.id) then
        delete from chatgenius.reactions as r where r.message_id = old.id;
    end if;
    if exists (select from chatgenius.message_reads as r where r.message_id = old.id) then
        delete from chatgenius.message_reads as r where r.message_id = old.id;
    end if;
    if exists (select from chatgenius.files as f where f.message_id = old.id) then
        update chatgenius.files as f set message_id = null where f.message_id = old.id;
    end if;
    return old;
end
$$;

create trigger messages_release_children
before delete on chatgenius.messages
for each row execute function chatgenius.release_message_children();

revoke execute on function chatgenius.set_updated_at() from public;
revoke execute on function chatgenius.release_message_children() from public;
