-- What triggers/rowcast.sql made goes first, since it names the row types of Rowcast's tables. By now no table is watched.
drop function rowcast.unwatch_dropped, rowcast.unwatch, rowcast.watch, rowcast.capture_triggers, rowcast.with_partitions,
    rowcast.capture_body, rowcast.every_right, rowcast.live_of, rowcast.json_of, rowcast.columns_of, rowcast.ring,
    rowcast.must_ring;
