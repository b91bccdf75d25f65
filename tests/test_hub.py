"""Publishing, end to end: the real client in fresh processes, against the small Hub of these tests."""

import hashlib
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, run_program
from hub_server import serving, validate_card
from safetensors.torch import load_file, save_file
from test_card import SMALL
from test_saved_form import make

from ddpm_hf import DDPMPipeline
from ddpm_hf import hub as hub_module
from ddpm_hf.hub import Publisher, Target

TRAIN = ROOT / "training" / "train.py"
OPTIONS = [f"--{name}={value}" for name, value in SMALL.items() if not isinstance(value, list)]
OPTIONS += ["--dim_mults", "1", "2", "--dataset_name=digits"]
# Sample from a repo by its name; prints a digest. "ours": the package's class; else a stock one, without the package.
LOAD = """
import hashlib, sys
way, name, revision = sys.argv[1:4]
if way != "ours":
    sys.modules["ddpm_hf"] = None
import numpy as np, torch, diffusers
if way == "ours":
    import ddpm_hf
    pipe = ddpm_hf.DDPMPipeline.from_pretrained(name, revision=revision)
    assert type(pipe.unet) is ddpm_hf.UNet2D
elif way == "parts":
    sys.modules.pop("ddpm_hf")
    from ddpm_hf import DDPMPipeline, GaussianScheduler, UNet2D
    options = {"revision": revision}
    unet = UNet2D.from_pretrained(name, subfolder="unet", **options)
    pipe = DDPMPipeline(unet, GaussianScheduler.from_pretrained(name, subfolder="scheduler", **options), 3)
else:
    pipe = getattr(diffusers, way).from_pretrained(name, trust_remote_code=True, revision=revision)
pipe.set_progress_bar_config(disable=True)
out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
print(hashlib.sha256(np.ascontiguousarray(out)).hexdigest())
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


def publish(at, folder, *more, **options):
    return at(ROOT / "training" / "publish.py", folder, "--hub_model_id", "alice/digits", *more, **options)


def samples(pipe):
    pipe.set_progress_bar_config(disable=True)
    out = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="np", return_dict=False)[0]
    return hashlib.sha256(np.ascontiguousarray(out)).hexdigest()


def test_trained_published_and_loaded_in_every_way(hub, at, tmp_path):
    """Trained with --push_to_hub; every way of loading gives the samples of the local folder; so does the old revision
    after other weights were pushed."""
    done = at(TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", "--hub_model_id=alice/digits")
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
    validate = "import sys; from huggingface_hub import ModelCard; ModelCard(open(sys.argv[1]).read()).validate()"
    assert at("-c", validate, tmp_path / "run" / "pipeline" / "README.md").returncode == 0
    (tmp_path / "bad.md").write_text(card.replace("pipeline_tag: ", "pipeline_tag: my-"))
    assert '"pipeline_tag" must be a known task' in at("-c", validate, tmp_path / "bad.md").stderr
    assert 'from_pretrained("alice/digits")' in card

    for way in ("ours", "parts", "DiffusionPipeline", "DDPMPipeline"):
        loaded = at("-c", LOAD, way, "alice/digits", "main", token=None, home=f"home {way}")
        assert loaded.returncode == 0 and loaded.stdout.split()[-1] == expected, (way, loaded.stderr)

    with torch.no_grad():
        next(pipe.unet.parameters()).add_(0.5)
    pipe.save_pretrained(tmp_path / "changed")
    assert publish(at, tmp_path / "changed").returncode == 0
    for revision, digest in (("main", samples(pipe)), (first, expected)):
        loaded = at("-c", LOAD, "DiffusionPipeline", "alice/digits", revision, token=None, home="home new")
        assert loaded.stdout.split()[-1] == digest, loaded.stderr
    assert "training.json" not in hub.files("alice/digits")  # how the changed one was trained is not known


def test_sequences_by_name(hub, at, tmp_path):
    pipe = make("sequences")
    pipe.save_pretrained(tmp_path / "saved")
    assert publish(at, tmp_path / "saved").returncode == 0
    for way, code in (("ours", LOAD.replace("ddpm_hf.DDPMPipeline.", "ddpm_hf.DDPMPipeline1D.")), ("stock", LOAD)):
        code = code.replace("ddpm_hf.UNet2D", "ddpm_hf.UNet1D")
        name = "ours" if way == "ours" else "DiffusionPipeline"
        loaded = at("-c", code, name, "alice/digits", "main", token=None, home=way)
        assert loaded.returncode == 0 and loaded.stdout.split()[-1] == samples(pipe), loaded.stderr


def test_two_processes_publish_once(hub, at, tmp_path):
    """And where the Hub refuses, both end."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", TRAIN, *OPTIONS, "--output_dir=run"]
    launch += ["--train_batch_size=2", "--push_to_hub", "--hub_model_id=alice/digits"]
    cpu = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = at(*launch, token="hf_wrong", **cpu)
    assert done.returncode != 0 and "does not accept the token" in done.stderr and not hub.repos
    done = at(*launch, **cpu)
    assert done.returncode == 0, done.stderr
    assert [path for method, path, _ in hub.requests if "/commit/" in path] == ["/api/models/alice/digits/commit/main"]
    assert "2 processes" in hub.files("alice/digits")["README.md"].decode()


