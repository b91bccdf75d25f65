"""The benchmark's parts at small size: they run, and they measure what they say."""

import json

import pytest
from conftest import load_program

benchmark = load_program("benchmark")


def test_the_loader_is_measured(tmp_path):
    command = ["--only", "loader", "--images", "80", "--batch_size", "10", "--rounds", "1", "--resolutions", "16"]
    assert benchmark.main([*command, "--workers", "1", "--output_dir", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "benchmark.json").read_text())["loader"]
    assert row["ratio"] == pytest.approx(row["ours images/s"] / row["peer images/s"]) and row["ours images/s"] > 0


def test_contenders_take_turns():
    order = []

    def contender(name, values):
        values = iter(values)
        return lambda: (order.append(name), next(values))[1]

    assert benchmark.alternate({"a": contender("a", [3, 1, 2]), "b": contender("b", [6, 6, 9])}, 3) == {"a": 2, "b": 6}
    assert order == ["a", "b"] * 3


def test_flops_are_of_the_area():
    """Four times the pixels cost four times as much, but for what does not grow with them (time embedding), and what
    grows faster (attention of the last stage)."""
    assert benchmark.training_flops(128) == pytest.approx(4 * benchmark.training_flops(64), rel=0.05)


def test_a_call_and_its_share_of_the_matrix_rate(tmp_path):
    assert benchmark.main(["--only", "call", "--rounds", "1", "--output_dir", str(tmp_path)]) == 0
    single, half = json.loads((tmp_path / "benchmark.json").read_text())["call"]
    assert single["error"] < 1e-4 < half["error"] < 0.02
    for row in (single, half):
        assert row["ratio"] == pytest.approx(row["peer s"] / row["ours s"]) and row["share of matrix rate"] > 0


def test_a_ratio_below_the_recorded_one_fails_the_check(monkeypatch, tmp_path, capsys):
    rows = [{"what": "call 4x3x64x64 float32", "ratio": 0.86 * benchmark.RECORDED["call 4x3x64x64 float32"]}]
    monkeypatch.setitem(benchmark.BENCHMARKS, "call", lambda options: rows)
    command = ["--only", "call", "--check", "--output_dir", str(tmp_path)]
    assert benchmark.main(command) == 0
    rows[0]["ratio"] *= 0.98
    assert benchmark.main(command) == 1
    assert "call 4x3x64x64 float32" in capsys.readouterr().err
