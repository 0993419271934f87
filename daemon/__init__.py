"""Rowcast: a realtime daemon for Postgres."""

__version__ = "0.1.0.dev0"
