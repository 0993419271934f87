-- Dropped before Rowcast's tables, since these functions use their row types. No table is watched at this point.
drop function rowcast.unwatch_dropped, rowcast.unwatch, rowcast.watch, rowcast.capture_triggers, rowcast.with_partitions,
    rowcast.capture_body, rowcast.every_right, rowcast.live_of, rowcast.json_of, rowcast.columns_of, rowcast.ring,
    rowcast.must_ring;
