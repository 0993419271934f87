"""The Python client of Rowcast, the realtime daemon for Postgres. See the README."""

from rowcast_client.client import Channel, Collection, Rowcast
from rowcast_client.engine import ConnectionStopped, RowcastError, TopicEnded

__all__ = ["Channel", "Collection", "ConnectionStopped", "Rowcast", "RowcastError", "TopicEnded"]
