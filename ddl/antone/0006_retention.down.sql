drop view antone.audit_logs_to_archive;
drop view antone.kpi_metrics_to_archive;
drop view antone.posts_to_archive;
