"""JSON and YAML files that are damaged or hostile: errors that name the file, at once."""

import pytest

from ddpm_hf.config import TrainConfig, read_yaml
from ddpm_hf.reading import read_json, read_mapping

# Each level names the one before nine times: 9**40 items, if anything walks through them.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 41))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 41)
)


@pytest.mark.parametrize(
    "text, message",
    [
        (BOMB + "report_to: *a40\n", "line 2 uses the alias"), (MERGE_BOMB, "line 2 uses the alias"),
        ("dim: " + "[" * 100_000, "nested more than"), ("dim: " + "{a: " * 3_000, "nested more than"),
        ("report_to: [[x], [y]]", "report_to must be a value or a list of values"),
        ("report_to: {a: b}", "report_to must be a value or a list of values"),
        ("learning_rate: !!int x", "cannot be read as YAML"), ("use_ema: !!bool x", "cannot be read as YAML"),
        ("output_dir: !!timestamp x", "cannot be read as YAML"), ("dim: " + "1" * 5000, "cannot be read as YAML"),
        ("dim: 32\nseed: 1\ndim: 48\n", "dim must stand once, and stands in lines 1 and 3"),
        ("? [a, b]\n: 1", "unknown option|cannot be read as YAML"), ("output_dir: !!python/object:os.system x", "YAML"),
    ],
)  # fmt: skip
def test_hostile_yaml(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_yaml(str(file))
    assert str(file) in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(ValueError):
        TrainConfig(**read_mapping(file))


def test_yaml_that_is_not_utf8_or_not_there(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"output_dir: \xff\n")
    for name in ("a.yaml", "none.yaml"):
        with pytest.raises(ValueError, match=name):
            read_mapping(tmp_path / name)


@pytest.mark.parametrize("content", [b"[1]", b"", b"\xff", b"[" * 100_000, b"1" * 5000, b"null"])
def test_json_of_another_form(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": 10**400}, {"dim": 10**400}, {"seed": 2**64}, {"output_dir": "runs/\udcff"},
        {"train_data_dir": "\udcff"}, {"dim_mults": [1, 10**30]},
    ],
)  # fmt: skip
def test_values_that_no_library_takes(options):
    ((name, _),) = options.items()
    with pytest.raises(ValueError, match=f"^{name} must be") as caught:
        TrainConfig(**options)
    assert len(str(caught.value)) < 300
