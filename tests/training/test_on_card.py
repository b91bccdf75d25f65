"""The benchmark's table for a card: its arithmetic, its checks and its limit of time, and a run of it on CPU."""

import argparse
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, load_program

from ddpm_hf import UNet2D

benchmark = load_program("benchmarks/benchmark")
contenders, measures, on_card, report = (
    importlib.import_module(name) for name in ("contenders", "measures", "on_card", "report")
)
OURS = on_card.Entry("ours", "graphs", "ours, graphs")
STEP = contenders.Task("peer", "step", (128, 3, 64, 64), "float16", device="cuda")


def options(**changes):
    values = {"device": "cpu", "threads": 1, "rounds": 2, "quick": False, "minutes": 5.0, **changes}
    return argparse.Namespace(**values)


def test_a_line_of_the_table():
    """A step of 10 ms beside the peer's 40 ms."""
    values = {"step s": 0.01, "host s": 0.001, "device s": 0.008, "kernels": 2000.4, "memory": 5e9}
    work = 3 * contenders.operations(UNet2D, (128, 3, 64, 64))
    row = on_card.row_of(OURS, STEP, values, {"step s": 0.04}, rate=1e15, error=0.001)
    assert row == {
        "what": "step 128x3x64x64", "contender": "ours, graphs", "ms": 10.0, "device ms": 8.0, "host ms": 1.0,
        "kernels": 2000, "share of bf16 rate": pytest.approx(work / 1e13), "peak GB": 5.0, "ratio to peer": 4.0,
        "error": 0.001,
    }  # fmt: skip
    assert 5e12 < work < 6e12
    assert on_card.row_of(OURS, STEP, values, None, 1e15, None)["ratio to peer"] is None


def test_the_peers_chain_is_ten_times_its_measured_part():
    base = contenders.replace(STEP, what="sample", steps=25)
    values = {"step s": 0.5, "host s": 0.4, "memory": 1e9}
    peer = on_card.row_of(on_card.PEER, base, values, values, 1e15, None)
    assert peer["ms"] == 5000 and peer["host ms"] == 4000 and peer["ratio to peer"] == 1
    assert peer["device ms"] is None and peer["share of bf16 rate"] is None
    ours = on_card.row_of(OURS, base, {**values, "step s": 0.1}, values, 1e15, None)
    assert ours["ms"] == 100 and ours["ratio to peer"] == 50
    assert on_card.PEER.task(base).steps == 25 and OURS.task(base).steps == on_card.FAST_STEPS


def test_device_work_is_read_from_the_trace():
    """Kernels and copies, but neither the host's calls nor the ranges that the profiler marks."""
    categories = ["kernel", "kernel", "gpu_memcpy", "gpu_memset", "cuda_runtime", "gpu_user_annotation", "overhead"]
    events = [{"cat": name, "ph": "X", "name": "x", "ts": 0, "dur": 10.0} for name in categories]
    seconds, kernels = measures.sum_of_trace({"traceEvents": [*events, {"ph": "M", "name": "process_name"}]})
    assert seconds == pytest.approx(40e-6) and kernels == 2
    assert measures.device_work(lambda: None, "cpu", 1) is None


def test_the_trace_of_this_torch_has_the_fields_that_are_read(tmp_path):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).add(1)
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any(event.get("cat") == "cpu_op" and event["dur"] >= 0 for event in trace["traceEvents"])
    assert measures.sum_of_trace(trace) == (0, 0)


def test_changes_between_forms():
    eager = [[1.0, 2.0], [0.5, 4.0]]
    assert on_card.largest_change([[1.0, 2.0], [0.51, 3.6]], eager) == pytest.approx(0.1)
    # the norm of an overflow is not compared, the loss is
    assert on_card.largest_change([[1.0, math.inf], [0.5, 4.0]], eager) == 0
    assert on_card.largest_change([[math.nan, 2.0], [0.5, 4.0]], eager) == math.inf


def test_the_limit_of_time():
    now = [0.0]
    budget = on_card.Budget(2, clock=lambda: now[0])
    assert budget.allows(60, "first") and budget.allows(120, "second")
    now[0] = 61.0
    assert not budget.allows(60, "third") and budget.left_out == ["third: the time was over"]
    assert budget.allows(59, "fourth")


