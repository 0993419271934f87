-- Children first, and no CASCADE: an object that somebody attached to a table stops the rollback.
drop table asyncops.daily_summaries;
drop table asyncops.decision_audit_log;
drop table asyncops.decision_participants;
drop table asyncops.decisions;
drop table asyncops.blockers;
drop table asyncops.incidents;
drop table asyncops.status_updates;
drop table asyncops.users;
