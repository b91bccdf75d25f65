"""Checkpoints on disk: only whole ones have a name; rotation; the metrics file."""

import pytest

from ddpm_hf import checkpoint


def write(folder, step, limit=None):
    aside = checkpoint.begin(folder, step)
    (aside / "state").write_text(str(step))
    return checkpoint.finish(aside, limit)


def test_unfinished_checkpoints_do_not_count(tmp_path):
    assert checkpoint.latest(tmp_path / "none") is None
    write(tmp_path, 5)
    aside = checkpoint.begin(tmp_path, 10)
    (aside / "state").write_text("half")
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000005"
    write(tmp_path, 12)  # a later save removes the leftovers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000005", "step-000012"]


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 1_000_000, 3):
        write(tmp_path, step, limit=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [3, 1_000_000]


def test_damage_is_named(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    (newest / "state").write_text("3")
    with pytest.raises(ValueError, match="step-000002 is damaged: state is not what was written.*latest-valid"):
        checkpoint.latest(tmp_path)
    assert checkpoint.latest(tmp_path, skip_damaged=True) == tmp_path / "step-000001"
    (newest / "state").unlink()
    with pytest.raises(ValueError, match="state is missing"):
        checkpoint.latest(tmp_path)


def test_a_step_saved_again_takes_the_place(tmp_path):
    write(tmp_path, 4)
    path = write(tmp_path, 4)
    assert path.name == "step-000004" and (path / "state").read_text() == "4"


def test_replace_folder(tmp_path):
    for text in ("one", "two"):
        aside = tmp_path / "aside"
        aside.mkdir()
        (aside / "file").write_text(text)
        checkpoint.replace_folder(aside, tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_metrics_file_is_rewound(tmp_path):
    metrics = checkpoint.MetricsFile(tmp_path / "metrics.jsonl")
    metrics.rewind(0)
    for step in (2, 4, 6):
        metrics.append({"step": step, "loss": 0.1})
    with open(metrics.path, "a") as file:
        file.write('{"step": 8, "lo')
    assert [record["step"] for record in metrics.read()] == [2, 4, 6]
    metrics.rewind(4)
    assert metrics.path.read_text() == '{"step": 2, "loss": 0.1}\n{"step": 4, "loss": 0.1}\n'
