-- The users that the live page offers for sign-in: the people of demo.sql that exist and are active.
select u.id::text as id, u.full_name as name
from asyncops.users as u
where u.is_active and u.email in (
    'ada@example.com', 'ben@example.com', 'cleo@example.com', 'dan@example.com', 'eve@example.com', 'finn@example.com',
    'gina@example.com', 'hugo@example.com'
)
order by u.full_name;
