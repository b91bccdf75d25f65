"""Publishing, end to end: the real client in fresh processes, against the small Hub of these tests."""

import hashlib
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load_program, run_program
from helpers import CARD_RUN, make
from hub_server import serving, validate_card
from safetensors.torch import load_file, save_file

from ddpm_hf import DDPMPipeline
from ddpm_hf.hub import publish as hub_module
from ddpm_hf.hub.card import Parts, card_text
from ddpm_hf.hub.contents import pipeline_files
from ddpm_hf.hub.publish import Publisher, Target, load_pipeline, write_space

TRAIN = ROOT / "training" / "train.py"
OPTIONS = [f"--{name}={value}" for name, value in CARD_RUN.items() if not isinstance(value, list)]
OPTIONS += ["--dim_mults", "1", "2", "--dataset_name=digits"]
# Sample from repos by name; prints a digest of each. "ours" and "parts": the package's classes; else stock ones, in a
# process where the package cannot be imported. Arguments: class, and (way, name, revision) as JSON.
LOAD = """
import hashlib, json, sys
ours, calls = sys.argv[1], json.loads(sys.argv[2])
if calls[0][0] not in ("ours", "parts"):
    sys.modules["ddpm_hf"] = None
import numpy as np, torch, diffusers
for way, name, revision in calls:
    if way in ("ours", "parts"):
        import ddpm_hf
        cls = getattr(ddpm_hf, ours)
    if way == "ours":
        pipe = cls.from_pretrained(name, revision=revision)
        assert type(pipe.unet) in (ddpm_hf.UNet2D, ddpm_hf.UNet1D)
    elif way == "parts":
        unet = ddpm_hf.UNet2D.from_pretrained(name, subfolder="unet", revision=revision)
        scheduler = ddpm_hf.GaussianScheduler.from_pretrained(name, subfolder="scheduler", revision=revision)
        pipe = cls(unet, scheduler, 3)
    else:
        pipe = getattr(diffusers, way).from_pretrained(name, trust_remote_code=True, revision=revision)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
    print("digest", hashlib.sha256(np.ascontiguousarray(out)).hexdigest())
"""

# Programs, one after the other in one process: imports take longer than what is tested here. A call is
# [token, program, arguments...]; a program that ends in .py, or code.
SESSION = """
import contextlib, io, json, os, runpy, sys
import ddpm_hf.hub.publish
from accelerate.state import AcceleratorState
ddpm_hf.hub.publish.RETRY_AFTER = (0, 0, 0)
results = []
for token, program, *arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token or ""
    sys.argv = [program, *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(program, run_name="__main__") if program.endswith(".py") else exec(program, {})
        except SystemExit as end:
            status = end.code or 0
    AcceleratorState._reset_state(reset_partial_state=True)
    results.append([status, out.getvalue() + err.getvalue()])
print(json.dumps(results))
"""


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


@pytest.fixture
def at(hub, tmp_path):
    """Runs a program as a user of the Hub."""

    def run(*arguments, token="hf_alice", home="home", **more):
        env = {**hub.environment(token, tmp_path / home), "HF_TOKEN_PATH": str(tmp_path / "none"), **more}
        return run_program(*arguments, cwd=tmp_path, **env)

    return run


@pytest.fixture
def session(at):
    """Runs calls in one process; gives (status, what was printed) of each."""

    def run(*calls):
        done = at("-c", SESSION, json.dumps([[c if c is None else str(c) for c in call] for call in calls]))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture
def load(at):
    """Digests of samples from repos, by (way, name, revision), without a token."""

    def run(*calls, cls="DDPMPipeline", home="home of a reader"):
        done = at("-c", LOAD, cls, json.dumps(calls), token=None, home=home)
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("digest")]

    return run


PUBLISH = ROOT / "training" / "publish.py"
TO_DIGITS = ["--hub_model_id", "alice/digits"]


def publish(at, folder, *more, **options):
    return at(PUBLISH, folder, *TO_DIGITS, *more, **options)


def samples(pipe):
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
    return hashlib.sha256(np.ascontiguousarray(out)).hexdigest()


