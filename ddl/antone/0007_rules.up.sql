-- Rules that foreign keys cannot state: an author, the author's posts and the replies to them are on one platform, and
-- an escalation is about one post. New rows follow them at once; the next revision checks existing ones.
--
-- The triggers fire after the foreign keys, which have locked the referenced row by then. The functions are security
-- definer, like a foreign key's own check: whoever may write a row need not be able to read what it refers to.

create function antone.check_author() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from antone.posts as p where p.author_id = new.id and p.platform <> new.platform) then
        raise check_violation using
            message = 'an author of posts cannot move to another platform',
            schema = tg_table_schema, table = tg_table_name, constraint = 'authors_platform_of_posts';
    end if;
    return null;
end
$$;

create trigger authors_check
after update of platform on antone.authors
for each row when (old.platform <> new.platform)
execute function antone.check_author();

create function antone.check_post() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from antone.authors as a where a.id = new.author_id and a.platform <> new.platform) then
        raise check_violation using
            message = 'a post is on the platform of its author',
            schema = tg_table_schema, table = tg_table_name, constraint = 'posts_platform_of_author';
    end if;
    if tg_op = 'UPDATE' then
        -- A new reply has locked its decision: wait for it.
        perform from antone.decisions as d where d.post_id = new.id order by d.id for update;
        if exists (
            select from antone.decisions as d join antone.replies as r on r.decision_id = d.id
            where d.post_id = new.id and r.platform <> new.platform
        ) then
            raise check_violation using
                message = 'a post with replies cannot move to another platform',
                schema = tg_table_schema, table = tg_table_name, constraint = 'posts_platform_of_replies';
        end if;
    end if;
    return null;
end
$$;

create trigger posts_check
after insert or update of platform, author_id on antone.posts
for each row execute function antone.check_post();

create function antone.check_decision() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    raise exception 'a decision stays with its post' using
        errcode = 'restrict_violation', schema = tg_table_schema, table = tg_table_name, column = 'post_id';
end
$$;

create trigger decisions_check
before update of post_id on antone.decisions
for each row when (old.post_id <> new.post_id)
execute function antone.check_decision();

create function antone.check_reply() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    platform antone.platform;
begin
    select p.platform into platform
    from antone.decisions as d join antone.posts as p on p.id = d.post_id
    where d.id = new.decision_id;
    if new.platform <> platform then
        raise check_violation using
            message = 'a reply is on the platform of its post',
            schema = tg_table_schema, table = tg_table_name, constraint = 'replies_platform_of_post';
    end if;
    return null;
end
$$;

create trigger replies_check
after insert or update of platform, decision_id on antone.replies
for each row execute function antone.check_reply();

create function antone.check_escalation() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if exists (select from antone.decisions as d where d.id = new.decision_id and d.post_id <> new.post_id)
       or exists (
           select from antone.replies as r join antone.decisions as d on d.id = r.decision_id
           where r.id = new.reply_id and (r.decision_id <> new.decision_id or d.post_id <> new.post_id)
       )
    then
        raise check_violation using
            message = 'post, decision and reply of an escalation belong together',
            schema = tg_table_schema, table = tg_table_name, constraint = 'escalations_about_one_post';
    end if;
    return null;
end
$$;

create trigger escalations_check
after insert or update of post_id, decision_id, reply_id on antone.escalations
for each row execute function antone.check_escalation();

revoke execute on function
    antone.check_author(), antone.check_post(), antone.check_decision(), antone.check_reply(), antone.check_escalation()
from public;

-- The characters in these lists are blanks, control characters, and others that nobody sees: a name has something else.
alter table antone.operators
add constraint operators_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table antone.authors
add constraint authors_platform_id_visible check (
    platform_id = '' or platform_id ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table antone.experiments
add constraint experiments_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

alter table antone.competitors
add constraint competitors_name_visible check (
    name = '' or name ~ '[^\u0001-\u0020\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u1680\u180b-\u180f\u2000-\u200f\u2028-\u202f'
    '\u205f-\u206f\u2800\u3000\u3164\ufeff\uffa0\ufff9-\ufffb]'
) not valid;

-- What is measured has happened. A date is that of whoever writes it, who may be a day ahead of UTC.
alter table antone.kpi_metrics
add constraint kpi_metrics_date_not_ahead check (date <= (created_at at time zone 'UTC')::date + 1) not valid;

alter table antone.weight_adjustment_logs
add constraint weight_adjustment_logs_date_not_ahead check (date <= (created_at at time zone 'UTC')::date + 1) not valid;

alter table antone.learning_events
add constraint learning_events_date_not_ahead check (date <= (created_at at time zone 'UTC')::date + 1) not valid;

-- Where a file was written: a run that is stopped leaves it there, and the next run may write elsewhere.
alter table antone.archived_files
add column host text,
add column directory text;
