-- The users that the live page offers for sign-in: the people of demo.sql, if they exist.
select u.id, u.name
from disclosure.users as u
where u.id in ('01JH000000VSER0000000A11CE', '01JH000000VSER000000000B0B')
order by u.name;