def test_trained_published_and_loaded_in_every_way(hub, at, load, session, tmp_path):
    """Trained with --push_to_hub; every way of loading gives the samples of the local folder; so does the old revision
    after other weights were pushed."""
    done = at(TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", *TO_DIGITS)
    assert done.returncode == 0, done.stderr
    assert "published step 4" in done.stderr + done.stdout
    pipe = DDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    expected, first = samples(pipe), hub.repos["models", "alice/digits"].branches["main"]
    published, local = hub.files("alice/digits"), tmp_path / "run" / "pipeline"
    for name in {str(f.relative_to(local)) for f in local.rglob("*") if f.is_file()} - {"README.md"}:
        assert published[name] == (local / name).read_bytes(), name
    weights = published["unet/diffusion_pytorch_model.safetensors"]
    assert ("PUT", f"/lfs/{hashlib.sha256(weights).hexdigest()}", 200) in hub.requests
    for content in published.values():
        assert str(tmp_path).encode() not in content and b"hf_alice" not in content
    assert not any("training_state" in name or "optimizer" in name for name in published)
    card = published["README.md"].decode()
    assert 'from_pretrained("alice/digits")' in card

    for ways in (("ours", "parts"), ("DiffusionPipeline",), ("DDPMPipeline",)):
        digests = load(*((way, "alice/digits", "main") for way in ways), home=f"home {ways[0]}")
        assert digests == [expected] * len(ways), ways

    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.5)
    pipe.save_pretrained(tmp_path / "changed")
    (wrong,) = validate_card(card.replace("pipeline_tag: ", "pipeline_tag: my-"))
    assert validate_card(card) == [] and "must be a known task" in wrong
    (publish,) = session(["hf_alice", PUBLISH, "changed", *TO_DIGITS])
    assert publish[0] == 0
    both = load(("DiffusionPipeline", "alice/digits", "main"), ("DiffusionPipeline", "alice/digits", first))
    assert both == [samples(pipe), expected]
    assert "training.json" not in hub.files("alice/digits")  # how the changed one was trained is not known


@pytest.mark.slow
def test_sequences_by_name(hub, load, tmp_path):
    pipe = make("sequences")
    pipe.save_pretrained(tmp_path / "saved")
    hub.put("alice/waves", tmp_path / "saved")
    for way in ("ours", "DiffusionPipeline"):
        assert load((way, "alice/waves", "main"), cls="DDPMPipeline1D") == [samples(pipe)]


@pytest.mark.slow
def test_two_processes_publish_once(hub, at, tmp_path):
    """And where the Hub refuses, both end."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", TRAIN, *OPTIONS, "--output_dir=run"]
    launch += ["--train_batch_size=2", "--push_to_hub", "--hub_model_id=alice/digits"]
    cpu = {"ACCELERATE_USE_CPU": "1"}
    done = at(*launch, token="hf_wrong", **cpu)
    assert done.returncode != 0 and "does not accept the token" in done.stderr and not hub.repos
    done = at(*launch, **cpu)
    assert done.returncode == 0, done.stderr
    assert [path for method, path, _ in hub.requests if "/commit/" in path] == ["/api/models/alice/digits/commit/main"]
    assert "2 processes" in hub.files("alice/digits")["README.md"].decode()


def test_the_code_in_a_card_runs(hub, at, tmp_path):
    """Both snippets, the second one where the package is not installed; and without trust diffusers stops."""
    make("images").save_pretrained(tmp_path / "saved")
    hub.put("alice/digits", tmp_path / "saved")
    card = card_text(tmp_path / "saved", "alice/digits")
    ours, stock = (part.split("```")[0] for part in card.split("```python\n")[1:])
    show = "\nimport numpy as np; print([np.asarray(image).sum() for image in images])"
    without = "import sys; sys.modules['ddpm_hf'] = None\n"
    untrusted = stock.replace(", trust_remote_code=True", "").replace("\n", "\n    ")
    untrusted = f"try:\n    {untrusted}\nexcept ValueError as error:\n    assert 'trust_remote_code' in str(error)\n"
    runs = [at("-c", code + show, token=None) for code in (ours, without + untrusted + "else: raise\n" + stock)]
    assert runs[0].returncode == runs[1].returncode == 0, runs[0].stderr + runs[1].stderr
    assert runs[0].stdout.splitlines()[-1] == runs[1].stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "message"),
    [("nofile.pt", "nofile.pt is not a file"), ("results/model-2.ckpt", "is not a file"),
     ("a/b/c", "there is no folder a/b/c, and a repo on the Hub cannot have this name"),
     ("model-2.pt", "python training/convert.py model-2.pt --output_dir"),
     ("p/model_index.json", "it is a file, and a pipeline is a folder; did you mean "),
     ("p/unet/x.safetensors", "it is a file, and a pipeline is a folder")],
)  # fmt: skip
def test_a_name_that_no_pipeline_has_is_refused_at_once(name, message, tmp_path, monkeypatch):
    """The Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub_module, "DiffusionPipeline", None)
    Path("p/unet").mkdir(parents=True)
    for file in ("model-2.pt", "p/model_index.json", "p/unet/x.safetensors"):
        Path(file).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"the pipeline {name!r} cannot be loaded: .*{re.escape(message)}"):
        load_pipeline(name)
    with pytest.raises(ValueError, match=re.escape("no such folder" if name == "a/b/c" else message)):
        Parts(Path(name))


