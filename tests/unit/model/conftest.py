"""`--hypothesis-profile=search` looks further than a test run does, and from another place each time."""

from hypothesis import settings

settings.register_profile("search", max_examples=20_000, stateful_step_count=40, derandomize=False, print_blob=True)
