-- The users that the live page offers for sign-in: the operators of demo.sql that exist and are not deleted.
select o.id::text as id, o.name
from antone.operators as o
where o.id in (md5('antone demo operator 1')::uuid, md5('antone demo operator 2')::uuid) and o.deleted_at is null
order by o.name;
