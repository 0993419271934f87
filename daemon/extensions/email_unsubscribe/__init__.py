"""The extension of the pack email_unsubscribe: a data layer for Python, and the verb `rotate-token-keys`."""