class Fake:
    """A contender without a process: `speed` is its seconds a step; it may fail, or give other results."""

    built, names = [], {}

    def __init__(self, task=None):
        self.closed = False

    def tell(self, question, *arguments):
        self.question = (question, arguments)

    def ask(self, question, *arguments, until=None):
        self.tell(question, *arguments)
        return self.answer(until)

    def answer(self, until=None):
        question, arguments = self.question
        if question == "build":
            self.task = arguments[0]
            self.built.append(self.task)
            if "fail" in self.behaviour():
                raise RuntimeError("Traceback (most recent call last):\n  line 1\nOutOfMemoryError: too much")
            factor = 2.0 if "wrong" in self.behaviour() else 1.0
            return {"call": np.full(4, factor), "step": [[factor, 1.0]] * 6}.get(self.task.what)
        return {"seconds": {"peer": 0.4, "stock": 0.2, "ours": 0.1}[self.task.side], "host": 0.05, "peak": 10**9,
                "device_work": (0.08, 100), "drop": None}[question]  # fmt: skip

    def behaviour(self):
        return self.names.get((self.task.side, self.task.form), "")

    def close(self):
        self.closed = True


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(on_card, "Contender", Fake)
    monkeypatch.setattr(on_card, "ROWS_ON_CPU", (("step", (2, 3, 16, 16)), ("call", (1, 3, 16, 16))))
    monkeypatch.setattr(on_card, "outputs", lambda tasks: [torch.ones(4)])
    monkeypatch.setattr(contenders, "WIDTH", {"dim": 8, "dim_mults": (1, 2)})
    monkeypatch.setattr(Fake, "built", [])
    monkeypatch.setattr(Fake, "names", {})
    return Fake


def test_lines_of_fake_contenders(fakes):
    checked = []
    rows, facts = on_card.benchmark_card(options(), checked.append)
    found = {(row["what"], row["contender"]): row["ratio to peer"] for row in rows}
    assert found == {
        ("step 2x3x16x16", "peer, amp"): 1, ("step 2x3x16x16", "ours, eager"): 4,
        ("call 1x3x16x16", "peer, amp"): 1, ("call 1x3x16x16", "ours, eager"): 4,
        ("call 1x3x16x16", "stock U-Net, eager"): 2,
    }  # fmt: skip
    assert [(task.what, task.dtype) for task in checked] == [("step", "float32")]
    assert all(row["device ms"] == 80 and row["kernels"] == 100 and row["host ms"] == 50 for row in rows)
    assert facts["left out"] == [] and facts["wrong"] == [] and facts["bf16 TFLOP/s"] > 0
    quick, _ = on_card.benchmark_card(options(quick=True), checked.append)
    assert {row["kernels"] for row in quick} == {None}


def test_compiled_contenders_are_built_side_by_side_and_compared_with_eager_ones(fakes):
    budget = on_card.Budget(5)
    table = on_card.Table(options(), budget, lambda task: None)
    crew = on_card.Crew(())
    table.add(crew, "step", (2, 3, 16, 16), on_card.EAGER, together=False)
    fakes.names = {("ours", "graphs + inductor"): "wrong", ("ours", "inductor"): "fail"}
    table.add(crew, "step", (2, 3, 16, 16), on_card.COMPILED, together=True)
    names = [row["contender"] for row in table.rows]
    assert names == [
        "peer, amp", "ours, eager", "ours, graphs", "stock U-Net in our trainer, graphs", "peer, amp, reduce-overhead",
    ]  # fmt: skip
    assert table.wrong == ["step 2x3x16x16, ours, graphs + inductor: results differ by 1.0e+00, more than 0.05"]
    assert budget.left_out == ["step 2x3x16x16, ours, inductor: OutOfMemoryError: too much"]
    # the one that failed gets another process in the next row
    fakes.names = {}
    table.add(crew, "step", (2, 32, 16), on_card.COMPILED, together=True)
    assert [row["contender"] for row in table.rows if row["what"] == "step 2x32x16"] == []
    assert {row["ratio to peer"] for row in table.rows} == {1, 2, 4}


def test_what_does_not_fit_is_left_out_and_named(fakes):
    rows, facts = on_card.benchmark_card(options(minutes=0.01), lambda task: None)
    assert rows == []
    assert facts["left out"] == ["step 2x3x16x16: the time was over", "call 1x3x16x16: the time was over"]


def test_wrong_results_end_with_an_error(fakes, tmp_path, capsys):
    fakes.names = {("ours", "eager"): "wrong"}
    command = ["--only", "card", "--rounds", "1", "--threads", "1", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 1
    assert "wrong, so not timed: call 1x3x16x16, ours, eager: results differ by 1.0e+00" in capsys.readouterr().out


class Here(Fake):
    """A contender in this process."""

    def __init__(self, task=None):
        self.served = contenders.Served()

    def answer(self, until=None):
        question, arguments = self.question
        return getattr(self.served, question)(*arguments)


@pytest.mark.slow
def test_the_table_on_cpu(tmp_path, monkeypatch, capsys):
    """The same path as on a card, but without graphs, the compiler and the profiler's kernels."""
    monkeypatch.setattr(contenders, "WIDTH", {"dim": 8, "dim_mults": (1, 2)})
    monkeypatch.setattr(on_card, "Contender", Here)
    monkeypatch.setattr(on_card, "PEER_STEPS", 20)
    monkeypatch.setattr(on_card, "PICTURES", 8)
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 0)  # loaders of denoising-diffusion-pytorch
    command = ["--only", "card", "--rounds", "1", "--threads", "1", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["left out"] == [] and found["wrong"] == []
    assert [(row["what"], row["contender"]) for row in found["card"]] == [
        ("step 2x3x16x16", "peer, amp"), ("step 2x3x16x16", "ours, eager"), ("call 1x3x16x16", "peer, amp"),
        ("call 1x3x16x16", "ours, eager"), ("call 1x3x16x16", "stock U-Net, eager"), ("sample 1x3x16x16", "peer, amp"),
        ("sample 1x3x16x16", "ours, eager"), ("step 2x32x16", "peer, amp"), ("step 2x32x16", "ours, eager"),
        ("folder 2x3x16x16", "peer, amp"), ("folder 2x3x16x16", "ours, eager"),
    ]  # fmt: skip
    for row in found["card"]:
        assert row["ms"] > 0 and row["host ms"] > 0 and row["ratio to peer"] > 0
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "share of bf16 rate" in capsys.readouterr().out


def test_a_step_on_a_folder_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(contenders, "WIDTH", {"dim": 8, "dim_mults": (1, 2)})
    monkeypatch.setattr(on_card, "PICTURES", 8)
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 0)
    with on_card.base_task(options(), "folder", (2, 3, 16, 16)) as base:
        for side in ("peer", "ours"):
            task = contenders.replace(base, side=side, dtype="float32")
            step = contenders.build_step(task)
            assert np.isfinite([[float(value) for value in step()] for _ in range(5)]).all()
        seen = list(itertools.islice(contenders._peer_batches(base), 4))
    assert len(torch.cat(seen).flatten(1).unique(dim=0)) == 8


