-- Children first, and no CASCADE: an object that somebody attached to a table stops the rollback.
drop table antone.archived_files;
drop table antone.segmented_weights;
drop table antone.randomized_experiments;
drop table antone.learning_events;
drop table antone.weight_adjustment_logs;
drop table antone.audit_logs;
drop table antone.escalations;
drop table antone.kpi_metrics;
drop table antone.community_champions;
drop table antone.competitive_mentions;
drop table antone.competitors;
drop table antone.replies;
drop table antone.decisions;
drop table antone.experiments;
drop table antone.posts;
drop table antone.authors;
drop table antone.operators;
