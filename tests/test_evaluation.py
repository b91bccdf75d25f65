"""Metrics of pipelines: true values for known generators, one answer on any number of processes, cache, program."""

import json
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from cleanfid.fid import frechet_distance as clean_fid_frechet
from conftest import ROOT, load_program, run_program
from PIL import Image
from test_trainer import SMALL, config, metrics

from ddpm_hf import DDPMPipeline, DDPMPipeline1D, GaussianScheduler, UNet1D, train
from ddpm_hf.data import ImageDataset, digits
from ddpm_hf.evaluation import EvalSettings, Evaluator
from ddpm_hf.features import FeatureNetwork
from ddpm_hf.sequences import SequenceDataset
from ddpm_hf.stream import hold_out

EVALUATE = ROOT / "training" / "evaluate.py"
evaluate_script = load_program("evaluate")
PIXELS = {"feature_network": "pixels", "batch_size": 50}


class Known:
    """A pipeline whose samples are known: for generator i, what `samples[i]` is (by the seeds that it is given)."""

    device = torch.device("cpu")
    scheduler = GaussianScheduler()

    def __init__(self, samples, shape):
        self.samples, self.asked = samples, 0
        self.unet = UNet1D(sample_size=8, dim=8, dim_mults=[1]).eval()
        self.unet.forward = lambda x, t: type("Out", (), {"sample": x})

    def __call__(self, batch_size, generator, **_):
        assert len({g.initial_seed() for g in generator}) == batch_size
        part = self.samples[self.asked : self.asked + batch_size]
        self.asked += batch_size
        return (part,)


def evaluator(dataset, shape, held_out=None, **options):
    return Evaluator(Accelerator(cpu=True), dataset, shape, EvalSettings(**{**PIXELS, **options}), held_out)


def measure(dataset, shape, samples, **options):
    e = evaluator(dataset, shape, num_samples=len(samples), **options)
    e.prepare()
    return e(Known(samples, shape), 5)


def test_fid_and_kid_are_clean_fids(tmp_path):
    """Of 8-bit samples and un-augmented real pictures, each once."""
    arrays = np.random.default_rng(0).integers(0, 256, (150, 8, 8, 3), dtype=np.uint8)
    real, fake = arrays[:90], arrays[90:] // 2
    data = ImageDataset(list(real), (8, 8), 3, center_crop=False, random_flip=True)
    options = {"cache_dir": str(tmp_path), "metrics": ["fid", "kid"]}
    # off the 8-bit grid by less than half a level: rounded as pictures are
    values = measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options)
    network = FeatureNetwork("pixels")
    a, b = (network(x).double().numpy() for x in (real, fake))
    expected = clean_fid_frechet(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
    # fewer samples than dimensions: the matrix root of clean-fid is of singular matrices, and exact to some 1e-4
    assert values["fid"] == pytest.approx(expected, rel=1e-3)
    x, y = a / np.sqrt(192), b / np.sqrt(192)
    kernel = [(u @ v.T + 1) ** 3 for u, v in ((x, x), (y, y), (x, y))]
    off = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    full = sum(off) - 2 * kernel[2].mean()
    # subsets of all 60 samples and 60 of 90 real ones estimate the whole without bias
    assert values["kid"] == pytest.approx(full, rel=0.05)
    (file,) = tmp_path.iterdir()
    written = file.stat().st_mtime_ns
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values and file.stat().st_mtime_ns == written
    file.write_bytes(b"damaged")
    assert measure(data, (3, 8, 8), fake / 255 + 0.4 / 255, **options) == values


def test_the_cache_is_of_these_pictures(tmp_path):
    """Another file, another number of items or another network is another key."""
    for i in range(8):
        Image.fromarray(np.full((8, 8), 30 * i, np.uint8)).save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(8)]

    def key(sources, **options):
        e = evaluator(ImageDataset(sources, (8, 8), 1), (1, 8, 8), **options)
        return e._cache_file()

    keys = [key(paths), key(paths[:7]), key(paths, num_real=7)]
    Image.fromarray(np.full((8, 8), 31, np.uint8)).save(paths[3])
    keys.append(key(paths))
    assert len(set(keys)) == 4 and key(paths) == keys[-1]
    assert evaluator(list(digits()), (1, 8, 8))._cache_file() is None  # a data set without a mark of its own


