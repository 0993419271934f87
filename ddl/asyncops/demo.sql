-- Sample data: a team of eight and its work. `daemon up` and `daemon seed` load it; loading it again is safe. Rows are
-- identified by author and title, because their ids come from sequences.

-- Nobody knows the password of this hash: the sample people sign in on the live page, with a token.
insert into asyncops.users (email, password_hash, full_name, role, created_at, updated_at)
select d.email, '$2b$12$oRA30nrGC4ZhdHaqopHE3.UV.YnF/Mz39FsTXDBPF7KFnpcDpm17a', d.full_name, d.role,
       now() - interval '400 days', now() - interval '400 days'
from (values
    ('ada@example.com', 'Ada Archer', 'admin'),
    ('ben@example.com', 'Ben Baker', 'admin'),
    ('cleo@example.com', 'Cleo Carter', 'member'),
    ('dan@example.com', 'Dan Dyer', 'member'),
    ('eve@example.com', 'Eve Ellis', 'member'),
    ('finn@example.com', 'Finn Fisher', 'member'),
    ('gina@example.com', 'Gina Gray', 'member'),
    ('hugo@example.com', 'Hugo Hart', 'member')
) as d (email, full_name, role)
where not exists (select from asyncops.users as u where lower(u.email) = d.email);

insert into asyncops.status_updates (user_id, title, content, tags, created_at, updated_at)
select u.id, d.title, d.content, d.tags::text [], now() - d.age::interval, now() - d.age::interval
from (values
    ('ada@example.com', 'Week plan', 'Release **2.4** goes out on Thursday. Reviews first, please.', '{planning, release}', '6 days 20 hours'),
    ('cleo@example.com', 'Invoice page', 'The new table is in review.', '{frontend}', '6 days 18 hours'),
    ('dan@example.com', 'Import of old orders', 'Two thirds are through. No surprises so far.', '{backend, import}', '6 days 15 hours'),
    ('eve@example.com', 'First week', 'Set up, read the handbook, fixed a typo.', '{onboarding}', '6 days 12 hours'),
    ('finn@example.com', 'Load test', 'Steady at 400 requests a second; the pool is the limit.', '{backend, performance}', '5 days 20 hours'),
    ('gina@example.com', 'Survey', '31 answers. Summary on Friday.', '{research}', '5 days 17 hours'),
    ('hugo@example.com', 'Backups', 'Restored last night''s backup on a spare machine: 41 minutes.', '{operations, backup}', '5 days 14 hours'),
    ('ben@example.com', 'Hiring', 'Two interviews today.', '{hiring}', '5 days 11 hours'),
    ('cleo@example.com', 'Invoice page, second round', 'Review comments are in.', '{frontend}', '4 days 20 hours'),
    ('dan@example.com', 'Import is done', 'All orders since 2015. Please look at a few.', '{backend, import}', '4 days 16 hours'),
    ('eve@example.com', 'Search', 'Started on the search box.', '{frontend, search}', '4 days 13 hours'),
    ('ada@example.com', 'Release candidate', 'RC 1 is on staging.', '{release}', '3 days 21 hours'),
    ('finn@example.com', 'Pool size', 'Raised to 20, measured again: 900 requests a second.', '{backend, performance}', '3 days 18 hours'),
    ('hugo@example.com', 'Certificates', 'Renewed all of them; the reminder works now.', '{operations}', '3 days 14 hours'),
    ('gina@example.com', 'Survey results', 'People want **search** first, then exports.', '{research, search}', '2 days 21 hours'),
    ('cleo@example.com', 'Exports', 'Sketches are in the shared folder.', '{frontend, export}', '2 days 17 hours'),
    ('ben@example.com', 'Offer sent', 'She will answer by Monday.', '{hiring}', '2 days 12 hours'),
    ('ada@example.com', 'Release 2.4 is out', 'Thank you all. Notes are in the usual place.', '{release}', '1 day 20 hours'),
    ('dan@example.com', 'After the release', 'Error rate as before.', '{backend, release}', '1 day 17 hours'),
    ('finn@example.com', 'API outage', 'What happened and why is in the incident.', '{backend, incident}', '1 day 13 hours'),
    ('eve@example.com', 'Search, first version', 'Try it on staging.', '{frontend, search}', '20 hours'),
    ('hugo@example.com', 'Alerts', 'The pool has an alert of its own now.', '{operations, incident}', '8 hours'),
    ('gina@example.com', 'Interviews', 'Three customers this week.', '{research}', '3 hours'),
    ('cleo@example.com', 'Exports, today', 'CSV works; next is the button.', '{frontend, export}', '40 minutes')
) as d (author, title, content, tags, age)
join asyncops.users as u on lower(u.email) = d.author
where not exists (select from asyncops.status_updates as s where s.user_id = u.id and s.title = d.title);

