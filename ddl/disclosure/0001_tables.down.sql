-- Children first: nothing is dropped by CASCADE, so that an object somebody hung on a table stops the rollback.
drop table disclosure.disclosure_log;
drop table disclosure.recipients;
drop table disclosure.secrets;
drop table disclosure.users;
