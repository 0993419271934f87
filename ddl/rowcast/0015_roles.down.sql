drop function rowcast.drop_retired(text, integer);
drop function rowcast.make_next_segment();
alter function rowcast.capture_canary() security invoker;
alter function rowcast.retire_segments(interval) security invoker;
alter function rowcast.purge(integer) security invoker;
alter function rowcast.reset_emptied() security invoker;
alter function rowcast.set_aside(uuid, xid8, bigint, bigint, integer, text) security invoker;
alter function rowcast.open_term(uuid, uuid, interval, boolean, uuid, bigint) security invoker;
alter function rowcast.leave_segment() security invoker;
