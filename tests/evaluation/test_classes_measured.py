"""Classes in evaluations: frequencies, metrics by class, agreement with a classifier, the held-out loss, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import simulated
from helpers import frechet_by_eigenvalues
from measuring import KnownClasses, as_samples, evaluator, grey, images

from ddpm_hf import GaussianScheduler
from ddpm_hf.data.images import ImageDataset
from ddpm_hf.data.loading import Part
from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation.classes import DataClasses, class_quota, model_classes, sample_classes
from ddpm_hf.evaluation.features import FeatureNetwork

NAMES = ("cat", "dog", "owl")
COUNTS = [6, 12, 18]
LABELS = np.repeat(np.arange(3), COUNTS)


def classes(numbers=LABELS, held_out=None, names=NAMES):
    return DataClasses(names, np.bincount(numbers, minlength=len(names)).tolist(), numbers, held_out)


def own_rows(k):
    """The numbers of the real items of class k."""
    return np.flatnonzero(np.equal(LABELS, k))


def by_class_of_images(count, seed=1):
    """Samples of each class, (3, count, 8, 8, 1) in [0, 1]: class k is at most (k + 1) thirds as bright as white."""
    return np.stack([as_samples(grey(count, seed + k)) * np.float32((k + 1) / 3) for k in range(3)])


# ---------------------------------------------------------------------------------------------
# Frequencies


def test_the_quota_is_within_one_of_the_frequencies():
    """Its sum is exact, a class without items gets nothing, and multiples of the counts are exact."""
    assert class_quota([1, 1, 1], 10).tolist() == [4, 3, 3] and class_quota([6, 12, 0, 18], 6).tolist() == [1, 2, 0, 3]
    rng = np.random.default_rng(0)
    for _ in range(200):
        counts = rng.integers(0, 50, rng.integers(1, 20))
        counts[rng.integers(len(counts))] += 1
        number = int(rng.integers(1, 500))
        quota = class_quota(counts, number)
        assert quota.sum() == number and (quota[counts == 0] == 0).all()
        assert (np.abs(quota - number * counts / counts.sum()) < 1).all()
    with pytest.raises(ValueError, match="none of them has an item"):
        class_quota([0, 0], 5)


def test_the_seed_shuffles_the_classes():
    """The same counts in another order for another seed; the order shows no class in a block."""
    first, same, other = (sample_classes(COUNTS, 72, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert np.bincount(first).tolist() == np.bincount(other).tolist() == [12, 24, 36]
    # in a random order of these counts, 61% of neighbours differ; sorted ones would differ twice
    assert (np.diff(first) != 0).sum() > 20


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_classes_do_not_depend_on_processes_or_batches(processes):
    """Each sample's class belongs to its seed, whoever draws it; all values are those of one process."""
    data = images(list(grey(36)))

    def work(accelerator):
        found = []
        for size in (3, 50):
            options = {"num_samples": 17, "batch_size": size, "metrics": ["fid", "memorization"]}
            e = evaluator(data, (1, 8, 8), None, accelerator, classes=classes(), per_class=True, **options)
            e.prepare()
            pipe = KnownClasses(by_class_of_images(17), NAMES)
            found.append((e(pipe, 5), pipe.asked))
        return found

    (values, asked), (again, asked_again) = work(None)
    assert asked == asked_again == dict(enumerate(sample_classes(COUNTS, 17, 0).tolist()))
    assert values.keys() == {"fid", "memorization", "memorization_real", *(f"fid/{name}" for name in NAMES)}
    np.testing.assert_allclose(list(again.values()), list(values.values()), rtol=1e-9)
    results = simulated(processes, work)
    for (found, asked_here), _ in results:
        np.testing.assert_allclose([found[name] for name in values], list(values.values()), rtol=1e-6)
        assert asked_here.items() <= asked.items()
    assert {k: v for result in results for k, v in result[0][1].items()} == asked


# ---------------------------------------------------------------------------------------------
# Metrics by class


