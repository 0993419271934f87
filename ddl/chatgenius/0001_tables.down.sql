-- Children first, and no CASCADE: an object that somebody attached to a table stops the rollback.
drop table chatgenius.sync_state;
drop table chatgenius.message_reads;
drop table chatgenius.user_status;
drop table chatgenius.user_settings;
drop table chatgenius.files;
drop table chatgenius.reactions;
drop table chatgenius.channel_members;
drop table chatgenius.messages;
drop table chatgenius.channels;
drop table chatgenius.users;
