"""The command line: arguments to one call. What a verb does is in daemon/commands and the extensions."""
