"""From the log to the clients: the pump, replays, rights, and each client's life. Uses ports, never a driver."""
