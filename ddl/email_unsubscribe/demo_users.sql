-- The users that the live page offers for sign-in: the owner of the sample mailbox, if there is one.
select u.id, 'Mailbox owner' as name
from email_unsubscribe.users as u
where u.subject = 'demo|owner';
