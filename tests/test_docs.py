"""The pages are right: their Python runs, their commands are accepted, their links lead somewhere."""

import dataclasses
import re
import runpy
import shlex

import pytest
import torch
from conftest import ROOT, load_program
from safetensors.torch import save_file
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

import ddpm_hf
import ddpm_hf.trainer.loop as trainer
from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, TrainConfig, UNet1D, UNet2D
from ddpm_hf.arguments import SuggestingParser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 1, "attn_dim_head": 4}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with small pipelines at the paths of the demos' pipelines, and training cut to two steps."""
    scheduler = GaussianScheduler()
    names = dict(enumerate("0123456789"))
    unet = UNet2D(8, in_channels=1, num_class_embeds=10, **SMALL)
    digits = DDPMPipeline(unet, scheduler, num_inference_steps=3, id2label=names)
    for folder in ("runs/digits/pipeline", "runs/digits-guide/pipeline"):
        digits.save_pretrained(tmp_path / folder)
    averages = {f"{i:05d}": weight.detach().contiguous() for i, weight in enumerate(digits.unet.parameters())}
    (tmp_path / "runs/digits/checkpoints/step-000350").mkdir(parents=True)
    save_file(averages, tmp_path / "runs/digits/checkpoints/step-000350/ema.safetensors")
    DDPMPipeline1D(UNet1D(16, in_channels=1, **SMALL), scheduler, num_inference_steps=3).save_pretrained(
        tmp_path / "runs/ecg/pipeline"
    )
    monkeypatch.chdir(tmp_path)
    train = trainer.train

    def train_briefly(config: TrainConfig, **arguments):
        small = {**SMALL, "dim_mults": [1, 2], "max_train_steps": 2, "train_batch_size": 2, "num_samples": 1,
                 "num_cpu_threads": 1}  # fmt: skip
        kept = {"output_dir": config.output_dir, "class_labels": config.class_labels,
                "condition_column": config.condition_column}  # fmt: skip
        given = {**kept, "ddpm_num_inference_steps": 2, "report_to": "none"}
        return train(TrainConfig(**given, **small), **arguments)

    monkeypatch.setattr(trainer, "train", train_briefly)
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "own_loop.md"], ids=lambda page: page.name)
def test_python_of_the_pages_runs(page, work):
    document = Sybil([PythonCodeBlockParser()]).parse(page)
    # names that pages use without defining them
    document.namespace["my_dataset"] = [torch.zeros(3, 8, 8)] * 4
    document.namespace["pipe"] = DDPMPipeline.from_pretrained("runs/digits/pipeline")
    for example in document.examples():
        example.evaluate()


def commands(page):
    """Yield the commands in a page's blocks of code, with continued lines joined."""
    for block in re.findall(r"^```(?:\w*)\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if "training/" in line and not line.lstrip().startswith("#"):
                yield line


class Accepted(BaseException):
    """The options of a command were accepted."""


def parse_and_stop(parser, arguments=None, namespace=None, parse=SuggestingParser.parse_args):
    """Parse the options of a program, and end it."""
    parse(parser, arguments, namespace)
    raise Accepted


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_the_pages_are_accepted(page, monkeypatch):
    """Each program exists and accepts the options of each command."""
    monkeypatch.chdir(ROOT)
    # the runs that commands continue are not there
    monkeypatch.setattr("ddpm_hf.config.options_to_continue", lambda source, output_dir: {})
    for command in commands(page):
        command = command.split("&&")[-1]
        words = shlex.split(command.split("'")[0] if "srun" in command else command)
        place = next((i for i, word in enumerate(words) if re.fullmatch(r"training/\S+\.py", word)), None)
        if place is None:
            continue
        program = ROOT / words[place]
        assert program.is_file(), command
        arguments = [word for word in words[place + 1 :] if word != "..."]
        if words[place] == "training/train.py" and "--continue_from" not in arguments:  # that reads the earlier run
            load_program("train").parse([] if "my.yaml" in arguments else arguments)
        elif (ROOT / "ddpm_hf" / "commands" / program.name).is_file():
            with monkeypatch.context() as patch, pytest.raises(Accepted):
                patch.setattr(SuggestingParser, "parse_args", parse_and_stop)
                load_program(program.stem).main(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_public_names_have_docstrings():
    for name in ddpm_hf.__all__:
        if name != "__version__":
            assert len(getattr(ddpm_hf, name).__doc__.split()) > 3, name


def test_the_own_training_loop(tmp_path, capsys):
    """The code of the page, shortened and with a smaller model: the loss falls, the pipeline loads, and its samples are
    those of the page's own sampling loop."""
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    code, sampling = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
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
    exec(compile(sampling.replace("(50)", "(5)"), "own_loop.md", "exec"), names)
    samples = pipe(16, 5, generator=torch.Generator().manual_seed(0), output_type="latent").images
    torch.testing.assert_close(names["x"].cpu(), samples.cpu(), rtol=0, atol=1e-5)


def test_the_options_that_moving_names_exist():
    text = (ROOT / "docs" / "moving.md").read_text(encoding="utf-8")
    assert "not yet" not in text
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    source = (ROOT / "ddpm_hf" / "commands" / "convert.py").read_text(encoding="utf-8")
    known |= set(re.findall(r'"--(\w+)"', source))
    named = set(re.findall(r"--(\w+)", text))
    assert len(named) > 30 and named - known - {"no_auto_normalize"} == set()


def test_generated_pages():
    """The page of options has every option, and the first page is README with links of the site."""
    on_page_markdown = runpy.run_path(str(ROOT / "docs" / "hooks.py"))["on_page_markdown"]
    options = on_page_markdown((ROOT / "docs" / "options.md").read_text(encoding="utf-8"))
    for field in dataclasses.fields(TrainConfig):
        assert f"\n| `{field.name}` |" in options
    first = on_page_markdown((ROOT / "docs" / "index.md").read_text(encoding="utf-8"))
    assert first.startswith("# ddpm_hf") and "](images.md)" in first and "](docs/" not in first
