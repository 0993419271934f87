"""Schemas and capture triggers: applied, rolled back and checked."""