def test_each_class_of_images_is_measured_against_its_own(tmp_path):
    """By the formula from features of its samples and of its real images, also from the cache and with bad images."""
    real = grey(36)
    samples = by_class_of_images(30)
    options = {"num_samples": 30, "cache_dir": str(tmp_path), "metrics": ["fid"], "on_bad_image": "skip"}
    e = evaluator(images(list(real)), (1, 8, 8), classes=classes(), per_class=True, **options)
    e.prepare()
    values = e(KnownClasses(samples, NAMES), 5)
    assert values["fid"] != values["fid/owl"] and len(values) == 4
    network, asked = FeatureNetwork("pixels"), sample_classes(COUNTS, 30, 0)
    for k, name in enumerate(NAMES):
        own = (samples[k][asked == k] * 255).round().astype(np.uint8)
        a, b = (network(x).double().numpy() for x in (own, real[own_rows(k)][..., None]))
        expected = frechet_by_eigenvalues(a.mean(0), np.cov(a.T), b.mean(0), np.cov(b.T))
        # fewer samples than dimensions: rounding leaves up to sqrt(eps) of the largest root in each of the 192
        assert values[f"fid/{name}"] == pytest.approx(expected, rel=192 * np.finfo(float).eps ** 0.5)
    assert len(list(tmp_path.iterdir())) == 4
    again = evaluator(images(list(real)), (1, 8, 8), classes=classes(), per_class=True, **options)
    again.prepare()
    assert again(KnownClasses(samples, NAMES), 5) == values
    damaged = [b"damaged" if i in (0, 35) else image for i, image in enumerate(real)]
    for _ in range(2):  # computed, then from the cache
        e = evaluator(images(damaged), (1, 8, 8), classes=classes(), per_class=True, **options)
        e.prepare()
        assert [e.by_class.sizes(name)["num_real"] for name in NAMES] == [5, 12, 17]
        found = e(KnownClasses(samples, NAMES), 5)
        assert found["fid/dog"] == values["fid/dog"] and found["fid/cat"] != values["fid/cat"]


def test_each_class_of_sequences_is_measured_in_its_own_units():
    """Samples are the real items of their class, shifted by c: the covariances agree, and the Fréchet distance is the
    squared shift in units of the class' deviation, length times: 8 (c / s)^2."""
    names = ["cat", "held_out", "owl"]  # a class may have the name of a metric
    rng = np.random.default_rng(0)
    real = rng.normal(size=(36, 1, 8)) * (1 + LABELS)[:, None, None]
    quota = class_quota(COUNTS, 36)
    asked = sample_classes(COUNTS, 36, 0)
    samples = np.zeros((3, 36, 1, 8))
    for k in range(3):
        assert quota[k] == COUNTS[k]
        samples[k, asked == k] = real[own_rows(k)] + 0.5 * (k + 1)
    e = evaluator(
        SequenceDataset(real), (1, 8), classes=classes(names=names), per_class=True, num_samples=36, metrics=["frechet"]
    )
    e.prepare()
    values = e(KnownClasses(samples, names), 5)
    for k, name in enumerate(names):
        spread = real[own_rows(k)].std(ddof=1)
        assert values[f"frechet/{name}"] == pytest.approx(8 * (0.5 * (k + 1) / spread) ** 2, rel=1e-5)
    records = {(r["metric"], r.get("class")): r for r in e.records(values, KnownClasses(samples, names), 5, 2.0)}
    own = records["frechet", "held_out"]
    assert (own["num_samples"], own["num_real"], own["guidance_scale"]) == (12, 12, 2.0)
    assert own["class_labels"] == "frequencies of the data, shuffled by the seed" and own["num_classes"] == 3
    assert records["frechet", None]["num_samples"] == 36
    assert "frechet/owl" in e.describe(values) and "from 18 samples" in e.describe(values)


# ---------------------------------------------------------------------------------------------
# Agreement with a classifier