insert into asyncops.incidents
    (reported_by_id, assigned_to_id, title, description, severity, status, resolution_notes, created_at, updated_at, resolved_at)
select r.id, a.id, d.title, d.description, d.severity, d.status, d.notes,
       now() - d.age::interval, now() - d.age::interval, now() - d.resolved::interval
from (values
    ('dan@example.com', 'hugo@example.com', 'Disk of the build server is full', 'Builds fail with "no space left".', 'low', 'closed', 'Old images are removed every night.', '40 days', '39 days'),
    ('gina@example.com', 'cleo@example.com', 'Dates are a day off in reports', 'Everybody west of Greenwich sees yesterday.', 'medium', 'closed', 'Dates are shown in the time zone of the account.', '20 days', '17 days'),
    ('ben@example.com', 'ada@example.com', 'Login fails for some accounts', 'Addresses with capital letters.', 'high', 'resolved', 'Addresses are compared in lower case.', '9 days', '4 days 6 hours'),
    ('finn@example.com', 'dan@example.com', 'Import stops at order 80311', 'A comma inside of a name.', 'medium', 'resolved', 'The file is read with quotes now.', '6 days', '5 days 2 hours'),
    ('eve@example.com', 'finn@example.com', 'API outage', 'Every second request fails with 503 since the release.', 'critical', 'in_progress', null, '1 day 15 hours', null),
    ('hugo@example.com', 'finn@example.com', 'Connection pool is exhausted now and then', 'See the graph of last night.', 'high', 'open', null, '1 day 8 hours', null),
    ('cleo@example.com', null, 'Export button is hidden on small screens', 'Below 360 pixels.', 'low', 'open', null, '10 hours', null),
    ('ada@example.com', 'hugo@example.com', 'Backup took twice as long', 'Fine, but worth a look.', 'medium', 'open', null, '5 hours', null)
) as d (reporter, assignee, title, description, severity, status, notes, age, resolved)
join asyncops.users as r on lower(r.email) = d.reporter
left join asyncops.users as a on lower(a.email) = d.assignee
where not exists (select from asyncops.incidents as i where i.reported_by_id = r.id and i.title = d.title);

insert into asyncops.blockers
    (reported_by_id, description, impact, status, resolution_notes, related_status_id, related_incident_id, created_at,
     updated_at, resolved_at)
select r.id, d.description, d.impact, d.status, d.notes,
       (select min(s.id) from asyncops.status_updates as s where s.title = d.about),
       (select min(i.id) from asyncops.incidents as i where i.title = d.because_of),
       now() - d.age::interval, now() - d.age::interval, now() - d.resolved::interval
