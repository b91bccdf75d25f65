"""Command lines: for an unknown option every program names the nearest one, in one line, and exits with status 2."""

import pytest
from conftest import load_program

from ddpm_hf.arguments import SuggestingParser

PROGRAMS = {
    "train": ("--learningrate=1e-3", "--learning_rate"),
    "evaluate": ("--num_sample", "--num_samples"),
    "convert": ("--imagesize", "--image_size"),
    "publish": ("--hub_model", "--hub_model_id"),
    "demo": ("--ports", "--port"),
    "benchmarks/benchmark": ("--out_dir", "--output_dir"),
    "studies/recipe": ("--sed", "--seed"),
    "studies/samplers": ("--sample", "--samples"),
}
NEEDED = {"convert": ["x", "--output_dir=y"], "publish": ["x", "--hub_model_id=y"], "demo": ["--pipeline=x"]}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_nearest_option_is_named(name, capsys):
    if name == "benchmarks/benchmark":
        pytest.importorskip("denoising_diffusion_pytorch")
    given, meant = PROGRAMS[name]
    program = load_program(name)
    with pytest.raises(SystemExit) as ended:
        program.main([*NEEDED.get(name, []), given])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"error: unknown option '{given.split('=')[0]}'; did you mean {meant}?")
    assert error.count("\n") == 1


def test_what_else_is_wrong_is_one_line_too(capsys):
    parser = SuggestingParser(prog="p")
    parser.add_argument("--size", type=int)
    assert parser.parse_args(["--size=3"]).size == 3
    for arguments, message in [
        (["--zebra"], "unknown option '--zebra' ("),
        (["--siz=3"], "unknown option '--siz'; did you mean --size?"),  # no abbreviations
        (["--size=x"], "argument --size: invalid int value: 'x'"),
        (["--size=3", "loose"], "unexpected loose"),
    ]:
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert capsys.readouterr().err.startswith(f"error: {message}")
