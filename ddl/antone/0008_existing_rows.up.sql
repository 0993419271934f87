-- A row that breaks a rule of 0007 stops this revision, which then names the rule: what the right value is, only people
-- know. The guide has queries that find such rows.

do $$
declare
    broken record;
begin
    for broken in
        select 'posts_platform_of_author' as rule, 'posts are on another platform than their authors' as what, count(*) as rows
        from antone.posts as p join antone.authors as a on a.id = p.author_id
        where p.platform <> a.platform
        union all
        select 'replies_platform_of_post', 'replies are on another platform than their posts', count(*)
        from antone.replies as r join antone.decisions as d on d.id = r.decision_id join antone.posts as p on p.id = d.post_id
        where r.platform <> p.platform
        union all
        select 'escalations_about_one_post', 'escalations are about more than one post', count(*)
        from antone.escalations as e
        left join antone.decisions as d on d.id = e.decision_id
        left join antone.replies as r on r.id = e.reply_id
        left join antone.decisions as o on o.id = r.decision_id
        where d.post_id <> e.post_id or r.decision_id <> e.decision_id or o.post_id <> e.post_id
    loop
        if broken.rows > 0 then
            raise check_violation using
                message = format('%s %s (%s)', broken.rows, broken.what, broken.rule),
                schema = split_part('antone.posts', '.', 1), table = split_part(broken.rule, '_', 1),
                constraint = broken.rule;
        end if;
    end loop;
end
$$;

alter table antone.operators validate constraint operators_name_visible;
alter table antone.authors validate constraint authors_platform_id_visible;
alter table antone.experiments validate constraint experiments_name_visible;
alter table antone.competitors validate constraint competitors_name_visible;
alter table antone.kpi_metrics validate constraint kpi_metrics_date_not_ahead;
alter table antone.weight_adjustment_logs validate constraint weight_adjustment_logs_date_not_ahead;
alter table antone.learning_events validate constraint learning_events_date_not_ahead;
