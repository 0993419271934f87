-- One small event in the demo, usually a new message. `daemon up --demo` runs it now and then.
--
-- It acts only as the people of demo.sql, in channels that they belong to. It marks its messages in `metadata`, and
-- edits and deletes only marked messages.
do $$
declare
    signature constant jsonb := '{"by": "demo"}';
    keep constant integer := 300;  -- marked messages that stay in a channel
    reach constant integer := 2000;  -- how many of the newest messages, by id, are searched for marked ones
    people constant text[] := array(
        select u.id from chatgenius.live_users as u
        where u.auth0_id in ('demo|alice', 'demo|bob', 'demo|carol', 'demo|dave', 'demo|eve')
    );
    sentences constant text[] := array[
        'Good morning, everybody!',
        'Does anybody have a minute for a review?',
        'I will take a look after lunch.',
        'The staging server is back.',
        'Shall we move the stand-up to ten?',
        'Ten works for me.',
        'I wrote down what we decided; it is in the notes.',
        'Who is in the office tomorrow?',
        'The coffee machine works again.',
        'Nice, thank you!',
        'I can reproduce it now. It was the time zone, of course.',
        'Give me five minutes, I am still in a call.',
        'The tests are green.',
        'I would rather ship it on Monday.',
        'That explains a lot.',
        'Could you send me the link once more?',
        'Looks good to me.',
        'Let us keep it simple and delete the old one.',
        'I have a question about the invoice page.',
        'The new icons are lovely.',
        'It is only slow on the first request.',
        'Lunch at half past twelve?',
        'I found the bug: we counted from one.',
        'Please have a look at the numbers before we send them.',
        'Done. Tell me if something looks odd.',
        'I am on the train, the line may drop now and then.',
        'Nothing lost on my side after the tunnel.',
        'Can we agree on a name first?',
        'The customer called: they are happy.',
        'I left two comments, nothing serious.',
        'Who knows how the old import works?',
        'I do, more or less. Ask away.',
        'The backup ran through last night.',
        'It is snowing here!',
        'Let me think about it overnight.',
        'See you all tomorrow.'
    ];
    afterthoughts constant text[] := array[' Edit: found it.', ' Sorry, typo.', ' (Never mind, solved.)', ' 🙂'];
    emoji constant text[] := array['👍', '🎉', '👀', '😄', '🙏', '🚀'];
    act constant double precision := random();
    place text;
    person text;
    target text;
    mood text;
begin
    -- Give way to any session that holds a lock on the chosen row.
    perform set_config('lock_timeout', '200ms', true);

    select m.channel_id, m.user_id into place, person
    from chatgenius.channel_members as m
    join chatgenius.live_channels as c on c.id = m.channel_id
    where m.user_id = any (people)
    order by random() limit 1;
    if place is null then
        return;
    end if;

    if act < 0.60 then  -- write a message that has not been used recently
        insert into chatgenius.messages (channel_id, user_id, content, metadata)
        select place, person, s.sentence, signature
        from unnest(sentences) as s (sentence)
        where s.sentence not in (
            select m.content from chatgenius.messages as m
            where m.channel_id = place and m.deleted_at is null
            order by m.created_at desc, m.id desc limit 25
        )
        order by random() limit 1;

    elsif act < 0.80 then  -- react
        insert into chatgenius.reactions (message_id, user_id, emoji)
        select m.id, person, emoji[1 + floor(random() * cardinality(emoji))::integer]
        from (
            select n.id from chatgenius.messages as n
            where n.channel_id = place and n.deleted_at is null
            order by n.created_at desc, n.id desc limit 12
        ) as m
        order by random() limit 1
        on conflict do nothing;

    elsif act < 0.87 then  -- change a status
        mood := (array['online', 'online', 'online', 'away', 'busy', 'dnd', 'offline'])[1 + floor(random() * 7)::integer];
        insert into chatgenius.user_status as s (user_id, status, last_seen, custom_status)
        values (person, mood, now(), case mood when 'away' then 'Back soon' when 'busy' then 'Reviewing'
                                               when 'dnd' then 'In a meeting' end)
        on conflict (user_id) do update
        set status = excluded.status, last_seen = excluded.last_seen, custom_status = excluded.custom_status;

    elsif act < 0.92 then  -- edit a message, once
        select m.id into target
        from (select * from chatgenius.messages order by id desc limit 60) as m
        where m.metadata @> signature and m.deleted_at is null and m.updated_at = m.created_at
        order by random() limit 1;
        update chatgenius.messages as m
        set content = m.content || afterthoughts[1 + floor(random() * cardinality(afterthoughts))::integer]
        where m.id = target;

    elsif act < 0.97 then  -- delete a message, or restore it
        select m.id into target
        from (select * from chatgenius.messages order by id desc limit 30) as m
        where m.metadata @> signature
        order by m.deleted_at is null or random() < 0.5, random() limit 1;
        update chatgenius.messages as m
        set deleted_at = case when m.deleted_at is null then now() end
        where m.id = target;

    else  -- remove old messages, so that a demo can run for months
        delete from chatgenius.messages as m
        using (
            select n.id, row_number() over (partition by n.channel_id order by n.id desc) as age
            from (select * from chatgenius.messages order by id desc limit reach) as n
            where n.metadata @> signature
        ) as ours
        where m.id = ours.id and ours.age > keep;
    end if;
exception
    when lock_not_available or deadlock_detected or foreign_key_violation then
        null;  -- another session was faster; try again next time
end
$$;
