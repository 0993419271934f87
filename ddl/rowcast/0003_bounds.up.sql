-- A change that is too large to deliver is captured as a `limit`: its topic is reset.
alter type rowcast.kind add value if not exists 'limit' after 'lost';

-- About the size of the record in bytes. Null below 1024, so that most events do without it.
alter table rowcast.events add column bytes integer;
