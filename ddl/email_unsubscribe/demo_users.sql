-- Whom the live page may sign in as: the owner of the sample mailbox, if there.
select u.id, 'Mailbox owner' as name
from email_unsubscribe.users as u
where u.subject = 'demo|owner';
