-- Existing rows follow the rules of 0005. A row that breaks them stops this revision, which then names the constraint:
-- what the right value is, only its author knows.

-- Rows that were opened again after they had been archived.
update asyncops.incidents as i set archived_at = null
where i.archived_at is not null and i.status not in ('resolved', 'closed');
update asyncops.blockers as b set archived_at = null where b.archived_at is not null and b.status <> 'resolved';

alter table asyncops.users
validate constraint users_email_is_address,
validate constraint users_email_well_formed,
validate constraint users_full_name_visible;
alter table asyncops.status_updates validate constraint status_updates_title_visible;
alter table asyncops.incidents validate constraint incidents_title_visible;
alter table asyncops.decisions
validate constraint decisions_title_visible,
validate constraint decisions_decision_date_not_ahead;
alter table asyncops.daily_summaries validate constraint daily_summaries_summary_date_not_ahead;
