drop function rowcast.is_readable(xid8, bigint);
