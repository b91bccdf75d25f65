"""Run folders that are damaged or hold other files: nothing of a run is lost, and errors name the file."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
import yaml
from helpers import config, metrics, state

from ddpm_hf import DDPMPipeline, train
from ddpm_hf.hub.card import card_text
from ddpm_hf.hub.publish import load_pipeline
from ddpm_hf.run import checkpoint, record
from ddpm_hf.trainer.looking import Looks
from ddpm_hf.trainer.loop import Trainer, TrainingError
from ddpm_hf.trainer.saving import Saver

OPTIONS = {"max_train_steps": 2, "checkpointing_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps with two checkpoints, not to be changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(config(folder, **OPTIONS))
    torch.set_num_threads(threads)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["damaged", "no folder", "empty folder", "no pipeline either"])
@pytest.mark.parametrize("mode", ["latest", "latest-valid"])
def test_progress_without_a_usable_checkpoint_is_refused(what, mode, run):
    """Each file of the run stays as it is, and the message names the ways out."""
    if what == "damaged":
        for _, path in checkpoint.list_checkpoints(run / "checkpoints"):
            (path / "model.safetensors").write_bytes(b"?")
    else:
        shutil.rmtree(run / "checkpoints")
    if what == "empty folder":
        (run / "checkpoints").mkdir()
    if what == "no pipeline either":
        shutil.rmtree(run / "pipeline")
    before = content(run)
    with pytest.raises(ValueError, match=r"(?s)checkpoint.*output_dir|checkpoint.*latest-valid") as caught:
        train(config(run, resume_from_checkpoint=mode, **{**OPTIONS, "max_train_steps": 4}))
    assert str(run) in str(caught.value)
    assert content(run) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, monkeypatch, capsys):
    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "save_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run", max_train_steps=2, checkpointing_steps=2))
    monkeypatch.undo()
    capsys.readouterr()
    assert len(metrics(tmp_path / "run")) == 2
    assert train(config(tmp_path / "run", max_train_steps=2, checkpointing_steps=2)).steps == 2
    assert "no checkpoint yet: its run begins at step 0" in capsys.readouterr().out


def test_latest_valid_keeps_what_it_writes(run, tmp_path):
    """The newest of two is damaged and the limit is 1: the run goes on from the older, and each save is there."""
    (run / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"?")
    options = {**OPTIONS, "max_train_steps": 3, "resume_from_checkpoint": "latest-valid"}
    kept = []
    save = Saver.save_checkpoint

    def saved(self):
        save(self)
        kept.append((self.run.folder.checkpoints / f"step-{self.run.progress.step:06d}").is_dir())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Saver, "save_checkpoint", saved)
        train(config(run, checkpoints_total_limit=1, **options))
    assert kept == [True, True]
    train(config(tmp_path / "whole", **{**OPTIONS, "max_train_steps": 3}))
    ours, whole = state(run), state(tmp_path / "whole")
    assert all(ours[name] == content for name, content in whole.items())


def test_a_blank_line_in_the_metrics_erases_nothing(run):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace("\n", "\n\n", 1))
    before = content(run)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 must be a JSON object"):
        train(config(run, **{**OPTIONS, "max_train_steps": 3}))
    assert content(run) == before


def test_other_files_are_left_alone(run, capsys):
    """Copies of synchronizing programs and files of the user's, in each folder; and saving goes on beside them."""
    names = ["samples/step-000002 2.png", "samples/step-.png", "samples/step-000001.png.bak", "checkpoints/notes.txt",
             "checkpoints/step-000002 2/mine", "notes.md", "checkpoints/notes.writing/mine", "pipeline/notes.txt",
             "pipeline/mine/notes.txt", "pipeline/README.md"]  # fmt: skip
    for name in names:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    assert train(config(run, **{**OPTIONS, "max_train_steps": 3})).steps == 3
    assert all((run / name).read_text() == "mine" for name in names)
    assert json.loads((run / "pipeline" / "training.json").read_text())["samples_step"] == 3
    assert "warning" not in capsys.readouterr().out.replace("warning: lr_warmup", "")


def test_a_pipeline_folder_that_cannot_be_read_stays(run, capsys):
    (run / "pipeline" / "model_index.json").write_text("mine")
    assert train(config(run, **{**OPTIONS, "max_train_steps": 3})).steps == 3
    assert (run / "pipeline.before-000003" / "model_index.json").read_text() == "mine"
    assert DDPMPipeline.from_pretrained(run / "pipeline") and "cannot be taken along" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["samples is a file", "no pictures", "no loss curve", "no card", "no facts"])
def test_a_checkpoint_is_saved_whatever_cannot_be_drawn(broken, tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise ValueError("no such font")

    if broken == "samples is a file":
        draw = Looks.save_samples

        def hindered(self):
            self.run.folder.samples.write_text("mine")
            draw(self)

        monkeypatch.setattr(Looks, "save_samples", hindered)
    elif broken == "no pictures":
        monkeypatch.setattr("ddpm_hf.trainer.looking.save_image_grid", fails)
    elif broken == "no loss curve":
        monkeypatch.setattr(record, "save_loss_plot", fails)
    elif broken == "no card":
        monkeypatch.setattr("ddpm_hf.trainer.saving.write_card", fails)
    else:
        monkeypatch.setattr(record, "versions", fails)
    result = train(config(tmp_path / "run", max_train_steps=2, checkpointing_steps=2))
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-000002"
    assert DDPMPipeline.from_pretrained(result.pipeline_dir)
    assert "could not be written, and is left out" in capsys.readouterr().out
    names = {"samples is a file": "samples.png", "no pictures": "samples.png", "no loss curve": "loss.png",
             "no facts": "training.json"}  # fmt: skip
    assert broken not in names or not (result.pipeline_dir / names[broken]).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_that_are_not_utf8(tmp_path, monkeypatch, capsys):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(ValueError, match="output_dir must be a text in UTF-8"):
        config(tmp_path / name)
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)  # where a relative output_dir has such a name all the same
    assert train(config(".", max_train_steps=1)).steps == 1
    assert json.loads((tmp_path / name / "pipeline" / "training.json").read_text())["name"] == "caf\ufffd"
    assert "could not be written" not in capsys.readouterr().out
    assert "caf\ufffd" in (tmp_path / name / "pipeline" / "README.md").read_text(encoding="utf-8")


