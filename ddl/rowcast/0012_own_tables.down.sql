do $$
declare
    own integer;
begin
    for own in select o.watch from rowcast.own_tables as o loop
        execute format('drop function if exists rowcast.%I(text, text)', 'may_read_' || own);
    end loop;
end
$$;
drop function if exists rowcast.serve(regclass, text, text, text [], text [], name, text, text, text []);
drop function if exists rowcast.serve_again();
drop function if exists rowcast.may_read(text, text);
drop table rowcast.own_tables;
