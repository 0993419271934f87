drop function email_unsubscribe.may_read(text, text);