def test_a_hub_that_cannot_be_asked_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no folder of this name exists, and the Hub could not be asked: .*ffline"):
        load_pipeline("no/such-model")


REFUSED = [("hf_wrong", "does not accept the token"), (None, "needs a token"), ("hf_reader", "may only read"),
           ("hf_bob", "cannot be published to")]  # fmt: skip


def test_refused_before_training(hub, session, tmp_path):
    make("images").save_pretrained(tmp_path / "saved")
    before = {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    train = [TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", *TO_DIGITS]
    calls = []
    for token, says in REFUSED:
        calls += [((token, *train), says), ((token, PUBLISH, "saved", *TO_DIGITS), says)]
        if token != "hf_bob":  # where one may write is not asked without a repo
            calls.append(((token, *train, "--dry_run"), says))
    hub.fail_next("GET", "/whoami", how=503)  # the first call
    calls.insert(0, (("hf_alice", PUBLISH, "saved", *TO_DIGITS), "cannot check the token now"))
    for (status, said), (call, says) in zip(session(*(call for call, _ in calls)), calls, strict=True):
        assert status == 2 and says in said and "Traceback" not in said, (call, said)
    assert not hub.repos and not (tmp_path / "run" / "config.yaml").exists()
    assert before == {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}


def test_a_lost_connection_is_tried_again(hub, at, tmp_path):
    """In the middle of a large file and of the commit; nothing is half-published meanwhile."""
    make("images").save_pretrained(tmp_path / "saved")
    hub.fail_next("PUT", "/lfs/", times=1)
    hub.fail_next("POST", "/commit/", times=1)
    done = publish(at, tmp_path / "saved")
    assert done.returncode == 0 and "tried again in 2 s" in done.stdout, done.stderr
    outcomes = [status for method, path, status in hub.requests if "/commit/" in path]
    assert outcomes == ["cut", 200] and ("PUT", "cut") in [(m, s) for m, _, s in hub.requests]
    repo = hub.repos["models", "alice/digits"]
    assert [len(tree) > 0 for tree in repo.commits.values()] == [False, True]


def test_an_upload_that_fails_does_not_end_the_run(hub, session, tmp_path):
    """Every attempt fails: training ends well, the files are whole, nothing is published; the same command uploads."""
    hub.fail_next("POST", "/commit/", how=503, times=4)
    train = ["hf_alice", TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", *TO_DIGITS]
    look = "import pathlib; print(pathlib.Path('run/published.json').exists())"
    done, noted, again, third = session(train, [None, look], train, train)
    assert done[0] == 0 and "step 4 could not be published on alice/digits" in done[1], done
    assert noted[1].strip() == "False" and DDPMPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert again[0] == 0 and "published step 4" in again[1] and "nothing left to do" in again[1]
    assert third[0] == 0 and "published" not in third[1]  # it is there already
    assert "model_index.json" in hub.files("alice/digits")
    assert [status for _, path, status in hub.requests if "/commit/" in path] == [503] * 4 + [200]


@pytest.mark.slow
def test_every_save_with_state_on_a_branch_of_a_private_repo(hub, session, tmp_path):
    """The state that was uploaded is that which a run goes on from, elsewhere, to the same bits."""
    run = ["hf_alice", TRAIN, *OPTIONS, "--lr_scheduler=constant", "--checkpointing_steps=2"]
    more = ["--hub_every_save", "--hub_upload_state", "--hub_private_repo=True", "--hub_revision=trial"]
    ((status, said),) = session([*run, "--output_dir=run", *more, "--push_to_hub", "--hub_model_id=digits"])
    assert status == 0 and "published step 4" in said, said
    repo = hub.repos["models", "alice/digits"]
    assert repo.private and hub.files("alice/digits") == {} and "Training step 4" in repo.messages.values()
    files = hub.files("alice/digits", "trial")
    state = {name for name in files if name.startswith("training_state/")}
    assert {f"training_state/checkpoints/step-000004/{n}" for n in ("optimizer.bin", "progress.json")} <= state
    assert not any("step-000002" in name or str(tmp_path).encode() in files[name] for name in files)
    for name in state:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(files[name])
    folders = "run", "training_state"
    for status, said in session(*([*run, f"--output_dir={folder}", "--max_train_steps=6"] for folder in folders)):
        assert status == 0 and "after step 4" in said, said
    weights = [tmp_path / f / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors" for f in folders]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_pull_request_is_one_a_run(hub, session, tmp_path):
    """Bob has no right to write: his run opens a pull request, and its second save goes there too."""
    make("images").save_pretrained(tmp_path / "saved")
    train = ["hf_bob", TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", *TO_DIGITS, "--create_pr"]
    train += ["--lr_scheduler=constant"]
    runs = [[*train, f"--max_train_steps={steps}"] for steps in (2, 4)]
    first, *others = session(["hf_alice", PUBLISH, "saved", *TO_DIGITS], *runs)
    assert first[0] == 0
    for steps, (status, said) in zip((2, 4), others):
        assert status == 0 and f"published step {steps}" in said, said
    repo = hub.repos["models", "alice/digits"]
    noted = json.loads((tmp_path / "run" / "published.json").read_text())
    assert noted["pull_request"] == "refs/pr/1" and noted["step"] == 4
    assert "training.json" not in hub.files("alice/digits") and repo.pull_requests == 1
    assert json.loads(hub.files("alice/digits", "refs/pr/1")["training.json"])["steps"] == 4


def test_a_pull_request_whose_answer_is_lost_is_opened_once(hub, session, tmp_path):
    """The retry finds it by its files, and so does the same command later; other files open another one."""
    for name in ("main", "first", "second"):
        make("images").save_pretrained(tmp_path / name)
        (tmp_path / name / "LICENSE.md").write_text(name)
    publish = [["hf_bob", PUBLISH, name, *TO_DIGITS, "--create_pr"] for name in ("first", "first", "second")]
    hub.fail_next("POST", "/commit/refs|/commit/main", how="lost")
    hub.faults *= 2  # the first commit is to the main branch
    results = session(["hf_alice", PUBLISH, "main", *TO_DIGITS], *publish)
    assert [status for status, _ in results] == [0] * 4, results
    said = [next(line for line in text.splitlines() if line.startswith("published: ")) for _, text in results]
    assert "tried again" in results[1][1] and said[1] == said[2] and said[1].endswith("/discussions/1")
    repo = hub.repos["models", "alice/digits"]
    assert repo.titles == dict.fromkeys((1, 2), "Upload pipeline") and said[3].endswith("/discussions/2")
    assert [hub.files("alice/digits", f"refs/pr/{i}")["LICENSE.md"] for i in (1, 2)] == [b"first", b"second"]


def test_what_a_pipeline_does_not_consist_of_is_not_uploaded(hub, session, tmp_path):
    """From the program and from Python; and it is said."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    folder = tmp_path / "saved"
    make("images").save_pretrained(folder)
    others = [".env", ".git/config", "notes.txt", "unet/.env", "unet/optimizer.pt", "unet/old/config.json", "photo.png",
              "script.py", "logs/events"]  # fmt: skip
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("secret")
    for name in ("loss.png", "LICENSE", "link.txt"):
        (folder / name).symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "LICENSE.md").write_text("MIT")
    push = (
        "from ddpm_hf import DDPMPipeline as P;"
        "P.from_pretrained('saved').save_pretrained('saved', push_to_hub=True, repo_id='alice/two')"
    )
    (status, said), second = session(["hf_alice", PUBLISH, "saved", *TO_DIGITS], ["hf_alice", push])
    assert status == 0 and second[0] == 0, (said, second)
    size = sum(len(data) for data in hub.files("alice/digits").values()) / 1e6
    assert f"uploaded: {len(hub.files('alice/digits'))} files, {size:.1f} MB" in said
    assert "not uploaded, because they are no part of a pipeline: '.env', '.git/'" in said and "and 3 more" in said
    for name in ("alice/digits", "alice/two"):
        files = hub.files(name)
        assert not [path for path, data in files.items() if data == b"secret"]
        assert {"model_index.json", "README.md", "unet/config.json", "scheduler/scheduler_config.json",
                "unet/diffusion_pytorch_model.safetensors"} <= set(files)  # fmt: skip
    assert "LICENSE.md" in hub.files("alice/digits")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "weights")
    weights.symlink_to(tmp_path / "weights")
    with pytest.raises(ValueError, match="must be a file of the folder, but is a link to .*weights"):
        pipeline_files(folder)
    weights.unlink()
    (tmp_path / "weights").rename(weights)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)  # it would be taken for an edited card
    with pytest.raises(ValueError, match="README.md must be a file of the folder"):
        hub_module.publish(folder, Target("alice/digits"), "Upload")


def test_a_note_of_another_form_does_not_stop_publishing(tmp_path):
    publisher = Publisher(tmp_path, Target("alice/x"), False)
    good = {"step": 3, "target": ["alice/x", None, False], "pull_request": None}
    publisher.note.write_text(json.dumps(good))
    assert publisher.published_step() == 3
    for wrong in ([], None, {**good, "step": "3"}, {**good, "pull_request": 1}, {**good, "target": {}}):
        publisher.note.write_text(json.dumps(wrong))
        assert publisher.published_step() is None


def test_an_edited_card_stays(hub, session, tmp_path):
    make("images").save_pretrained(tmp_path / "saved")
    publish = ["hf_alice", PUBLISH, "saved", *TO_DIGITS]
    assert session(publish)[0][0] == 0
    repo = hub.repos["models", "alice/digits"]
    tree = dict(repo.commits[repo.branches["main"]])
    edited = hub.files("alice/digits")["README.md"].replace(b"## Model", b"## My words\n\n## Model")
    tree["README.md"] = hashlib.sha256(edited).hexdigest()
    tree["notes.txt"] = tree["README.md"]
    tree["unet/unet_ddpm_hf_0_0_1.py"] = tree["README.md"]  # code of an older version
    hub.blobs[tree["README.md"]] = edited
    repo.branches["main"] = repo.add(tree, "by hand")
    push = "import ddpm_hf; ddpm_hf.DDPMPipeline.from_pretrained('saved').push_to_hub('alice/digits')"
    assert [status for status, _ in session(publish, ["hf_alice", push])] == [0, 0]
    files = hub.files("alice/digits")
    assert files["README.md"] == edited and "notes.txt" in files and "unet/unet_ddpm_hf_0_0_1.py" not in files
    before = repo.branches["main"]
    assert session([*publish, "--hub_license=mit"])[0][0] == 2 and repo.branches["main"] == before
    hub.fail_next("HEAD", "README.md", how=503, times=20)  # not known whether it was edited: nothing is overwritten
    assert session(publish)[0][0] == 2 and hub.files("alice/digits")["README.md"] == edited


def test_pushed_from_python_it_loads_everywhere(hub, at, load, tmp_path):
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` leave the one form, with a first card."""
    pipe = make("images")
    pipe.save_pretrained(tmp_path / "saved")
    push = (
        "import sys; from ddpm_hf import DDPMPipeline as P; p = P.from_pretrained(sys.argv[1]);"
        "p.push_to_hub('alice/one', private=True); p.save_pretrained('two', push_to_hub=True, repo_id='alice/two')"
    )
    done = at("-c", push, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    assert hub.repos["models", "alice/one"].private
    for name in ("alice/one", "alice/two"):
        assert validate_card(hub.files(name)["README.md"].decode()) == []
    hub.repos["models", "alice/one"].private = False
    assert load(*(("DiffusionPipeline", f"alice/{n}", "main") for n in ("one", "two"))) == [samples(pipe)] * 2


def test_a_licence_for_a_card_that_is_kept_is_refused(tmp_path, capsys):
    """Before the Hub is asked anything."""
    make("images").save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# Mine")
    assert load_program("publish").main([str(tmp_path), *TO_DIGITS, "--hub_license=mit"]) == 2
    assert f"{tmp_path / 'README.md'} was edited and is kept" in capsys.readouterr().err


@pytest.mark.parametrize(("kept", "licence", "said"), [(True, "mit", 1), (True, None, 0), (False, "mit", 0)])
def test_a_licence_that_an_edited_card_does_not_take_is_said(kept, licence, said, monkeypatch, tmp_path):
    """A run goes on, while publish.py refuses it."""
    done, lines = {"left_out": [], "card_kept": kept, "url": "x"}, []
    monkeypatch.setattr(hub_module, "publish", lambda *_, **__: dict(done))
    found = hub_module.publish_with_patience(tmp_path, Target("a/b", licence=licence), "Step 1", say=lines.append)
    assert found == {"url": "x"} and len([line for line in lines if "licence 'mit' is not in the card" in line]) == said


def test_a_page_of_a_pull_request_is_refused(tmp_path, capsys):
    """It would show what the main branch has, which may be nothing."""
    make("images").save_pretrained(tmp_path)
    for wrong, says in ((["--space=x", "--create_pr"], "got both"), (["--space=my page"], "my page")):
        assert load_program("publish").main([str(tmp_path), *TO_DIGITS, *wrong]) == 2
        assert says in capsys.readouterr().err


def test_a_page_shows_the_branch_that_was_published(tmp_path):
    for revision in (None, "dev"):
        write_space(tmp_path / str(revision), "alice/digits", "digits", revision)
        code = (tmp_path / str(revision) / "app.py").read_text()
        compile(code, "app.py", "exec")
        assert f"revision={revision!r}" in code


def test_a_damaged_folder_is_not_published(tmp_path, capsys):
    """It is refused before the Hub is asked anything."""
    make("images").save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    for folder, says in (("saved", "damaged"), ("nowhere", "must be the folder of a saved pipeline")):
        assert load_program("publish").main([str(tmp_path / folder), *TO_DIGITS]) == 2
        assert says in capsys.readouterr().err


def test_saves_that_come_faster_than_uploads(tmp_path, monkeypatch):
    """The newest that waits is uploaded next, from the files as they were when it was saved."""
    begun, release, seen = threading.Event(), threading.Event(), []

    def slow(folder, target, message, run=None, say=None):
        begun.set()
        release.wait(20)
        seen.append((message, load_file(folder / "w.safetensors")["w"].item(), run))
        return {"repo_id": target.repo_id, "commit": "0", "url": "there", "pull_request": None}

    monkeypatch.setattr(hub_module, "publish_with_patience", slow)
    said = []
    publisher = Publisher(tmp_path, Target("alice/x"), False, said.append)
    for step in range(4):
        shutil.rmtree(tmp_path / "pipeline", ignore_errors=True)
        (tmp_path / "pipeline").mkdir()
        save_file({"w": torch.tensor(float(step))}, tmp_path / "pipeline" / "w.safetensors")
        publisher.submit(step)
        assert begun.wait(20)
    shutil.rmtree(tmp_path / "pipeline")
    release.set()
    publisher.finish()
    assert seen == [("Training step 0", 0.0, None), ("Training step 3", 3.0, None)]
    assert publisher.published_step() == 3 and said == ["published step 0: there", "published step 3: there"]
    assert [path.name for path in tmp_path.iterdir()] == ["published.json"]


@pytest.mark.slow
def test_a_run_from_the_hub_names_its_origin(hub, session, tmp_path):
    """Fine-tuned from a repo, continued, and fine-tuned from a folder: base_model is the repo, or nothing."""
    make("images").save_pretrained(tmp_path / "base")
    hub.put("alice/base", tmp_path / "base")
    data = ["--dataset_name=digits", "--report_to=none", "--num_samples=4", "--ddpm_num_inference_steps=3",
            "--num_cpu_threads=1", "--push_to_hub"]  # fmt: skip
    tuned = ["--init_from=alice/base", "--max_train_steps=2", "--output_dir=tuned", "--hub_model_id=alice/tuned"]
    more = ["--continue_from=tuned", "--max_train_steps=3", "--output_dir=more", "--hub_model_id=alice/more"]
    local = [f"--init_from={tmp_path / 'base'}", "--max_train_steps=1", "--output_dir=c", "--hub_model_id=alice/c"]
    for status, text in session(*[["hf_alice", TRAIN, *data, *options] for options in (tuned, more, local)]):
        assert status == 0, text
    cards = {name: hub.files(f"alice/{name}")["README.md"].decode() for name in ("tuned", "more", "c")}
    assert all(validate_card(card) == [] for card in cards.values())
    assert "base_model: alice/base" in cards["tuned"] and "base_model: alice/tuned" in cards["more"]
    assert "continues the run tuned from its step 2 on" in cards["more"]
    assert "base_model" not in cards["c"] and "weights of base." in cards["c"] and str(tmp_path) not in cards["c"]
