"""What is free: the computer's memory, or what a container's limit leaves of it."""

import sys

import numpy as np
import pytest

from jaxrlhf import memory


def test_a_containers_limit_counts_and_what_it_caches_of_files_does_not(tmp_path):
    for name, content in {
        "memory.max": "1000\n",
        "memory.current": "900\n",
        "memory.stat": "anon 200\ninactive_file 600\n",
    }.items():
        (tmp_path / name).write_text(content)
    assert memory.free_on_host(tmp_path) == 1000 - (900 - 600)


def test_no_limit_leaves_what_the_computer_has(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("inactive_file 600\n")
    free = memory.free_on_host(tmp_path)
    assert free is None or free > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_the_peak_on_the_host_is_that_since_the_reset():
    size = 2**28
    np.ones(size, np.uint8)  # freed at once
    before = memory.peak_on_host()
    memory.reset_peak_on_host()
    after = memory.peak_on_host()
    assert before is not None and after is not None and before - after > 0.9 * size
    np.ones(size, np.uint8)
    assert memory.peak_on_host() == pytest.approx(after + size, abs=0.1 * size)


@pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")
def test_freed_small_blocks_are_returned_to_the_system():
    def held() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    memory.release_free_memory(2**30)  # else the blocks may come from what earlier tests have freed
    start = held()
    pieces = [np.ones(2**14, np.float32) for _ in range(4000)]  # 64 KB each, far below glibc's mapped ones
    last = np.ones(2**14, np.float32)  # above them: the heap cannot shrink past it
    most = held()
    del pieces
    memory.release_free_memory(2**28)
    assert most - start > 200e6 and held() - start < 60e6, last.size
