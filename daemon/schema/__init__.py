"""Schemas and capture triggers: applying, rolling back and checking them."""