def test_each_form_on_cpu(tmp_path, monkeypatch):
    """Graphs fall back on CPU in a call and a sample; a stand-in captures a step."""
    tape = importlib.import_module("tape")
    monkeypatch.setattr(contenders, "WIDTH", {"dim": 8, "dim_mults": (1, 2)})
    monkeypatch.setattr(contenders, "graphs_of", lambda task: tape.Tape())
    task = contenders.save_weights(contenders.Task("peer", "step", (2, 3, 16, 16), steps=2), tmp_path)
    results = {}
    for form in ("eager", "graphs"):
        served = contenders.Served()
        results[form] = served.build(contenders.replace(task, side="ours", form=form), contenders.WARM_UP)
        for what in ("call", "sample"):
            contenders.Served().build(contenders.replace(task, side="ours", what=what, form=form))
    assert served.run.obstacle() is None  # a graph is replayed
    assert len(results["eager"]) == contenders.WARM_UP and on_card.largest_change(*results.values()) < 1e-3


def test_options_of_a_card(monkeypatch):
    given = benchmark.parse([])
    assert given.only == list(benchmark.BENCHMARKS) and given.rounds == 9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    given = benchmark.parse(["--device", "cuda"])
    assert (given.only, given.rounds, given.minutes) == (["card"], 5, 7.5)
    given = benchmark.parse(["--device", "cuda", "--quick"])
    assert (given.only, given.rounds, given.minutes) == (["card"], 3, 3)
    assert benchmark.parse(["--device", "cuda", "--only", "waits"]).only == ["waits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "card", "call"], "--only card must stand alone, got card call"),
        (["--minutes", "0"], "--minutes must be above 0, got 0.0"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    ],
)
def test_options_that_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_on_cpu_in_processes_of_their_own(tmp_path):
    command = ["--only", "card", "--quick", "--rounds", "1", "--minutes", "15", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(found["card"]) == 11 and found["left out"] == []


@pytest.mark.skipif(not (shutil.which("bash") and shutil.which("timeout")), reason="the script needs both")
def test_the_script_goes_on_after_a_failure(tmp_path):
    """With a stand-in for Python: the tests fail, the other parts run, and the exit status and the summary say so."""
    report = tmp_path / "report.txt"  # the end of pytest's
    report.write_text(
        "= slowest 1 durations =\n9.01s call a.py::b\n= short test summary info =\nFAILED a.py::b - it is\n"
        "! Interrupted: the time of DDPM_HF_TEST_SECONDS is over !\n=== 1 failed, 13 passed in 142.13s (0:02:22) ===\n"
    )
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh
echo "ran $*"
case "$*" in
  *test_cuda.py*) cat {report}; exit 3 ;;
  *train.py*) printf 'a bar at 1%%\\ra bar at 2%%\\n' ;;
esac
""")
    python.chmod(0o755)
    script = ROOT / "training" / "benchmarks" / "on_card.sh"
    environment = {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(["bash", script, tmp_path / "results"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    summary = (tmp_path / "results" / "summary.txt").read_text()
    lines = [re.sub(r", \d+ s$", "", line) for line in summary.splitlines()]
    assert lines[lines.index("tests: failed with status 3") : -1] == [
        "tests: failed with status 3", "tests: FAILED a.py::b - it is",
        "tests: Interrupted: the time of DDPM_HF_TEST_SECONDS is over",
        "tests: 1 failed, 13 passed in 142.13s (0:02:22)", "digits: passed", "benchmark: passed",
    ]  # fmt: skip
    assert "a bar at 2%" in done.stdout and "a bar at 1%" not in done.stdout
    assert "--device cuda --only card --quick" in (tmp_path / "results" / "benchmark.log").read_text()
    (minutes,) = re.findall(r"--minutes ([\d.]+) ", (tmp_path / "results" / "benchmark.log").read_text())
    assert 7 < float(minutes) < 7.5  # what the other parts have left