from (values
    ('dan@example.com', 'Waiting on API key of the shipping company', 'Labels cannot be printed in the tests.', 'active', null, 'Import is done', null, '4 days 10 hours', null),
    ('cleo@example.com', 'No decision about the format of exports', 'The button cannot be named.', 'resolved', 'CSV first, see the decision.', 'Exports', null, '2 days 15 hours', '1 day 10 hours'),
    ('finn@example.com', 'Staging has one connection pool for two services', 'Load tests say little.', 'active', null, 'Load test', 'Connection pool is exhausted now and then', '1 day 6 hours', null),
    ('eve@example.com', 'No access to the search index', 'Search is tried on made-up data.', 'resolved', 'Hugo gave access.', 'Search', null, '4 days 12 hours', '3 days 20 hours'),
    ('gina@example.com', 'No budget for interviews', 'Three customers instead of ten.', 'active', null, 'Interviews', null, '2 hours', null),
    ('hugo@example.com', 'Spare machine is gone on Monday', 'No more restores to try backups.', 'active', null, 'Backups', 'Backup took twice as long', '4 hours', null),
    ('ben@example.com', 'Contract template is with the lawyers', 'Offers go out late.', 'resolved', 'Came back signed.', 'Hiring', null, '5 days 9 hours', '3 days 2 hours'),
    ('ada@example.com', 'API outage keeps the next release back', 'Release 2.5 waits.', 'active', null, null, 'API outage', '1 day 12 hours', null)
) as d (reporter, description, impact, status, notes, about, because_of, age, resolved)
join asyncops.users as r on lower(r.email) = d.reporter
where not exists (select from asyncops.blockers as b where b.reported_by_id = r.id and b.description = d.description);

-- The author of a decision takes part in it, and so do Ada and Hugo.
with made as (
    insert into asyncops.decisions
        (created_by_id, title, description, context, outcome, decision_date, tags, created_at, updated_at)
    select u.id, d.title, d.description, d.context, d.outcome, (now() at time zone 'UTC')::date - d.days, d.tags::text [],
           now() - make_interval(days => d.days), now() - make_interval(days => d.days)
    from (values
        ('ada@example.com', 'Status updates instead of stand-ups', 'Everybody writes one a day, whenever it suits.', 'Four time zones.', 'Two hours a week saved.', 90, '{process}'),
        ('ben@example.com', 'Postgres for everything that must last', 'No second store without a reason.', 'Three stores, one of them forgotten.', 'One backup to think of.', 75, '{architecture, database}'),
        ('hugo@example.com', 'Restore a backup every week', 'On a spare machine, with the clock running.', 'Nobody knew how long it takes.', 'Under an hour, known.', 60, '{operations, backup}'),
        ('cleo@example.com', 'One component library', 'The old widgets go page by page.', 'Two kinds of buttons.', 'Less to maintain.', 45, '{frontend}'),
        ('finn@example.com', 'Load test before each release', 'Ten minutes, on staging.', 'Release 2.2 was slow.', 'No surprise since.', 30, '{performance, release}'),
        ('ada@example.com', 'Releases on Thursdays', 'Never on a Friday.', 'A weekend was spoilt.', 'Calm weekends.', 21, '{process, release}'),
        ('dan@example.com', 'Import orders since 2015 only', 'Older ones stay in the archive.', 'The old format has no manual.', 'Two weeks saved.', 12, '{import}'),
        ('gina@example.com', 'Ask customers before building', 'Five interviews at least.', 'Nobody used the calendar.', 'Fewer features, used more.', 9, '{research}'),
        ('eve@example.com', 'Adopt new framework for search', 'Full-text search of the database, no server of its own.', 'Small amounts of text.', 'One service less.', 5, '{search, architecture}'),
        ('finn@example.com', 'Raise the size of the connection pool to 20', 'Measured, not guessed.', 'The pool was the limit.', '900 requests a second.', 4, '{performance, database}'),
        ('cleo@example.com', 'CSV is the first format of exports', 'Spreadsheets next.', 'Most people asked for it.', 'Done this week.', 2, '{export}'),
        ('ben@example.com', 'No release until the outage is understood', 'Release 2.5 waits.', 'Every second request failed.', 'A cause that is known.', 1, '{release, incident}')
    ) as d (author, title, description, context, outcome, days, tags)
    join asyncops.users as u on lower(u.email) = d.author
    where not exists (select from asyncops.decisions as o where o.created_by_id = u.id and o.title = d.title)
    returning id, created_by_id, created_at
)
insert into asyncops.decision_participants (decision_id, user_id, created_at)
select m.id, u.id, m.created_at
from made as m
join asyncops.users as u on u.id = m.created_by_id or u.email in ('ada@example.com', 'hugo@example.com');

-- The last seven complete days.
select asyncops.generate_daily_summary((now() at time zone 'UTC')::date - n)
from generate_series(7, 1, -1) as n
where not exists (select from asyncops.daily_summaries);
