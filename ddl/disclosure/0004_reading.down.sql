drop function disclosure.may_read(text, text);
