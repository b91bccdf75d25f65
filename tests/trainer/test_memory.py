"""Freed memory is kept: using it again faults in no page; or it is given back, whatever lies between."""

import platform

import pytest
from conftest import ROOT, run_program

PROGRAM = """
import resource, runpy, sys
import torch
done = runpy.run_path(sys.argv[2])["keep_freed_memory"]() if sys.argv[1] == "keep" else None
def use():
    torch.ones(64, 1024, 1024).sum()  # 256 MiB: 65,536 pages
for _ in range(20):  # the heap takes its shape
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def counted(program, mode, folder):
    """What the program counts in a process of its own, in which memory is treated so."""
    result = run_program("-c", program, mode, ROOT / "ddpm_hf" / "trainer" / "memory.py", cwd=folder)
    assert result.returncode == 0, result.stderr
    done, count = result.stdout.split()
    assert done == ("None" if mode == "leave" else "True")
    return int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_is_used_again_is_not_faulted_in_again(tmp_path):
    faults = {mode: counted(PROGRAM, mode, tmp_path) for mode in ("leave", "keep")}
    # huge pages, where the system gives them, make fewer and larger faults: 512 pages each
    assert faults["leave"] >= 4 * 65_536 / 512
    assert faults["keep"] < faults["leave"] / 10


HOLES = """
import runpy, sys
import torch
from pathlib import Path
done = runpy.run_path(sys.argv[2])["return_freed_memory"]() if sys.argv[1] == "return" else None
torch.ones(7, 1024, 1024)  # 28 MiB: from now on glibc takes less for small
blocks = [torch.ones(2, 1024, 1024) for _ in range(32)]
def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
before = resident()
del blocks[::2]
print(done, before - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_between_blocks_in_use_is_given_back(tmp_path):
    given = {mode: counted(HOLES, mode, tmp_path) for mode in ("leave", "return")}  # KiB
    freed = 16 * 8 * 1024
    assert given["leave"] < freed / 8
    assert given["return"] > freed * 7 / 8


@pytest.mark.parametrize("function", ["keep_freed_memory", "return_freed_memory"])
def test_other_systems_are_left_as_they_are(monkeypatch, function):
    from ddpm_hf.trainer import memory

    monkeypatch.setattr(memory.platform, "system", lambda: "Darwin")
    assert getattr(memory, function)() is False
    monkeypatch.setattr(memory.platform, "system", lambda: "Linux")
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))  # musl
    assert getattr(memory, function)() is False
