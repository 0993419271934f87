drop function rowcast.reset_emptied();
drop table rowcast.since_crash;
