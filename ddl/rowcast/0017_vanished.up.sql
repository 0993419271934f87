-- The capture triggers of watched tables and their partitions, as they are known. One that is gone although nobody called
-- rowcast.watch() or rowcast.unwatch() went with its table, and so did rows that clients still have: a partition was dropped
-- or detached. Its owner's functions alone read and write it.
create table rowcast.capturing (
    trigger_id oid primary key,
    watch integer not null
);
revoke all on rowcast.capturing from public;
