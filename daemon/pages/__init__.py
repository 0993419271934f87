"""Pages that need more than memory: the console of operators, and what sample users do on the page at `/`."""
