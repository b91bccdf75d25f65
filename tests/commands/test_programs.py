"""The programs convert, demo and publish: what they say about wrong folders. Other tests lie with their rooms."""

import pytest
from conftest import load_program
from helpers import make


@pytest.fixture
def run(tmp_path):
    """A run folder with a saved pipeline."""
    make("images").save_pretrained(tmp_path / "run" / "pipeline")
    return tmp_path / "run"


@pytest.mark.parametrize("inside", [".", "pipeline/unet"])
@pytest.mark.parametrize("program", ["demo", "publish", "evaluate"])
def test_a_folder_beside_the_pipeline(program, inside, run, capsys):
    """A run folder, or a component's folder, is refused with the name of the pipeline's folder, before other work."""
    folder = str(run / inside)
    arguments = {
        "demo": ["--pipeline", folder],
        "publish": [folder, "--hub_model_id=x"],
        "evaluate": ["--pipeline", folder, "--data=digits"],
    }
    assert load_program(program).main(arguments[program]) == 2
    said = capsys.readouterr().err
    assert f"has no model_index.json; did you mean {run / 'pipeline'}?" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("program", "arguments"), [("demo", ["--pipeline={}"]), ("publish", ["{}", "--hub_model_id=x"])]
)
def test_no_such_pipeline(program, arguments, tmp_path, capsys):
    missing = tmp_path / "nowhere"
    assert load_program(program).main([argument.format(missing) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert str(missing) in said and "did you mean" not in said


def test_a_conversion_into_a_folder_that_is_used(run, capsys):
    assert load_program("convert").main(["model.pt", f"--output_dir={run}"]) == 2
    assert f"output_dir must be a new or empty folder, and {run} is not one" in capsys.readouterr().err
