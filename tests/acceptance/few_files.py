"""Starts the daemon with a limit of 256 open files: `python -m tests.acceptance.few_files`."""

import resource

from daemon.__main__ import main

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    main()
