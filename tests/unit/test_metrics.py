"""The metrics of the process itself."""

import os
import sys
import time
from pathlib import Path

from daemon.metrics import ProcessMetrics


def test_the_process_metrics_need_nothing_of_proc_but_the_process_itself(tmp_path: Path) -> None:
    sandbox = tmp_path / "proc"  # as ProcSubset=pid leaves it
    sandbox.mkdir()
    if sys.platform == "linux":
        (sandbox / "self").symlink_to(f"/proc/{os.getpid()}")
        collected = {
            sample.name: sample.value
            for family in ProcessMetrics(proc=str(sandbox), registry=None).collect()
            for sample in family.samples
        }
        assert collected["process_resident_memory_bytes"] > 2**20
        assert collected["process_open_fds"] >= 3
        assert collected["process_cpu_seconds_total"] > 0
        assert 0 < time.time() - collected["process_start_time_seconds"] < 24 * 3600
