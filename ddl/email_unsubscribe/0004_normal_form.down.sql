alter table email_unsubscribe.oauth_tokens drop constraint oauth_tokens_account_visible;
alter table email_unsubscribe.users drop constraint users_subject_visible;

alter table email_unsubscribe.unsubscribe_history
drop constraint unsubscribe_history_url_well_formed,
drop constraint unsubscribe_history_sender_well_formed,
drop constraint unsubscribe_history_sender_in_normal_form,
drop constraint unsubscribe_history_sender_is_address,
add constraint unsubscribe_history_sender_is_address check (
    sender ~ '^[^[:space:]]+@[^@[:space:]]+$' and sender = lower(sender)
);

alter table email_unsubscribe.sender_emails
drop constraint sender_emails_sender_well_formed,
drop constraint sender_emails_sender_in_normal_form,
drop constraint sender_emails_sender_is_address,
add constraint sender_emails_sender_is_address check (
    sender ~ '^[^[:space:]]+@[^@[:space:]]+$' and sender = lower(sender)
);

alter table email_unsubscribe.allow_list
drop constraint allow_list_value_well_formed,
drop constraint allow_list_value_in_normal_form,
add constraint allow_list_value_in_small_letters check (value = lower(value));

create or replace function email_unsubscribe.normalised_address(address text) returns text
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
    select lower(btrim(address, E' \t\r\n'))
$$;

drop function email_unsubscribe.small_letters(text);
