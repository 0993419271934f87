-- Whom the live page may sign in as: the operators of demo.sql, as far as they are there and live.
select o.id::text as id, o.name
from antone.operators as o
where o.id in (md5('antone demo operator 1')::uuid, md5('antone demo operator 2')::uuid) and o.deleted_at is null
order by o.name;
