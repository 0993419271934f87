-- Dropped before Rowcast's tables, since these functions use their row types. No table is watched at this point.
drop function rowcast.let_serve, rowcast.daemons, rowcast.rights_of_daemons, rowcast.let_daemons_call, rowcast.serve, rowcast.serve_again, rowcast.make_right, rowcast.may_read, rowcast.stop_serving, rowcast.stop_capturing, rowcast.note_change, rowcast.shape_of,
    rowcast.is_indexed, rowcast.rows_of, rowcast.pattern_of, rowcast.is_covered, rowcast.topics_as_array,
    rowcast.list_triggers, rowcast.reset_vanished, rowcast.reset_altered, rowcast.note_layout, rowcast.layout_of, rowcast.soft_deletes, rowcast.refuse_soft_delete, rowcast.unwatch_dropped, rowcast.unwatch, rowcast.watch,
    rowcast.filtered_rows, rowcast.snapshot_statement, rowcast.filter_condition, rowcast.compared_columns,
    rowcast.make_snapshot, rowcast.settings_clause, rowcast.snapshot_body,
    rowcast.check_inheritance, rowcast.unique_at_once,
    rowcast.is_simple, rowcast.used_columns, rowcast.type_of, rowcast.let_capture_read, rowcast.definition_of, rowcast.has_capture_role, rowcast.capture_triggers,
    rowcast.outdated_captures, rowcast.may_move, rowcast.written_so_far, rowcast.function_stands, rowcast.doubtful_foreign_keys, rowcast.with_partitions, rowcast.capture_body, rowcast.delete_body, rowcast.update_body, rowcast.insert_body,
    rowcast.every_right, rowcast.short_right, rowcast.key_of, rowcast.record_row, rowcast.record_of, rowcast.bytes_of, rowcast.long_key, rowcast.size_of, rowcast.live_of,
    rowcast.same_key, rowcast.published, rowcast.captured_columns, rowcast.capture_settings, rowcast.ring, rowcast.must_ring, rowcast.has_captured;
