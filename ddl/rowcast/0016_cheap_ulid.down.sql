-- rowcast.ulid() runs in sessions of every role, as the default of primary keys. With every name and operator qualified it
-- means the same whatever their search_path is. `set search_path` would do that too, at a third of its cost more.
create or replace function rowcast.ulid() returns text
language plpgsql volatile parallel safe
as $$
declare
    a constant pg_catalog.bytea := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    -- Byte 6 holds the version; the low bits of the others are random.
    u constant pg_catalog.bytea := pg_catalog.uuid_send(pg_catalog.gen_random_uuid());
    us constant bigint := extract(epoch from pg_catalog.clock_timestamp()) operator(pg_catalog.*) 1000000;
    hi constant integer := us operator(pg_catalog./) 1000 operator(pg_catalog.>>) 25;
    lo constant integer := us operator(pg_catalog./) 1000 operator(pg_catalog.&) 33554431;
    fine constant integer := us operator(pg_catalog.%) 1000;
begin
    return pg_catalog.chr(pg_catalog.get_byte(a, hi operator(pg_catalog.>>) 20))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, hi operator(pg_catalog.>>) 15 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, hi operator(pg_catalog.>>) 10 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, hi operator(pg_catalog.>>) 5 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, hi operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, lo operator(pg_catalog.>>) 20))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, lo operator(pg_catalog.>>) 15 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, lo operator(pg_catalog.>>) 10 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, lo operator(pg_catalog.>>) 5 operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, lo operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, fine operator(pg_catalog.>>) 5))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, fine operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 0) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 1) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 2) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 3) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 4) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 5) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 7) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 8) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 9) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 10) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 11) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 12) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 13) operator(pg_catalog.&) 31))
        operator(pg_catalog.||) pg_catalog.chr(pg_catalog.get_byte(a, pg_catalog.get_byte(u, 14) operator(pg_catalog.&) 31));
end
$$;
