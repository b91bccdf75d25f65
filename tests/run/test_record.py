"""The loss plot is drawn when someone looks at it, not at every save."""

import pytest

from ddpm_hf import TrainConfig
from ddpm_hf.run import record
from ddpm_hf.run.checkpoint import ASIDE, MetricsFile, replace_folder


@pytest.mark.parametrize(
    ("seconds", "drawn"),
    [(0, [2, 6, 9]), (25, [2, 6, 9]), (100, [2, 4, 6, 8, 9])],  # at the start, with samples, at the end; or with time
)
def test_the_losses_are_drawn_where_they_are_looked_at(seconds, drawn, tmp_path, monkeypatch):
    run, clock, drawings = tmp_path / "run", [0.0], []
    (run / "samples").mkdir(parents=True)
    metrics = MetricsFile(run / "metrics.jsonl")
    monkeypatch.setattr(record.time, "monotonic", lambda: clock[0])

    def draw(losses, path):
        drawings.append(losses[-1]["step"])
        path.write_text(str(drawings[-1]))

    monkeypatch.setattr(record, "save_loss_plot", draw)
    kept = record.RunRecord(TrainConfig(output_dir=str(run), max_train_steps=9), {}, None, {})
    for step in range(1, 10):
        metrics.append({"step": step, "loss": 1.0})
        if step == 6:
            (run / "samples" / f"step-{step:06d}.png").touch()
        if step % 2 and step != 9:
            continue
        aside = run / f"pipeline{ASIDE}"
        aside.mkdir()
        kept.write(aside, metrics, step, "cpu", pytest.fail)
        replace_folder(aside, run / "pipeline")
        assert (run / "pipeline" / "loss.png").read_text() == str(drawings[-1])  # an earlier plot is taken along
        clock[0] += seconds
    assert drawings == drawn
