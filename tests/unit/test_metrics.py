"""The page of metrics, and those of the process itself."""

import os
import resource
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from daemon import metrics
from daemon.metrics import ProcessMetrics


def test_the_pieces_of_the_page_are_what_prometheus_writes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_STEP", 4)  # so that the smaller families consist of pieces, too
    metrics.CAPTURED.labels(table='a."b\\c\n').inc()
    metrics.QUERY_SECONDS.labels(query="one").observe(0.5)
    metrics.QUERY_SECONDS.labels(query="two").observe(5)

    def without_process(page: bytes) -> list[bytes]:
        return [line for line in page.splitlines() if b"process_" not in line]

    pieces = list(metrics.exposition())
    assert without_process(generate_latest(metrics.REGISTRY)) == without_process(b"".join(pieces))
    assert max(piece.count(b"\n") for piece in pieces) == 2 + 4
    assert b'{query="one"' in b"".join(pieces)


def test_every_sample_of_a_worker_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_worker", {"worker": "3"})
    lines = [line for line in b"".join(metrics.exposition()).splitlines() if not line.startswith(b"#")]
    assert lines
    assert [] == [line for line in lines if b'worker="3"' not in line]


def test_the_process_metrics_need_nothing_of_proc_but_the_process_itself(tmp_path: Path) -> None:
    sandbox = tmp_path / "proc"  # as ProcSubset=pid leaves it
    sandbox.mkdir()
    if sys.platform == "linux":
        (sandbox / "self").symlink_to(f"/proc/{os.getpid()}")
        collected = {
            sample.name: sample.value
            for family in ProcessMetrics(proc=str(sandbox)).collect()
            for sample in family.samples
        }
        assert collected["process_resident_memory_bytes"] > 2**20
        assert sum(1 for _ in Path("/proc/self/fd").iterdir()) - 1 == collected["process_open_fds"]
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == collected["process_max_fds"]
        assert collected["process_cpu_seconds_total"] > 0
        assert 0 < time.time() - collected["process_start_time_seconds"] < 24 * 3600
