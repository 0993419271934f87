-- Children first, and no CASCADE: an object that somebody attached to a table stops the rollback.
drop table email_unsubscribe.audit_log;
drop table email_unsubscribe.unsubscribe_history;
drop table email_unsubscribe.sender_emails;
drop table email_unsubscribe.senders;
drop table email_unsubscribe.allow_list;
drop table email_unsubscribe.oauth_tokens;
drop table email_unsubscribe.sessions;
drop table email_unsubscribe.users;
