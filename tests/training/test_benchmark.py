"""The benchmark's parts at small size: they run, and they measure what they say."""

import importlib
import itertools
import json
import time
from functools import partial

import pytest
import torch
from conftest import load_program

from ddpm_hf import UNet2D

benchmark = load_program("benchmarks/benchmark")
contenders = importlib.import_module("contenders")  # the same that it uses
measures = importlib.import_module("measures")


def rows_of(folder, part):
    return json.loads((folder / "benchmark.json").read_text())[part]


def test_the_loader_is_measured(tmp_path):
    command = ["--only", "loader", "--images", "80", "--batch_size", "10", "--rounds", "1", "--resolutions", "16"]
    assert benchmark.main([*command, "--workers", "1", "--output_dir", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "loader")
    assert row["ratio"] == pytest.approx(row["ours images/s"] / row["peer images/s"]) and row["ours images/s"] > 0


def test_contenders_take_turns():
    order = []

    def contender(name, values):
        values = iter(values)
        return lambda: (order.append(name), next(values))[1]

    assert benchmark.alternate({"a": contender("a", [3, 1, 2]), "b": contender("b", [6, 6, 9])}, 3) == {"a": 2, "b": 6}
    assert order == ["a", "b"] * 3


def test_operations_are_of_the_area():
    """Four times the pixels cost four times as much, but for what does not grow with them (time embedding), and what
    grows faster (attention of the last stage)."""
    small, large = (contenders.operations(UNet2D, (1, 3, side, side)) for side in (64, 128))
    assert large == pytest.approx(4 * small, rel=0.05)
    narrow = contenders.operations(partial(UNet2D, dim=32), (1, 3, 64, 64))
    assert small / 4 < narrow < small / 3


def tiny(monkeypatch):
    monkeypatch.setattr(contenders, "WIDTH", {"dim": 8, "dim_mults": (1, 2)})


def here(tasks, rounds):
    """In this process instead of one for each."""
    runs = {name: contenders.BUILD[task.what](task) for name, task in tasks.items()}
    with torch.no_grad():
        return benchmark.alternate({n: lambda run=run: measures.timed(run, "cpu") for n, run in runs.items()}, rounds)


def test_a_call_its_ratios_and_its_picture(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(benchmark, "compete", here)
    assert benchmark.main(["--only", "call", "--rounds", "1", "--threads", "1", "--output_dir", str(tmp_path)]) == 0
    single, half = rows_of(tmp_path, "call")
    assert single["error"] < 1e-4 < half["error"] < 0.02
    for row in (single, half):
        assert row["ratio"] == pytest.approx(row["peer s"] / row["ours s"]) and row["share of matrix rate"] > 0
        assert row["stock to ours"] > 0 and row["ratio, memory kept by both"] > 0
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.slow
def test_compiled_contenders(tmp_path, monkeypatch):
    """A call by its blocks, its output checked too; a step as `--compile inductor` does it."""
    tiny(monkeypatch)
    monkeypatch.setattr(benchmark, "compete", here)
    monkeypatch.setattr(benchmark, "CALL_SHAPES", ((1, 3, 16, 16),))
    compiled = []
    by_blocks = UNet2D.compile_repeated_blocks
    monkeypatch.setattr(UNet2D, "compile_repeated_blocks", lambda self: by_blocks(self, backend=backend))

    def backend(graph, inputs):
        compiled.append(graph)
        return lambda *values: [x * (1 + 1e-6) for x in graph.forward(*values)]

    command = ["--only", "call", "--rounds", "1", "--threads", "1", "--dtype", "float32", "--compile"]
    assert benchmark.main([*command, "--output_dir", str(tmp_path)]) == 0
    plain, other = rows_of(tmp_path, "call")
    assert compiled and other["what"] == "call 1x3x16x16 float32 compiled" and other["error"] != plain["error"]

    monkeypatch.setattr(torch, "compile", lambda model, **options: (compiled.append("whole"), model)[1])
    task = contenders.save_weights(contenders.Task("peer", "step", (2, 3, 16, 16)), tmp_path)
    for form in ("eager", "inductor"):
        contenders.build_step(contenders.replace(task, side="ours", form=form))()
    assert compiled.count("whole") == 1


def test_outputs_that_differ_are_not_timed(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(benchmark, "compete", here)
    outputs = benchmark.outputs
    monkeypatch.setattr(benchmark, "outputs", lambda tasks: [x * (1 + 3e-4 * i) for i, x in enumerate(outputs(tasks))])
    with pytest.raises(SystemExit, match="outputs differ by 3.0e-04 of their norm in float32, more than 0.0001"):
        benchmark.main(["--only", "call", "--rounds", "1", "--threads", "1", "--output_dir", str(tmp_path)])


@pytest.mark.slow
def test_contenders_in_processes_of_their_own(tmp_path):
    command = ["--only", "call", "--rounds", "1", "--dtype", "bfloat16", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    (row,) = rows_of(tmp_path, "call")
    assert 1e-4 < row["error"] < 0.02


@pytest.mark.parametrize(
    ("what", "side"),
    [
        *itertools.product(["call", "step"], ["peer", "peer, amp", "ours", "stock"]),
        *itertools.product(["sample"], ["peer", "peer, amp", "ours"]),
    ],
)
def test_each_side_can_do_each_task(what, side, tmp_path, monkeypatch):
    tiny(monkeypatch)
    task = contenders.save_weights(contenders.Task("peer", what, (2, 3, 16, 16), steps=2), tmp_path)
    dtype = "float16" if "amp" in side else "float32"
    run = contenders.BUILD[what](contenders.replace(task, side=side.split(",")[0], dtype=dtype))
    for _ in range(2):
        given = run()
    if what == "sample":
        assert getattr(given, "images", given).shape == task.shape


def test_a_training_step_moves_the_weights_of_both_sides_alike(tmp_path, monkeypatch):
    """From the same weights and data; the draws differ, but a first step of Adam moves every weight by the rate."""
    tiny(monkeypatch)
    task = contenders.save_weights(contenders.Task("peer", "step", (2, 3, 16, 16)), tmp_path)
    models = {}

    def keep(side, build):
        def built(task):
            models[side] = build(task)
            return models[side]

        return built

    monkeypatch.setattr(contenders, "peer_diffusion", keep("peer", contenders.peer_diffusion))
    monkeypatch.setattr(contenders, "our_model", keep("ours", contenders.our_model))
    for side in ("peer", "ours"):
        step = contenders.build_step(contenders.replace(task, side=side))
        before = [p.detach().clone() for p in models[side].parameters()]
        step()
        moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(models[side].parameters(), before)])
        assert moved.abs().median() == pytest.approx(1e-4, rel=0.02)


@pytest.mark.slow
def test_a_contender_works_in_its_own_process_and_says_what_failed(tmp_path):
    task = contenders.save_weights(contenders.Task("peer", "call", (1, 3, 16, 16)), tmp_path)
    contender = contenders.Contender(contenders.replace(task, side="ours", keep_memory=True))
    start = time.perf_counter()
    seconds = contender.seconds()
    assert 0 < seconds < time.perf_counter() - start
    assert contender.peak() > 4 * sum(p.numel() for p in contenders.our_model(task).parameters())
    contender.close()
    assert not contender.process.is_alive()
    with pytest.raises(RuntimeError, match="No such file"):
        contenders.Contender(contenders.replace(task, side="ours", weights=str(tmp_path / "none.pt")))


def test_the_peers_amp_is_half_precision(tmp_path, monkeypatch):
    tiny(monkeypatch)
    task = contenders.save_weights(contenders.Task("peer", "call", (2, 3, 16, 16)), tmp_path)
    exact, half = benchmark.outputs([task, contenders.replace(task, dtype="float16")])
    assert 1e-5 < (half - exact).norm() / exact.norm() < 1e-2


def test_waits_are_counted_by_the_profiler(monkeypatch):
    task = contenders.Task("ours", "call", (1, 3, 16, 16))
    monkeypatch.setitem(contenders.BUILD, "call", lambda task: lambda: [torch.ones(2).sum().item() for _ in range(3)])
    assert contenders.waits_of(task) == 3


def test_a_step_of_sampling_reads_no_number_from_the_model(tmp_path, monkeypatch):
    tiny(monkeypatch)
    assert benchmark.main(["--only", "waits", "--threads", "1", "--output_dir", str(tmp_path)]) == 0
    for row in rows_of(tmp_path, "waits"):
        assert row["a sampling step"] == 0


def test_larger_batches(tmp_path, monkeypatch):
    tiny(monkeypatch)
    monkeypatch.setattr(benchmark, "compete", here)
    monkeypatch.setattr(benchmark, "CALL_SHAPES", ((1, 3, 16, 16),))
    command = ["--only", "call", "--rounds", "1", "--threads", "1", "--dtype", "float32", "--output_dir", str(tmp_path)]
    assert benchmark.main([*command, "--batch_factor", "3"]) == 0
    (row,) = rows_of(tmp_path, "call")
    assert row["what"] == "call 3x3x16x16 float32"
    with pytest.raises(SystemExit):
        benchmark.main([*command, "--batch_factor", "0"])


@pytest.mark.slow
def test_an_import_is_measured(tmp_path):
    assert benchmark.main(["--only", "import", "--rounds", "1", "--output_dir", str(tmp_path)]) == 0
    (row,) = rows_of(tmp_path, "import")
    assert row["more s"] == pytest.approx(row["ours s"] - row["diffusers s"])


@pytest.mark.parametrize("what", ["call 4x3x64x64 float32", "memory 4x32x4096 float32"])
def test_a_ratio_worse_than_the_recorded_one_fails_the_check(what, monkeypatch, tmp_path, capsys):
    less_is_better = what.startswith("memory")
    recorded = benchmark.RECORDED[what]
    checked = "ratio" if less_is_better else benchmark.KEPT
    rows = [{"what": what, "ratio": 1.0, checked: recorded * (1.14 if less_is_better else 0.86)}]
    monkeypatch.setitem(benchmark.BENCHMARKS, "call", lambda options: rows)
    command = ["--only", "call", "--check", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    rows[0][checked] *= 1.02 if less_is_better else 0.98
    assert benchmark.main(command) == 1
    assert what in capsys.readouterr().err


def test_an_import_that_takes_too_long_fails_the_check(monkeypatch, tmp_path, capsys):
    rows = [{"what": "import", "more s": 0.34}]
    monkeypatch.setitem(benchmark.BENCHMARKS, "import", lambda options: rows)
    command = ["--only", "import", "--check", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    rows[0]["more s"] = 0.35
    assert benchmark.main(command) == 1


def test_the_table():
    rows = [{"what": "a call", "ratio": 1.23456, "peer s": None}, {"what": "b", "peer s": 23456.7, "ratio": 10.0}]
    assert benchmark.table(rows).splitlines() == ["what    ratio  peer s", "a call  1.23", "b       10     23,457"]


def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only", "call", "--device", "cuda"])
    assert "--device must be cpu" in capsys.readouterr().err