def test_sequences_are_compared_in_their_own_units():
    """Real sequences N(7, 3^2) in data units; samples N(7 + 3, 3^2): in units of the real deviation the mean is off by
    1 at each of 8 places. The Fréchet distance of the true distributions is 8; its bias and deviation at 4,000 samples
    of 8 dimensions are below 0.3."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(7, 3, (4000, 1, 8)), rng.normal(10, 3, (4000, 1, 8))
    values = measure(SequenceDataset(real), (1, 8), fake)
    assert values["frechet"] == pytest.approx(8, abs=0.3)
    # (w . delta)^2 averages to |delta|^2 / D = 1 over directions
    assert values["sliced_wasserstein"] == pytest.approx(1, abs=0.15)
    assert values["autocorrelation_error"] < 0.03
    same = measure(SequenceDataset(real), (1, 8), rng.normal(7, 3, (4000, 1, 8)))
    assert same["frechet"] < 0.03 and same["spectral_frechet"] < 0.03 and same["sliced_wasserstein"] < 0.1
    # two binomial shares; five deviations
    assert abs(same["memorization"] - same["memorization_real"]) < 5 * (2 * 0.25 / 4000) ** 0.5
    assert measure(SequenceDataset(real), (1, 8), real[:100], metrics=["memorization"])["memorization"] == 1


def test_held_out_loss_of_a_model_that_says_nothing():
    """A model that gives 0 for epsilon has the loss E|epsilon|^2 = 1 at every timestep: 80 items x 64 numbers, 5
    deviations of a mean of squared normals."""
    data = list(torch.randn(100, 1, 8, 8).clamp(-1, 1))
    rest, held = hold_out(data, 80, 0)
    pipeline = Known([], (1, 8, 8))
    pipeline.unet.forward = lambda x, t: type("Out", (), {"sample": torch.zeros_like(x)})
    values = evaluator(rest, (1, 8, 8), held, metrics=["held_out_loss"])(
        pipeline, 5, GaussianScheduler(prediction_type="epsilon")
    )
    assert len(values) == 11
    np.testing.assert_allclose(list(values.values()), 1, atol=5 * np.sqrt(2 / (80 * 64)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["frechet"]}, "metrics of images are fid, kid.*got frechet"),
        ({"metrics": ["held_out_loss"]}, "holdout of at least 1"),
        ({"num_samples": 1}, "at least 2, got 1"),
        ({"feature_network": "nothing.pt"}, "nothing.pt is no file"),
    ],
)
def test_what_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        evaluator(digits(), (1, 8, 8), **options)


EVALUATED = {
    "eval_steps": 2, "eval_num_samples": 20, "feature_network": "pixels", "holdout": 40, "max_train_steps": 5,
    "learning_rate": 1e-2,
}  # fmt: skip


def test_in_training(tmp_path):
    """Every second step and the last; the best is kept, and the newest lies with the pipeline."""
    train(config(tmp_path / "run", eval_cache_dir=str(tmp_path / "cache"), **EVALUATED))
    found = [record for record in metrics(tmp_path / "run") if "eval/fid" in record]
    assert [record["step"] for record in found] == [2, 4, 5] and found[0]["eval/num_samples"] == 20
    best = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    lowest = min(found, key=lambda record: record["eval/fid"])
    assert best[0]["metric"] == "fid" and best[0]["value"] == lowest["eval/fid"] and best[0]["step"] == lowest["step"]
    newest = json.loads((tmp_path / "run" / "pipeline" / "evaluation.json").read_text())
    assert {r["step"] for r in newest} == {5} and {r["num_samples"] for r in newest} == {20}
    assert DDPMPipeline.from_pretrained(tmp_path / "run" / "best")(num_inference_steps=2).images
    with pytest.raises(ValueError, match="metric_for_best must be one of.*got 'frechet'"):
        train(config(tmp_path / "other", metric_for_best="frechet", **EVALUATED))
    with pytest.raises(ValueError, match="none.pt is no file"):
        train(config(tmp_path / "other", **{**EVALUATED, "feature_network": "none.pt"}))
    assert not (tmp_path / "other").exists()


def test_evaluation_changes_nothing_else(tmp_path):
    """The losses of a run are the same with and without it."""
    options = {**EVALUATED, "eval_cache_dir": str(tmp_path / "cache"), "dropout": 0.1}
    train(config(tmp_path / "with", **options))
    train(config(tmp_path / "without", **{**options, "eval_steps": 0}))
    losses = [[r["loss"] for r in metrics(tmp_path / run) if "loss" in r] for run in ("with", "without")]
    assert losses[0] == losses[1]


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    """A trained pipeline of 32 samples of the ECG."""
    folder = tmp_path_factory.mktemp("evaluated")
    train(config(folder / "run", dataset_name="ecg", max_train_steps=3, sequence_length=32))
    return folder / "run" / "pipeline"


def test_the_program(sequences, capsys):
    command = ["--pipeline", str(sequences), "--data", "ecg", "--stride=2", "--num_samples=20"]
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    out = capsys.readouterr().out
    assert "warning: below 10,000 samples" in out and "from 20 samples" in out
    records = json.loads((sequences / "evaluation.json").read_text())
    assert {r["num_inference_steps"] for r in records} == {2, 4} and {r["data"] for r in records} == {"ecg"}
    with Image.open(sequences / "steps-versus-metric.png") as picture:
        assert picture.width > 1000
    assert evaluate_script.main([*command, "--sampler=DPMSolverMultistepScheduler", "--num_inference_steps=2"]) == 0
    both = json.loads((sequences / "evaluation.json").read_text())
    assert both[: len(records)] == records and both[-1]["scheduler"] == "DPMSolverMultistepScheduler"
    assert evaluate_script.main([*command, "--num_inference_steps", "2", "4"]) == 0
    assert len(json.loads((sequences / "evaluation.json").read_text())) == len(both)  # again is not more
    assert evaluate_script.main([*command, "--sampler=fast", "--num_inference_steps=2"]) == 0
    fast = json.loads((sequences / "evaluation.json").read_text())[-1]
    assert fast["scheduler"] == "DPMSolverMultistepScheduler at log_snr_timesteps"
    assert DDPMPipeline1D.from_pretrained(sequences)(num_inference_steps=2).sequences.shape == (1, 1, 32)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--num_inference_steps=2000", "1 to 1000, got [2000]"),
        ("--sampler=Nothing", "got 'Nothing'"),
        ("--data=digits", "the data has (1, 8, 8)"),
        ("--pipeline=.", "the pipeline '.' cannot be loaded"),
        ("--metrics=fid", "metrics of sequences are"),
        ("--data=", "--data must be given"),
    ],
)
def test_what_the_program_refuses(option, message, sequences, capsys):
    name = option.split("=")[0]
    others = {"--pipeline": sequences, "--data": "ecg"}
    command = [f"{key}={value}" for key, value in others.items() if key != name]
    assert evaluate_script.main([*command, option]) == 2
    assert message in capsys.readouterr().err


def test_results_of_something_else_are_left(sequences, tmp_path, capsys):
    (tmp_path / "evaluation.json").write_text("mine")
    assert evaluate_script.main([f"--pipeline={sequences}", "--data=ecg", f"--output_dir={tmp_path}"]) == 2
    assert "is left as it is" in capsys.readouterr().err and (tmp_path / "evaluation.json").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="gloo over processes is tested on Linux")
def test_two_processes_measure_what_one_does(tmp_path):
    """The same samples and data, in batches of other sizes, whose rounding is other: to 1e-4."""
    train(config(tmp_path / "run", max_train_steps=3, **{**SMALL, "num_samples": 4}))
    values = []
    for processes in (1, 2):
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        done = run_program(
            *launcher, EVALUATE, "--pipeline=run/pipeline", "--data=digits", "--feature_network=pixels",
            "--num_samples=31", "--holdout=51", f"--output_dir=out{processes}", f"--eval_cache_dir=cache{processes}",
            cwd=tmp_path, ACCELERATE_USE_CPU="1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        records = json.loads((tmp_path / f"out{processes}" / "evaluation.json").read_text())
        values.append({record["metric"]: record["value"] for record in records})
    assert values[0].keys() == values[1].keys() and len(values[0]) == 4 + 11
    np.testing.assert_allclose(list(values[0].values()), list(values[1].values()), rtol=1e-4)
