drop function chatgenius.may_read(text, text);
drop view chatgenius.live_messages;
drop view chatgenius.live_channels;
drop view chatgenius.live_users;