def test_the_code_in_a_card_runs(hub, at, tmp_path):
    """Both snippets, the second one where the package is not installed; and without trust diffusers stops."""
    make("images").save_pretrained(tmp_path / "saved")
    assert publish(at, tmp_path / "saved").returncode == 0
    card = hub.files("alice/digits")["README.md"].decode()
    ours, stock = (part.split("```")[0] for part in card.split("```python\n")[1:])
    show = "\nimport numpy as np; print([np.asarray(image).sum() for image in images])"
    without = "import sys; sys.modules['ddpm_hf'] = None\n"
    runs = [at("-c", code + show, token=None) for code in (ours, without + stock)]
    assert runs[0].returncode == 0 and runs[0].stdout.splitlines()[-1] == runs[1].stdout.splitlines()[-1], runs[
        1
    ].stderr
    refused = at("-c", without + stock.replace(", trust_remote_code=True", ""), token=None, home="other")
    assert refused.returncode != 0 and "trust_remote_code" in refused.stderr


@pytest.mark.parametrize(
    ("token", "says"),
    [("hf_wrong", "does not accept the token"), (None, "needs a token"), ("hf_reader", "may only read"),
     ("hf_bob", "cannot be published to")],
)  # fmt: skip
def test_refused_before_training(token, says, hub, at, tmp_path):
    run = [TRAIN, *OPTIONS, "--output_dir=run", "--push_to_hub", "--hub_model_id=alice/digits"]
    for more in ([], ["--dry_run"])[: 1 if token == "hf_bob" else 2]:
        done = at(*run, *more, token=token)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
        assert not (tmp_path / "run" / "config.yaml").exists() and not hub.repos
    make("images").save_pretrained(tmp_path / "saved")
    before = {p: p.read_bytes() for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    done = publish(at, tmp_path / "saved", token=token)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr and not hub.repos
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


def test_an_upload_that_fails_does_not_end_the_run(hub, at, tmp_path):
    """Every attempt fails: training ends well, the files are whole, nothing is published; the same command uploads."""
    hub.fail_next("POST", "/commit/", how=503, times=4)
    quick = "import ddpm_hf.hub as h; h.RETRY_AFTER = (0, 0, 0); import runpy, sys; "
    program = quick + f"sys.argv = sys.argv[1:]; runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    arguments = ["train.py", *OPTIONS, "--output_dir=run", "--push_to_hub", "--hub_model_id=alice/digits"]
    done = at("-c", program, *arguments)
    assert done.returncode == 0, done.stderr
    assert "step 4 could not be published on alice/digits" in done.stderr + done.stdout
    assert hub.files("alice/digits") == {} and not (tmp_path / "run" / "published.json").exists()
    again = at("-c", program, *arguments)
    assert again.returncode == 0 and "published step 4" in again.stderr + again.stdout
    assert "nothing left to do" in again.stdout and "model_index.json" in hub.files("alice/digits")
    commits = len(hub.repos["models", "alice/digits"].commits)
    assert at("-c", program, *arguments).returncode == 0  # a third time: it is there already
    assert len(hub.repos["models", "alice/digits"].commits) == commits


def test_every_save_with_state_on_a_branch_of_a_private_repo(hub, at, tmp_path):
    """The state that was uploaded is that which a run goes on from, elsewhere, to the same bits."""
    more = ["--checkpointing_steps=2", "--hub_every_save", "--hub_upload_state", "--hub_private_repo=True"]
    more += ["--hub_revision=trial", "--push_to_hub", "--hub_model_id=digits"]
    run = [*OPTIONS, "--lr_scheduler=constant"]
    done = at(TRAIN, *run, "--output_dir=run", *more)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["models", "alice/digits"]
    assert repo.private and hub.files("alice/digits") == {}
    said = done.stderr + done.stdout
    assert "published step 4" in said and "Training step 4" in repo.messages.values()
    files = hub.files("alice/digits", "trial")
    state = {name for name in files if name.startswith("training_state/")}
    assert {f"training_state/checkpoints/step-000004/{n}" for n in ("optimizer.bin", "progress.json")} <= state
    assert not any("step-000002" in name for name in files)
    folders = tmp_path / "run", tmp_path / "elsewhere" / "training_state"
    for name in state:
        (tmp_path / "elsewhere" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "elsewhere" / name).write_bytes(files[name])
    for folder in folders:
        done = at(TRAIN, *run, f"--output_dir={folder}", "--checkpointing_steps=2", "--max_train_steps=6")
        assert done.returncode == 0 and "after step 4" in done.stdout, done.stderr
    weights = [f / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors" for f in folders]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_pull_request_is_one_a_run(hub, at, tmp_path):
    """Bob has no right to write: his run opens a pull request, and its second save goes there too."""
    make("images").save_pretrained(tmp_path / "saved")
    assert publish(at, tmp_path / "saved").returncode == 0
    repo = hub.repos["models", "alice/digits"]
    main = repo.branches["main"]
    more = ["--push_to_hub", "--hub_model_id=alice/digits", "--create_pr", "--lr_scheduler=constant"]
    for steps in (2, 4):
        done = at(TRAIN, *OPTIONS, "--output_dir=run", *more, f"--max_train_steps={steps}", token="hf_bob")
        assert done.returncode == 0 and f"published step {steps}" in done.stderr + done.stdout, done.stderr
    noted = json.loads((tmp_path / "run" / "published.json").read_text())
    assert noted["pull_request"] == "refs/pr/1" and noted["step"] == 4
    assert repo.branches["main"] == main and repo.pull_requests == 1
    assert json.loads(hub.files("alice/digits", "refs/pr/1")["training.json"])["steps"] == 4


def test_an_edited_card_stays(hub, at, tmp_path):
    make("images").save_pretrained(tmp_path / "saved")
    assert publish(at, tmp_path / "saved").returncode == 0
    repo = hub.repos["models", "alice/digits"]
    tree = dict(repo.commits[repo.branches["main"]])
    edited = hub.files("alice/digits")["README.md"].replace(b"## Model", b"## My words\n\n## Model")
    tree["README.md"] = hashlib.sha256(edited).hexdigest()
    tree["notes.txt"] = tree["README.md"]
    tree["unet/unet_ddpm_hf_0_0_1.py"] = tree["README.md"]  # code of an older version
    hub.blobs[tree["README.md"]] = edited
    repo.branches["main"] = repo.add(tree, "by hand")
    push = (
        "import sys; from ddpm_hf import DDPMPipeline as P; P.from_pretrained(sys.argv[1]).push_to_hub('alice/digits')"
    )
    assert publish(at, tmp_path / "saved").returncode == 0
    done = at("-c", push, tmp_path / "saved")
    assert done.returncode == 0, done.stderr
    files = hub.files("alice/digits")
    assert files["README.md"] == edited and "notes.txt" in files and "unet/unet_ddpm_hf_0_0_1.py" not in files


def test_pushed_from_python_it_loads_everywhere(hub, at, tmp_path):
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
        loaded = at("-c", LOAD, "DiffusionPipeline", name, "main")
        assert loaded.stdout.split()[-1] == samples(pipe), loaded.stderr


def test_a_damaged_folder_is_not_published(hub, at, tmp_path):
    make("images").save_pretrained(tmp_path / "saved")
    weights = tmp_path / "saved" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    done = publish(at, tmp_path / "saved")
    assert done.returncode == 2 and "damaged" in done.stderr and not hub.repos
    done = publish(at, tmp_path / "nowhere")
    assert done.returncode == 2 and "must be the folder of a saved pipeline" in done.stderr


def test_saves_that_come_faster_than_uploads(tmp_path, monkeypatch):
    """The newest that waits is uploaded next, from the files as they were when it was saved."""
    begun, release, seen = threading.Event(), threading.Event(), []

    def slow(folder, target, message, run=None, say=None):
        begun.set()
        release.wait(20)
        seen.append((message, load_file(folder / "w.safetensors")["w"].item(), run))
        if "2" in message:
            raise OSError("no route to host")
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
