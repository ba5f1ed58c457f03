"""What `make test` needs to run files side by side, and its last line."""

import os
import signal

import pytest

# Longest first, so that no core idles at the end. The smoke chain fetches what others then use.
LONG = ["test_smoke.py", "test_chain.py", "test_faults.py", "test_scale.py", "test_gpu_queue.py"]
LONG += ["test_bench_gpu.py"]

if SIDE_BY_SIDE := "PYTEST_XDIST_WORKER" in os.environ:
    # Read when torch is imported: threads of processes that share cores wait for each other.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background job; tests use it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if SIDE_BY_SIDE:
        place = {name: n for n, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(autouse=True)
def _card(request):
    """A test marked gpu is skipped, with its reason, where torch sees no card."""
    if request.node.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU, and torch sees none")


def pytest_terminal_summary(terminalreporter):
    count = {kind: len(rows) for kind, rows in terminalreporter.stats.items()}
    failed = count.get("failed", 0) + count.get("error", 0)
    terminalreporter.write_line(f"{count.get('passed', 0)} passed, {failed} failed")
