"""The public side: websockets, a few pages over plain HTTP, and tokens."""
