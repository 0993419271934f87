"""Antone."""
