-- The watched tables that are served without a pack. triggers/rowcast.sql writes the functions rowcast.may_read_<watch>.
create table rowcast.own_tables (
    watch integer primary key,
    topics text [] not null,  -- a topic each, or the beginning of topics and an asterisk
    readable text not null,  -- who may read a topic: an SQL expression over the texts `user_id` and `topic`, and the row `r`
    definition text not null,  -- of its function
    since timestamptz not null default now(),
    constraint own_tables_watch_fkey foreign key (watch) references rowcast.watched (id) on delete cascade
);
revoke all on rowcast.own_tables from public;
