"""The public side: websocket sessions, a few pages over plain HTTP, and token authentication."""
