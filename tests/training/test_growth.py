"""The table of growth: its form at tiny sizes, and exponents of known power laws."""

import json
import math
import mmap

import numpy as np
import pytest
from conftest import load_program

load_program("benchmarks/benchmark")  # its folder's other files can then be imported
growth = load_program("benchmarks/growth")
TINY = {"save": (1, 2, 3), "csv": (1000, 2000, 3000), "step": (8, 16, 32), "step linear": (8, 16, 32),
        "sampling": (1, 2, 3), "folder": (3, 501, 1002), "scan": (4, 8, 16), "scan again": (4, 8, 16),
        "autocorrelation": (8, 16, 32), "memorization": (520, 530, 540), "memorization again": (520, 530, 540),
        "items": (4, 9, 16), "bare": (1, 2, 3), "same": (1, 2, 3), "csv large": (1000, 2000, 3000),
        "lists": (1, 2, 3)}  # fmt: skip


@pytest.mark.parametrize("power", [0.5, 1, 2.5])
def test_the_exponent_of_a_power_law(power):
    sizes = [3.0, 10.0, 90.0]
    assert growth.exponent(sizes, [7e-4 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)
    noisy = growth.exponent(sizes, [7e-4 * size**power * factor for size, factor in zip(sizes, (1.1, 0.9, 1.1))])
    assert noisy == pytest.approx(power, abs=0.1) and math.isnan(growth.exponent(sizes, [0, 1, 2]))


def test_time_and_memory_of_a_row_are_measured(monkeypatch):
    """A run that takes size^2 seconds by the clock and holds `size` megabytes: its exponent is 2, its peak the size."""
    clock = [0.0]

    def work(size, place):
        def run():
            clock[0] += size**2
            memory = mmap.mmap(-1, size * 2**20)  # the allocator may have kept what other tests have freed
            np.frombuffer(memory, np.uint8)[:] = 1

        return run

    monkeypatch.setattr(growth, "cpu_seconds", lambda: clock[0])
    seconds, peaks = zip(*(growth.measure(work, size) for size in (8, 16, 32)))
    assert growth.exponent([8, 16, 32], seconds) == pytest.approx(2)
    assert np.array(peaks) / 2**20 == pytest.approx([8, 16, 32], rel=0.3)


FAST = ("folder", "csv", "csv large", "lists", "scan", "scan again", "autocorrelation", "items", "step linear")


@pytest.mark.parametrize("names", [FAST, pytest.param(tuple(set(TINY) - set(FAST)), marks=pytest.mark.slow)])
def test_the_table_and_its_file(tmp_path, monkeypatch, capfd, names):
    assert set(TINY) == set(growth.ROWS) - {"trainer", "run saves"}
    tiny = {name: sizes for name, sizes in TINY.items() if name in names}
    for name, sizes in tiny.items():
        monkeypatch.setitem(growth.ROWS, name, growth.ROWS[name]._replace(quick=sizes))
    monkeypatch.setattr(growth, "ENOUGH", 0)
    monkeypatch.setattr(growth, "apart", lambda name, size: growth.measure(growth.ROWS[name].prepare, size))
    monkeypatch.setitem(growth.ONCE, "import", ("nothing", ["-c", "pass"]))
    assert growth.main(["--quick", "--only", *tiny, "import", "--output_dir", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "growth.json").read_text())
    assert [row["what"] for row in content["growth"]] == [growth.ROWS[name].what for name in tiny]
    for row, (name, sizes) in zip(content["growth"], tiny.items()):
        assert [row[place] for place in ("small", "middle", "large")] == list(sizes)
        seconds = [row[f"{place}, s"] for place in ("small", "middle", "large")]
        assert all(value > 0 for value in seconds) and row["exponent"] == round(growth.exponent(sizes, seconds), 3)
        assert ("large, MB" in row) == (name not in ("bare", "same"))
    assert content["once"][0]["what"] == "nothing" and 0 < content["once"][0]["s"] < 5
    lines = capfd.readouterr().out.splitlines()
    assert [name.strip() for name in lines[0].split("|")[1:3]] == ["what", "size in"]
    assert set(lines[1]) == set("|- ") and len({line.count("|") for line in lines[: 2 + len(tiny)]}) == 1


def test_the_trainer_is_compared_with_both_loops(monkeypatch):
    """The loops take turns, and the medians are divided."""
    times = {"train_steps": iter([6.0, 9.0, 5.0]), "bare_steps": iter([2.0, 3.0, 4.0]), "same_steps": iter([4.0] * 3)}
    for name, values in times.items():
        monkeypatch.setattr(growth, name, lambda size, place, values=values: next(values))
    bare, same = growth.ratios(3)
    assert (bare["ratio"], same["ratio"]) == (2, 1.5) and bare["loop, ms"] == 3000 and same["trainer, ms"] == 6000


def test_a_size_is_measured_in_a_process_of_its_own():
    seconds, peak = growth.apart("csv", 1000)
    assert 0 < seconds < 60 and 0 <= peak < 2**30


def test_a_row_that_fails_is_named(monkeypatch, capfd):
    def broken(size, place):
        raise ValueError("no")

    monkeypatch.setitem(growth.ROWS, "csv", growth.ROWS["csv"]._replace(prepare=broken))
    with pytest.raises(RuntimeError, match="the row 'csv' failed at the size 1,000: ValueError: no"):
        growth.apart("csv", 1000)