class Brightness(torch.nn.Module):
    """Takes an image, or a sequence, with a mean below 1/3, below 2/3 or above for one of class 0, 1 or 2."""

    def forward(self, x):
        centres = torch.tensor([1.0, 3.0, 5.0]) / 6
        return -(x.flatten(1).mean(dim=1, keepdim=True) - centres).abs()


@pytest.fixture
def classifier(tmp_path):
    torch.jit.script(Brightness()).save(tmp_path / "classifier.pt")
    return str(tmp_path / "classifier.pt")


@pytest.mark.parametrize("kind", ["images", "sequences"])
def test_agreement(kind, classifier):
    """1 if each sample is of the class that it was asked for; the share of one class if all samples are of that one.
    The model counts the classes in another order than the data."""
    shape = (1, 8, 8) if kind == "images" else (1, 8)
    form = (8, 8, 1) if kind == "images" else (1, 8)  # as a pipeline returns them
    levels = (np.arange(3) * 2 + 1) / 6
    right = np.broadcast_to(levels.reshape(3, 1, *(1,) * len(form)), (3, 20, *form)).astype(np.float32)
    real = (
        images(list(grey(36)))
        if kind == "images"
        else SequenceDataset(np.random.default_rng(0).normal(size=(36, 1, 8)))
    )
    options = {"num_samples": 20, "metrics": ["memorization"], "classifier": classifier, "classes": classes()}
    e = evaluator(real, shape, **options)
    e.prepare()
    order = ("owl", "cat", "dog")
    pipe = KnownClasses(right, order)
    e.check(pipe)
    values = e(pipe, 5)
    assert values["class_agreement"] == 1
    record = next(r for r in e.records(values, pipe, 5) if r["metric"] == "class_agreement")
    assert record["classifier"] == "classifier.pt" and record["guidance_scale"] == 1
    blind = KnownClasses(np.stack([right[2]] * 3), order)  # always dogs
    assert e(blind, 5)["class_agreement"] == class_quota(COUNTS, 20)[1] / 20


class Sum(torch.nn.Module):
    def forward(self, x):
        return x.sum(dim=1)


def test_classifiers_that_do_not_fit(tmp_path, classifier):
    torch.jit.script(Sum()).save(tmp_path / "sum.pt")
    torch.jit.script(torch.nn.Linear(5, 3)).save(tmp_path / "linear.pt")
    (tmp_path / "text.pt").write_text("no network")
    data, pipe = images(list(grey(36))), KnownClasses(by_class_of_images(4), NAMES)
    for name, message in (
        ("sum.pt", r"must return \(B, 3\), one value for each class of the model; got \(2, 8, 8\) for B = 2"),
        ("linear.pt", r"must take float32 \(B, 1, 8, 8\): .*"),
        ("text.pt", "is not a TorchScript file"),
        ("none.pt", "there is no file .*none.pt"),
    ):
        e = evaluator(data, (1, 8, 8), num_samples=4, classifier=str(tmp_path / name), classes=classes())
        with pytest.raises(ValueError, match=message):
            e.check(pipe)
    four = KnownClasses(by_class_of_images(4), (*NAMES, "yak"))
    e = evaluator(data, (1, 8, 8), num_samples=4, classifier=classifier, classes=classes())
    with pytest.raises(ValueError, match=r"must return \(B, 4\)"):
        e.check(four)


# ---------------------------------------------------------------------------------------------
# The held-out loss


def test_the_held_out_loss_knows_the_classes():
    """A model that predicts its class' number has the loss mean((number - noise)^2), and no other class' loss."""
    held, labels = images(list(grey(5, seed=7))), np.array([0, 2, 1, 1, 0])
    e = evaluator(images(list(grey(36))), (1, 8, 8), held, metrics=["held_out_loss"], classes=classes(held_out=labels))
    order = ("owl", "cat", "dog")  # the model's numbers of cat, dog and owl are 1, 2 and 0
    pipe = KnownClasses(by_class_of_images(4), order)
    pipe.unet.forward = lambda x, t, class_labels: SimpleNamespace(
        sample=torch.ones_like(x) * class_labels[:, None, None, None]
    )
    value = e(pipe, 5, GaussianScheduler(prediction_type="epsilon"))["held_out_loss"]
    numbers, edges, expected = [1, 0, 2, 2, 1], range(0, 1001, 100), []
    for bucket, low in enumerate(edges[:-1]):
        noise = e.held_out._draws(range(5), bucket, low, low + 100, torch.zeros(5, 1, 8, 8))[1]
        expected += [((n - noise[i].double()) ** 2).mean().item() for i, n in enumerate(numbers)]
    assert value == pytest.approx(np.mean(expected), rel=1e-6)


