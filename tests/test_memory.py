"""Freed memory is kept: using it again faults in no page."""

import platform

import pytest
from conftest import run_program

PROGRAM = """
import resource, sys
import torch
from ddpm_hf.memory import keep_freed_memory
done = keep_freed_memory() if sys.argv[1] == "keep" else None
def use():
    torch.ones(64, 1024, 1024).sum()  # 256 MiB: 65,536 pages
for _ in range(3):  # the heap takes its shape
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's allocator")
def test_memory_that_is_used_again_is_not_faulted_in_again(tmp_path):
    faults = {}
    for mode in ("leave", "keep"):
        result = run_program("-c", PROGRAM, mode, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        done, count = result.stdout.split()
        assert done == {"leave": "None", "keep": "True"}[mode]
        faults[mode] = int(count)
    # huge pages, where the system gives them, make fewer and larger faults: 512 pages each
    assert faults["leave"] >= 4 * 65_536 / 512
    assert faults["keep"] < faults["leave"] / 10


def test_other_systems_are_left_as_they_are(monkeypatch):
    from ddpm_hf import memory

    monkeypatch.setattr(memory.platform, "system", lambda: "Darwin")
    assert memory.keep_freed_memory() is False
    monkeypatch.setattr(memory.platform, "system", lambda: "Linux")
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))  # musl
    assert memory.keep_freed_memory() is False
