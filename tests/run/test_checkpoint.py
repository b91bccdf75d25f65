"""Checkpoints on disk: only whole ones have a name; rotation; the metrics file."""

import pytest

from ddpm_hf.run import checkpoint


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


def test_rotation_counts_whole_checkpoints_only(tmp_path):
    """Newer ones that are damaged take no place, and the one just written stays, whatever lies beside it."""
    paths = [write(tmp_path, step) for step in (2, 4, 6)]
    for path in paths[1:]:
        (path / "state").write_text("damaged")
    assert write(tmp_path, 3, limit=1).is_dir() and write(tmp_path, 5, limit=2).is_dir()
    assert checkpoint.latest(tmp_path, skip_damaged=True).name == "step-000005"
    names = [path.name for _, path in checkpoint.list_checkpoints(tmp_path)]
    # 2 went with the limit of 1; 4 is damaged and older than what is kept only after the next save
    assert names == ["step-000003", "step-000004", "step-000005", "step-000006"]
    write(tmp_path, 7, limit=2)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5, 6, 7]


def test_other_names_are_left_alone(tmp_path):
    others = ["step-000004 2", "step-abc", "step-٠٠٠٠٠٥", "notes.writing", "step-00000\u00b2"]
    for name in others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / "step-000009").write_text("a file")
    for step in (1, 2, 3):
        write(tmp_path, step, limit=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [3]
    assert all((tmp_path / name / "mine").exists() for name in others) and (tmp_path / "step-000009").is_file()


@pytest.mark.parametrize("content", ["[]", "{}", "null", '{"a": 1}', "[" * 100_000, "\udc80", '{"\\u0000": "x"}'])
def test_checksums_of_another_form_are_damage(content, tmp_path):
    path = write(tmp_path, 1)
    (path / checkpoint.CHECKSUMS).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"step-000001 is damaged: .*(checksums.json|missing|cannot be read)"):
        checkpoint.latest(tmp_path)


def test_where_all_are_damaged_each_is_named(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step) / "state").write_text("?")
    with pytest.raises(ValueError, match=r"(?s)no checkpoint.* whole.*step-000002.*step-000001.*another output_dir"):
        checkpoint.latest(tmp_path, skip_damaged=True)


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


def test_a_kill_between_the_names_of_a_step_saved_again_costs_no_checkpoint(tmp_path, monkeypatch):
    path, rename = write(tmp_path, 4), checkpoint.os.replace

    def first_only(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", first_only)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 4)
    monkeypatch.undo()
    assert not path.exists() and checkpoint.damage(checkpoint.latest(tmp_path)) is None
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [4]
    checkpoint.begin(tmp_path, 4)
    assert checkpoint.latest(tmp_path).is_dir()
    checkpoint.finish(tmp_path / "step-000004.writing")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000004"]


def test_checkpoints_that_lie_elsewhere(tmp_path):
    """A link takes part in the rotation; what it points to is not touched, and saving its step again goes on."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2):
        path = write(folder, step)
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    write(folder, 2)
    write(folder, 3, limit=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000003"]
    assert not (folder / "step-000002").is_symlink() and (tmp_path / "step-000001" / "state").exists()
    (folder / "step-000004.writing").symlink_to(tmp_path / "step-000001")
    write(folder, 4)
    assert (tmp_path / "step-000001" / "state").exists() and not (folder / "step-000004").is_symlink()


def test_a_folder_that_lies_elsewhere_is_replaced_too(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "final").symlink_to(tmp_path / "elsewhere")
    for text in ("one", "two", "three"):
        (tmp_path / "aside").mkdir()
        (tmp_path / "aside" / "file").write_text(text)
        checkpoint.replace_folder(tmp_path / "aside", tmp_path / "final")
        assert (tmp_path / "final" / "file").read_text() == text
    assert (tmp_path / "elsewhere").is_dir() and sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "final"]


def test_a_kill_between_the_names_of_a_folder_loses_nothing_of_the_earlier_one(tmp_path, monkeypatch):
    for name in ("final", "aside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    rename = checkpoint.os.replace

    def first_only(source, target):
        rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", first_only)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.replace_folder(tmp_path / "aside", tmp_path / "final")
    monkeypatch.undo()
    assert not (tmp_path / "final").exists()
    checkpoint.restore_folder(tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "final"
    checkpoint.restore_folder(tmp_path / "final")
    checkpoint.replace_folder(tmp_path / "aside", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "aside"


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
    metrics.append({"step": 4, "eval/fid": 1.0})
    metrics.rewind(4)
    assert len(metrics.read()) == 3
    metrics.rewind(4, evaluated=False)
    assert metrics.read() == [{"step": 2, "loss": 0.1}, {"step": 4, "loss": 0.1}]


@pytest.mark.parametrize(
    "line, rule",
    [
        (b"", "must be a JSON object in UTF-8"), (b"[1]", r"JSON object, got \[1\]"), (b"3", "JSON object, got 3"),
        (b'{"loss": 1.0}', "step must be a whole number, got nothing"),
        (b'{"step": "4"}', "step must be a whole number, got '4'"),
        (b'{"step": 4, "loss": "x"}', "loss must be a number"),
        (b'{"step": 4, "los', "must be a JSON object"), (b'{"a": "\xff"}', "UTF-8"), (b"[" * 100_000, "must be"),
    ],
)  # fmt: skip
def test_a_wrong_line_of_metrics_is_named_and_nothing_is_erased(line, rule, tmp_path):
    """In the middle, anything but a record; at the end, only what is no JSON is the trace of a kill."""
    metrics = checkpoint.MetricsFile(tmp_path / "metrics.jsonl")
    content = b'{"step": 2}\n' + line + b'\n{"step": 6}\n'
    metrics.path.write_bytes(content)
    for call in (metrics.read, lambda: metrics.rewind(6)):
        with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2.*{rule}"):
            call()
    assert metrics.path.read_bytes() == content
    metrics.path.write_bytes(b'{"step": 2}\r\n' + line)
    unfinished = line == b"" or line.endswith((b"los", b"[["))
    if unfinished:
        assert metrics.read() == [{"step": 2}]
    else:
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
            metrics.read()
