-- Whom the live page may sign in as: the people of demo.sql, as far as they are there and live.
select u.id, coalesce(u.full_name, u.username) as name
from chatgenius.live_users as u
where u.auth0_id in ('demo|alice', 'demo|bob', 'demo|carol', 'demo|dave', 'demo|eve')
order by u.username;
