"""The gateway, over real sockets of the loopback."""
