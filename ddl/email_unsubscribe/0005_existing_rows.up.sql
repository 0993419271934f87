-- Brings existing rows into the normal form of 0004. Senders that were one become one: their triggers count again.

-- An entry that another spelling of it already has; the oldest stays.
delete from email_unsubscribe.allow_list as a
using (
    select d.id, row_number() over (
        partition by d.entry_type, email_unsubscribe.normalised_entry(d.entry_type, d.value) order by d.created_at, d.id
    ) as place
    from email_unsubscribe.allow_list as d
) as same
where a.id = same.id and same.place > 1;

update email_unsubscribe.allow_list as a set value = email_unsubscribe.normalised_entry(a.entry_type, a.value)
where a.value <> email_unsubscribe.normalised_entry(a.entry_type, a.value);

update email_unsubscribe.sender_emails as m set sender = email_unsubscribe.normalised_address(m.sender)
where m.sender <> email_unsubscribe.normalised_address(m.sender);

-- An attempt cannot be changed otherwise, and another spelling of its sender is no news for the audit log.
alter table email_unsubscribe.unsubscribe_history
disable trigger unsubscribe_history_settle_once,
disable trigger unsubscribe_history_audit_update;

update email_unsubscribe.unsubscribe_history as h set sender = email_unsubscribe.normalised_address(h.sender)
where h.sender <> email_unsubscribe.normalised_address(h.sender);

-- The deferred checks of the foreign keys to senders: a table with pending ones cannot be altered.
set constraints all immediate;

alter table email_unsubscribe.unsubscribe_history
enable trigger unsubscribe_history_settle_once,
enable trigger unsubscribe_history_audit_update;

alter table email_unsubscribe.allow_list
validate constraint allow_list_value_in_normal_form,
validate constraint allow_list_value_well_formed;
alter table email_unsubscribe.sender_emails
validate constraint sender_emails_sender_is_address,
validate constraint sender_emails_sender_in_normal_form,
validate constraint sender_emails_sender_well_formed;
alter table email_unsubscribe.unsubscribe_history
validate constraint unsubscribe_history_sender_is_address,
validate constraint unsubscribe_history_sender_in_normal_form,
validate constraint unsubscribe_history_sender_well_formed,
validate constraint unsubscribe_history_url_well_formed;
alter table email_unsubscribe.users validate constraint users_subject_visible;
alter table email_unsubscribe.oauth_tokens validate constraint oauth_tokens_account_visible;
