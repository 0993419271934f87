-- What the page at / can do for its sample users. `daemon up --demo` runs one of these statements for each POST to
-- /demo/NAME. They return whether it was done: a user acts only in channels that it may read, and edits and deletes only
-- what it wrote.
-- $1 is the user, text; $2 the body of the request, json.

-- name: say
-- {"id", "channel", "content"}. The page chooses the id, so that saying the same twice is saying it once.
with said as (
    insert into chatgenius.messages (id, channel_id, user_id, content)
    select $2::json ->> 'id', $2::json ->> 'channel', $1::text, $2::json ->> 'content'
    where chatgenius.may_read($1::text, 'channel:' || ($2::json ->> 'channel'))
    on conflict (id) do nothing
    returning id
)
select exists (select from said)
    or exists (select from chatgenius.messages as m where m.id = $2::json ->> 'id' and m.user_id = $1::text);

-- name: edit
-- {"message", "content"}
with edited as (
    update chatgenius.messages as m set content = $2::json ->> 'content'
    where m.id = $2::json ->> 'message' and m.user_id = $1::text and m.deleted_at is null
      and chatgenius.may_read($1::text, 'channel:' || m.channel_id)
    returning m.id
)
select exists (select from edited);

-- name: delete
-- {"message"}
with deleted as (
    update chatgenius.messages as m set deleted_at = now()
    where m.id = $2::json ->> 'message' and m.user_id = $1::text and m.deleted_at is null
      and chatgenius.may_read($1::text, 'channel:' || m.channel_id)
    returning m.id
)
select exists (select from deleted);

-- name: react
-- {"message", "emoji"}: adds the reaction, or takes it back.
with target as (
    select m.id from chatgenius.messages as m
    where m.id = $2::json ->> 'message' and m.deleted_at is null
      and chatgenius.may_read($1::text, 'channel:' || m.channel_id)
),
taken_back as (
    delete from chatgenius.reactions as r using target as t
    where r.message_id = t.id and r.user_id = $1::text and r.emoji = $2::json ->> 'emoji'
    returning r.id
),
added as (
    insert into chatgenius.reactions (message_id, user_id, emoji)
    select t.id, $1::text, $2::json ->> 'emoji' from target as t
    where not exists (select from taken_back)
    on conflict do nothing
    returning id
)
select exists (select from target);

-- name: read
-- {"message"}: the user has read the channel up to this message.
with target as (
    select m.id from chatgenius.messages as m
    where m.id = $2::json ->> 'message' and chatgenius.may_read($1::text, 'channel:' || m.channel_id)
),
added as (
    insert into chatgenius.message_reads (message_id, user_id)
    select t.id, $1::text from target as t
    on conflict do nothing
    returning message_id
)
select exists (select from target);
