-- Existing rows follow the rules of 0005. A row whose name, title or address breaks them stops this revision, which
-- then names the constraint: what the right value is, only its owner knows.

-- The trigger of 0005 does the rest.
update disclosure.secrets as s set status = 'failed' where s.retry_count > 5 and s.status <> 'failed';
update disclosure.secrets as s set processing_started_at = null
where s.status <> 'active' and s.processing_started_at is not null;

-- When a recipient was told is not known any better than by the start of the attempt.
update disclosure.disclosure_log as l
set sent_at = case when l.status = 'sent' then l.created_at end
where (l.status = 'sent') <> (l.sent_at is not null);

alter table disclosure.users validate constraint users_name_visible;
alter table disclosure.secrets
validate constraint secrets_title_visible,
validate constraint secrets_sixth_failure_is_final,
validate constraint secrets_only_active_are_claimed;
alter table disclosure.recipients validate constraint recipients_email_well_formed;
alter table disclosure.disclosure_log
validate constraint disclosure_log_recipient_email_is_address,
validate constraint disclosure_log_recipient_email_well_formed,
validate constraint disclosure_log_sent_at_fits_status;
