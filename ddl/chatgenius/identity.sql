-- Whom tokens of another issuer mean: their `sub` is the auth0_id of a user. Users that are deleted are nobody.
-- $1 the subjects
select u.auth0_id as subject, u.id as user_id from chatgenius.live_users as u where u.auth0_id = any($1::text[]);
