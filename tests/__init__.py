"""The tests mirror daemon/; what several of them share is in tests/support and tests/conftest.py."""
