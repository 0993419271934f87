-- The users that the live page offers for sign-in: the people of demo.sql that exist and are not deleted.
select u.id, coalesce(u.full_name, u.username) as name
from chatgenius.live_users as u
where u.auth0_id in ('demo|alice', 'demo|bob', 'demo|carol', 'demo|dave', 'demo|eve')
order by u.username;
