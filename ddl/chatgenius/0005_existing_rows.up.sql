-- A row that breaks a rule of 0004 stops this revision, which then names the rule: the right value is for people to say.

alter table chatgenius.users
validate constraint users_email_shaped,
validate constraint users_email_well_formed,
validate constraint users_username_visible,
validate constraint users_full_name_visible,
validate constraint users_avatar_url_well_formed;
alter table chatgenius.channels
validate constraint channels_name_visible;
alter table chatgenius.files
validate constraint files_name_visible,
validate constraint files_url_well_formed;
