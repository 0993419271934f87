-- Children first, and no CASCADE: an object that somebody attached to a table stops the rollback.
drop table disclosure.disclosure_log;
drop table disclosure.recipients;
drop table disclosure.secrets;
drop table disclosure.users;
