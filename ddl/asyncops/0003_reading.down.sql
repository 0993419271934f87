drop function asyncops.may_read(text, text);
drop view asyncops.live_blockers;
drop view asyncops.live_incidents;
drop view asyncops.live_status_updates;