def test_a_disk_without_room_for_a_save_is_named_at_the_start(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(ValueError, match=r"room for a save, at least [0-9.]+ MB: .* has 0\.1 MB"):
        train(config(tmp_path / "run", max_train_steps=1))
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("place", ["config.yaml", "metrics.jsonl"])
def test_a_disk_that_is_full_at_the_start(place, tmp_path, monkeypatch):
    write = checkpoint.write_text

    def full(path, text):
        if path.name == place:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(checkpoint, "write_text", full)
    with pytest.raises(TrainingError, match=r"step 0: cannot save in .*MB are free.*No space left"):
        train(config(tmp_path / "run", max_train_steps=1))


WRONG = [None, [], {}, "x", 7, -1.5, [None], {"a": None}]


def leaves(value, path=()):
    """The place of each value of a JSON document, the document itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def replaced(document, path, value):
    if not path:
        return value
    copy = json.loads(json.dumps(document))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return copy


class Restored(Exception):
    """The run would have gone on."""


def resume(folder, monkeypatch, **options):
    """Resume up to the first step, without computing it."""

    def stop(*_):
        raise Restored

    monkeypatch.setattr(Trainer, "_train_step", stop)
    train(config(folder, **{**OPTIONS, "max_train_steps": 3, **options}))


@pytest.mark.parametrize("name", ["progress.json", "clock.json", "checksums.json"])
def test_each_value_of_a_checkpoint_of_another_form(name, trained, monkeypatch):
    """Read without the checksums, which tell all of it: the run goes on, or a ValueError names the file."""
    newest = trained / "checkpoints" / "step-000002"
    document = json.loads((newest / name).read_text())
    before = (newest / name).read_bytes()
    seen = set()
    try:
        for path in leaves(document):
            for value in WRONG:
                (newest / name).write_text(json.dumps(replaced(document, path, value)))
                try:
                    if name == "checksums.json":
                        seen.add(checkpoint.damage(newest) is None)
                    else:
                        checkpoint.read_progress(newest)
                except ValueError as error:
                    assert name in str(error)
                    seen.add(False)
    finally:
        (newest / name).write_bytes(before)
    assert False in seen


@pytest.mark.parametrize(
    "field, value",
    [("data", {}), ("data", {"items": [[[]]]}), ("step", None), ("best", {"metric": "fid"}), ("evaluation", [{}]),
     ("feed", [1]), ("pending", ["x"]), ("pending", "samples"), (None, None), ("data", None), ("draws", 3)],
)  # fmt: skip
def test_progress_of_another_form_is_refused_by_the_run(field, value, run, monkeypatch):
    newest = run / "checkpoints" / "step-000002"
    progress = json.loads((newest / "progress.json").read_text())
    if field is None:
        del progress["data"]
    else:
        progress[field] = value
    (newest / "progress.json").write_text(json.dumps(progress))
    (newest / checkpoint.CHECKSUMS).unlink()
    checkpoint._seal(newest)
    before = content(run)
    with pytest.raises(ValueError, match="progress.json|the data is not that of the run"):
        resume(run, monkeypatch)
    assert content(run) == before


class Plain(yaml.SafeDumper):
    def ignore_aliases(self, _):
        return True


def test_each_value_of_the_options_of_another_form(trained):
    """config.yaml of a run: another value is another run, or changes nothing."""
    file = trained / "config.yaml"
    before = file.read_bytes()
    options = yaml.safe_load(before)
    trainer = Trainer(config(trained, **OPTIONS))
    try:
        for value in WRONG:
            for content in (value, dict.fromkeys(options, value)):  # the lines that differ are collected from all
                file.write_text(yaml.dump(content, Dumper=Plain))
                with pytest.raises(ValueError, match=re.escape(str(trained))):
                    trainer.folder.open(trainer.config, trainer.feed.kind, False)
    finally:
        file.write_bytes(before)


def test_each_value_of_a_saved_index_of_another_form(run):
    """The pipeline and its card are made, or a ValueError names the folder."""
    folder = run / "pipeline"
    file = folder / "model_index.json"
    document = json.loads(file.read_text())
    for path in leaves(document):
        for value in (None, [], "x", {}):
            file.write_text(json.dumps(replaced(document, path, value)))
            for call in (lambda: card_text(folder), lambda: load_pipeline(str(folder))):
                try:
                    call()
                except ValueError as error:
                    assert str(folder) in str(error)


def test_a_run_without_its_options_is_told(tmp_path):
    train(config(tmp_path / "run", **OPTIONS))
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ValueError, match="checkpoints but no config.yaml.*put it back"):
        train(config(tmp_path / "run", **OPTIONS))
