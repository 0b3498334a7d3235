"""Data workers among the signals that a scheduler sends to all processes of a job."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# As FileLoader does it; prints the workers' process numbers, and ends when told to.
PROGRAM = """
import functools, os, sys
import torch
from torch.utils.data import DataLoader
from fastkd.data.workers import end_at_exit, from_one_process_only, held_back

init = functools.partial(from_one_process_only, os.getpid())
loader = DataLoader(range(8), num_workers=2, persistent_workers=True, worker_init_fn=init)
end_at_exit()
with held_back():
    batches = iter(loader)
for _ in batches:
    pass
print(*(worker.pid for worker in batches._workers), flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_scheduler_s_signal_does_not_hide_the_process_s_own() -> None:
    """The kernel keeps one pending SIGTERM: a second, sent before the first is taken, is lost."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    workers = [int(number) for number in process.stdout.readline().split()]
    assert len(workers) == 2
    try:
        for number in (signal.SIGSTOP, signal.SIGTERM):
            for worker in workers:
                os.kill(worker, number)
        process.stdin.close()
        time.sleep(1.5)  # it has sent its signal to the first, and waits
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
