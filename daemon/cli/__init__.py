"""The command line: parses the arguments of each command. daemon/commands and the extensions implement them."""
