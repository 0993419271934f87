create or replace function rowcast.ulid() returns text
language plpgsql volatile parallel safe
as $$
declare
    a constant bytea := '0123456789ABCDEFGHJKMNPQRSTVWXYZ';
    u constant bytea := uuid_send(gen_random_uuid());  -- byte 6 holds the version; the low bits of the others are random
    us constant bigint := extract(epoch from clock_timestamp()) * 1000000;
    hi constant integer := us / 1000 >> 25;
    lo constant integer := us / 1000 & 33554431;
    fine constant integer := us % 1000;
begin
    return chr(get_byte(a, hi >> 20)) || chr(get_byte(a, hi >> 15 & 31)) || chr(get_byte(a, hi >> 10 & 31))
        || chr(get_byte(a, hi >> 5 & 31)) || chr(get_byte(a, hi & 31))
        || chr(get_byte(a, lo >> 20)) || chr(get_byte(a, lo >> 15 & 31)) || chr(get_byte(a, lo >> 10 & 31))
        || chr(get_byte(a, lo >> 5 & 31)) || chr(get_byte(a, lo & 31))
        || chr(get_byte(a, fine >> 5)) || chr(get_byte(a, fine & 31))
        || chr(get_byte(a, get_byte(u, 0) & 31)) || chr(get_byte(a, get_byte(u, 1) & 31))
        || chr(get_byte(a, get_byte(u, 2) & 31)) || chr(get_byte(a, get_byte(u, 3) & 31))
        || chr(get_byte(a, get_byte(u, 4) & 31)) || chr(get_byte(a, get_byte(u, 5) & 31))
        || chr(get_byte(a, get_byte(u, 7) & 31)) || chr(get_byte(a, get_byte(u, 8) & 31))
        || chr(get_byte(a, get_byte(u, 9) & 31)) || chr(get_byte(a, get_byte(u, 10) & 31))
        || chr(get_byte(a, get_byte(u, 11) & 31)) || chr(get_byte(a, get_byte(u, 12) & 31))
        || chr(get_byte(a, get_byte(u, 13) & 31)) || chr(get_byte(a, get_byte(u, 14) & 31));
end
$$;
