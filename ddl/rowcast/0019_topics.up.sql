-- The changes of a topic, in order. Two integers are the most that Postgres packs densely where each topic grows at a place of
-- its own: with the topic itself, every page is split in two halves. Whoever reads by this index compares the topic as well.
-- Of one hash alone, anybody could find topics that share it with another's, and slow down whoever reads that one.
-- squawk-ignore require-concurrent-index-creation -- only the leader writes this table
create index log_topic_hash on rowcast.log ((hashtextextended(topic, 1) # hashtextextended(topic, 2)), seq);
-- squawk-ignore require-concurrent-index-deletion -- last, so that readers wait for nothing else
drop index rowcast.log_topic;
