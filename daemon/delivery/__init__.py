"""From the log to the clients, and each client's life. Knows ports, never a driver."""
