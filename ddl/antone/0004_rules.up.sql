-- Triggers: maintain updated_at, and delete a post's decisions before the post.

-- clock_timestamp(), not the start of the transaction: the trigger runs after the row is locked, so the later of two
-- versions of a row has the later time even if its transaction began first.
create function antone.set_updated_at() returns trigger
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    new.updated_at := clock_timestamp();
    return new;
end
$$;

-- An UPDATE that changes nothing leaves updated_at alone.
create trigger operators_set_updated_at
before update on antone.operators
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger authors_set_updated_at
before update on antone.authors
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger posts_set_updated_at
before update on antone.posts
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger experiments_set_updated_at
before update on antone.experiments
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger replies_set_updated_at
before update on antone.replies
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger competitors_set_updated_at
before update on antone.competitors
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger community_champions_set_updated_at
before update on antone.community_champions
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

create trigger segmented_weights_set_updated_at
before update on antone.segmented_weights
for each row when (old.* is distinct from new.*)
execute function antone.set_updated_at();

-- Decisions are published on their post's platform, which capture looks up. A foreign key acts after the post is gone:
-- the lookup would find nothing, and no subscriber would learn of the deletion. So this trigger deletes them while the
-- post still exists. A decision that was answered prevents it, as the reply's foreign key would. Security definer, like
-- a foreign key's own action: deleting a post requires no rights on its decisions.
create function antone.release_post_decisions() returns trigger
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Check first: a statement that finds no row still runs the capture triggers.
    if exists (select from antone.decisions as d where d.post_id = old.id) then
        delete from antone.decisions as d where d.post_id = old.id;
    end if;
    return old;
end
$$;

create trigger posts_release_decisions
before delete on antone.posts
for each row execute function antone.release_post_decisions();

revoke execute on function antone.set_updated_at() from public;
revoke execute on function antone.release_post_decisions() from public;
