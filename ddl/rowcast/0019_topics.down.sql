create index log_topic on rowcast.log (topic, seq);
drop index rowcast.log_topic_hash;
