"""Jobs: work that is due once a day, of which one daemon of many does each. See daemon/core/jobs.py."""
