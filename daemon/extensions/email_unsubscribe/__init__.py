"""What the pack email_unsubscribe brings beside its rows: a data layer."""
