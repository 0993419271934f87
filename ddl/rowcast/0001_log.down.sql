-- The role rowcast_capture stays: it belongs to the cluster, and another database may use it.
drop function rowcast.open_term();
drop function rowcast.drop_extensions(name);
drop function rowcast.want_extension(name, name);
drop table rowcast.extensions;
drop table rowcast.lost;
drop table rowcast.dead_letters;
drop table rowcast.batches;
drop table rowcast.terms;
drop view rowcast.changes;
drop table rowcast.log;
drop table rowcast.events;
drop table rowcast.watched;
drop type rowcast.kind;
drop function rowcast.ulid();