# ---------------------------------------------------------------------------------------------
# What does not fit


def test_classes_of_the_model_are_found_by_name_or_number():
    pipe = KnownClasses(by_class_of_images(4), ("owl", "cat", "dog"))
    assert model_classes(pipe, NAMES) == [1, 2, 0] and model_classes(pipe, ("dog",)) == [2]
    with pytest.raises(ValueError, match="the data has the class yak, which.*classes are owl, cat, dog"):
        model_classes(pipe, ("cat", "yak"))
    pipe.config.id2label = None
    assert model_classes(pipe, ("0", "1")) == [0, 1]
    with pytest.raises(ValueError, match="the data has 4 classes, and the pipeline's model knows 3"):
        model_classes(pipe, ("a", "b", "c", "d"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_class": True, "classes": None}, "per_class needs data with classes"),
        ({"per_class": True, "num_samples": 7}, "got 1 of class cat of 7 samples: num_samples must be"),
        ({"per_class": True, "classes": classes(np.array([0] * 3 + [1] * 20 + [2] * 13))},
         "at least 4 real items of each class; got 3 of class cat"),
        ({"guidance_interval": (0.5, 0.2)}, r"two ascending numbers in \[0, 1\], got \(0.5, 0.2\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_by_class(options, message):
    with pytest.raises(ValueError, match=message):
        evaluator(images(list(grey(36))), (1, 8, 8), **{"num_samples": 40, "classes": classes(), **options})


def test_pipelines_that_do_not_fit(classifier):
    data = images(list(grey(36)))
    conditional = KnownClasses(by_class_of_images(4), NAMES)
    with pytest.raises(ValueError, match="class_labels must name the classes of the data"):
        evaluator(data, (1, 8, 8), num_samples=4).check(conditional)
    plain = KnownClasses(by_class_of_images(4), None)
    evaluator(data, (1, 8, 8), num_samples=4, classes=classes()).check(plain)
    for options, scale, message in (
        ({}, 2.0, "guidance_scale needs a pipeline whose model has classes.*got 2.0"),
        ({"per_class": True}, 1.0, "per_class needs a pipeline whose model has classes"),
        ({"classifier": classifier}, 1.0, "classifier needs a pipeline whose model has classes"),
    ):
        e = evaluator(data, (1, 8, 8), num_samples=40, classes=classes(), **options)
        with pytest.raises(ValueError, match=message):
            e.check(plain, [scale])


def test_guidance_reaches_the_pipeline():
    pipe = KnownClasses(by_class_of_images(6), NAMES)
    e = evaluator(
        images(list(grey(36))), (1, 8, 8), num_samples=6, metrics=["memorization"], classes=classes(),
        guidance_interval=(0.1, 0.8),
    )  # fmt: skip
    e.prepare()
    e(pipe, 5, guidance_scale=3.0)
    assert pipe.guidance == {"guidance_scale": 3.0, "guidance_interval": (0.1, 0.8)}


def test_labels_of_a_dataset_and_its_parts():
    data = ImageDataset(list(grey(6)), (8, 8), 1, labels=["b", "a", "b", "c", "a", "b"])
    found = DataClasses.of(data.labels, Part(data, [0, 1, 5]), Part(data, [3]))
    assert found.names == ("a", "b", "c") and found.counts == [1, 2, 0]
    assert found.numbers.tolist() == [1, 0, 1] and found.held_out.tolist() == [2]
    assert DataClasses.of(None, data) is None
