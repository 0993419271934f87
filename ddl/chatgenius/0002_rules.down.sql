drop trigger messages_release_children on chatgenius.messages;
drop function chatgenius.release_message_children();
drop trigger messages_set_updated_at on chatgenius.messages;
drop trigger channels_set_updated_at on chatgenius.channels;
drop trigger users_set_updated_at on chatgenius.users;
drop function chatgenius.set_updated_at();
