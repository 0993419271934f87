drop table rowcast.canary;
drop function rowcast.capture_canary();
