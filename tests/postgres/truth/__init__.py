"""Random tables and writes, and what their watchers should see: the generators behind `test_truth.py`."""
