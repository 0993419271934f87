"""`--hypothesis-profile=search` tries more examples than a test run, from a new random seed each time."""

from hypothesis import settings

settings.register_profile("search", max_examples=20_000, stateful_step_count=40, derandomize=False, print_blob=True)
