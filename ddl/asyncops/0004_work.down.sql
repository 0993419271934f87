-- The role asyncops_app stays: it belongs to the cluster, and another database may use it.
drop function asyncops.archive(integer, timestamptz);
drop function asyncops.generate_daily_summary(date);
drop function asyncops.create_admin(text, text, text);
