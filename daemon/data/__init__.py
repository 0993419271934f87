"""Typed access to a pack's data, and its jobs, for applications written in Python: one module for each pack."""
