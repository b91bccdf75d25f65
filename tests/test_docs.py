"""What the pages of docs/ say: code blocks that run, options that exist."""

import dataclasses
import re
from pathlib import Path

import torch

from ddpm_hf import DDPMPipeline, TrainConfig

DOCS = Path(__file__).parents[1] / "docs"


def test_the_own_training_loop(tmp_path, capsys):
    """The code of the page, shortened and with a smaller model: the loss falls, the pipeline loads and samples."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "own_loop.md").read_text(encoding="utf-8"), re.DOTALL)
    for line, quick in (
        ("EPOCHS = 40", "EPOCHS = 3"),
        ('OUTPUT = "runs/own-loop"', f"OUTPUT = {str(tmp_path)!r}"),
        ("dim=32", "dim=8"),
        ("[:, None] / 8 - 1", "[:640, None] / 8 - 1"),
    ):
        assert line in code
        code = code.replace(line, quick)
    names = {}
    exec(compile(code, "own_loop.md", "exec"), names)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 3 and losses[-1] < 0.9 * losses[0]
    scheduler, x0 = names["scheduler"], names["x0"][:2]
    noise, t = torch.randn_like(x0), torch.tensor([3, 500])
    assert torch.equal(scheduler.get_velocity(x0, noise, t), scheduler.target(x0, noise, t))
    pipe = DDPMPipeline.from_pretrained(tmp_path)
    assert pipe.config.num_inference_steps == 50
    for p, average in zip(pipe.unet.parameters(), names["ema"].shadow_params, strict=True):
        assert torch.equal(p, average)
    assert len(pipe(2, 2).images) == 2


def test_the_options_that_moving_names_exist():
    text = (DOCS / "moving.md").read_text(encoding="utf-8")
    assert "not yet" not in text
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    source = (Path(__file__).parents[1] / "training" / "convert.py").read_text(encoding="utf-8")
    known |= set(re.findall(r'"--(\w+)"', source))
    named = set(re.findall(r"--(\w+)", text))
    assert len(named) > 30 and named - known - {"no_auto_normalize"} == set()
