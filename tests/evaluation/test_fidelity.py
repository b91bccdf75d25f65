"""Precision, recall, density and coverage: brute force, modes left out and copied, identical sets, processes, cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import simulated
from measuring import Known, KnownClasses, as_samples, evaluator, grey, images
from scipy.spatial.distance import cdist
from torch import nn

from ddpm_hf.data.sequences import SequenceDataset
from ddpm_hf.evaluation import fidelity, pictures
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.features import FeatureNetwork
from ddpm_hf.evaluation.fidelity import Fidelity
from ddpm_hf.evaluation.metrics import frechet_distance
from ddpm_hf.evaluation.settings import FIDELITY
from ddpm_hf.evaluation.shares import Shares

ALL = list(FIDELITY)


def directly(real, fake, near=3, dense=5):
    """The definitions of both papers, by all distances, computed from differences."""
    between = cdist(real, fake)
    radii = {(name, k): np.sort(cdist(x, x), axis=1)[:, k]  # place 0 is the row itself
             for name, x in (("real", real), ("fake", fake)) for k in (near, dense)}  # fmt: skip
    return {
        "precision": (between <= radii["real", near][:, None]).any(axis=0).mean(),
        "recall": (between <= radii["fake", near]).any(axis=1).mean(),
        "density": (between < radii["real", dense][:, None]).sum() / dense / len(fake),
        "coverage": (between.min(axis=1) <= radii["real", dense]).mean(),
    }


def fitted(real, fake, accelerator=None, neighbours=None):
    shares = Shares(accelerator) if accelerator else evaluator(SequenceDataset(np.zeros((4, 1, 2))), (1, 2)).shares
    return Fidelity(real, shares, neighbours).values(fake, ALL)


@pytest.mark.parametrize("block", [2**24, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_they_are_the_definitions(dtype, block, monkeypatch):
    """Sets that overlap in part, far from 0 and with copies of real rows, in one and in many blocks, with the k of the
    papers and another: shares of equal counts, so equal but for the rounding of a mean."""
    monkeypatch.setattr(fidelity, "BLOCK", block)
    rng = np.random.default_rng(0)
    real, fake = 100 + rng.normal(size=(90, 6)), 100.9 + 0.8 * rng.normal(size=(70, 6))
    fake[:20], real[80:] = real[:20], real[:10]
    real, fake = real.astype(dtype), fake.astype(dtype)
    expected = directly(real, fake)
    assert all(0.2 < expected[name] < 0.95 for name in ALL if name != "density"), expected
    for values in simulated(3, lambda accelerator: fitted(real, fake, accelerator)):
        assert values == pytest.approx(expected, rel=1e-12)
    assert fitted(real, fake, neighbours=7) == pytest.approx(directly(real, fake, 7, 7), rel=1e-12)


def test_a_large_number_that_all_rows_share_changes_nothing():
    """It would drown the differences in the rounding of products (relative to 2^60, 2^-53 is 128)."""
    rng = np.random.default_rng(0)
    real, fake = 2.0**30 + rng.normal(size=(90, 6)), 2.0**30 + 0.5 + 0.8 * rng.normal(size=(70, 6))
    fake[:20] = real[:20]
    assert fitted(real, fake) == pytest.approx(directly(real, fake), rel=1e-12)


def modes(counts, seed):
    """Rows of the Gaussian modes of the given sizes, which are far from each other."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(size=(count, 4)) + 1000 * i for i, count in enumerate(counts)])


def test_a_mode_left_out_and_a_mode_copied():
    """Of four modes of 50 real rows, samples are those of three: a quarter is missing in recall and coverage, and
    precision stays. One row of the fourth mode copied often: it is covered by as many balls as reach to that row, and
    recalled by none of them, for its copies have balls of radius 0. A mode that is not in the data takes its share of
    precision and density."""
    real = modes((50,) * 4, 0)
    assert fitted(real, real[:150])["coverage"] == 0.75 == fitted(real, real[:150])["recall"]
    other = modes((50,) * 3, 1)
    found = fitted(real, other)
    assert found["recall"] <= 0.75 and found["coverage"] <= 0.75 and found["precision"] > 0.8
    whole = fitted(real, modes((50,) * 4, 1))
    assert found["coverage"] == pytest.approx(0.75 * whole["coverage"], abs=0.03)
    assert found["recall"] == pytest.approx(0.75 * whole["recall"], abs=0.03)
    collapsed = np.concatenate((real[:150], real[150:151].repeat(50, 0)))
    values = fitted(real, collapsed)
    distances = cdist(real[150:], real[150:])
    reaching = (distances[:, 0] <= np.sort(distances, axis=1)[:, 5]).sum()
    assert values["coverage"] == (150 + reaching) / 200 and values["recall"] == 151 / 200 and values["precision"] == 1
    beside = fitted(real, np.concatenate((real[:150], real[150:] + 5000)))
    assert beside["precision"] == 0.75 and beside["density"] == pytest.approx(0.75 * 1)


@pytest.mark.parametrize("copies", [1, 4, 8])
def test_identical_sets_are_perfect(copies):
    """Also where rows come so often that their balls have radius 0: copies are in them."""
    rows = np.random.default_rng(0).normal(size=(40, 7)).repeat(copies, 0) + 50
    values = fitted(rows, rows[::-1].copy())
    assert values["precision"] == values["recall"] == values["coverage"] == 1
    assert copies > 1 or values["density"] == pytest.approx(1, rel=1e-12)


class Own(nn.Module):
    """Features of a user: means of the rows of a picture."""

    def forward(self, x):
        return x.mean(dim=3).flatten(1)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    file = tmp_path_factory.mktemp("network") / "own.pt"
    torch.jit.script(Own()).save(str(file))
    return str(file)


@pytest.mark.parametrize("kind", ["pixels", "own"])
def test_of_pictures_on_any_number_of_processes(kind, network, tmp_path, monkeypatch):
    """In the features that the user names; the radii of the real pictures are computed once, and found in the cache,
    also where there are more pictures than KID keeps."""
    real, fake = grey(40), np.concatenate((grey(10), grey(20, seed=1)))
    options = {"feature_network": network, "feature_resolution": 8} if kind == "own" else {}
    features = FeatureNetwork(options.get("feature_network", "pixels"), 8)
    expected = directly(*(features(x[..., None]).numpy().astype(np.float64) for x in (real, fake)))
    calls = []
    radii = fidelity.shared_radii
    monkeypatch.setattr(fidelity, "shared_radii", lambda x, k, shares: calls.append(len(x)) or radii(x, k, shares))
    monkeypatch.setattr(pictures, "KID_FEATURES", 30)

    def work(accelerator):
        folder = tmp_path / str(accelerator.num_processes)
        e = evaluator(images(list(real)), (1, 8, 8), None, accelerator, num_samples=30, metrics=ALL,
                      cache_dir=str(folder), **options)  # fmt: skip
        e.prepare()
        pipe = Known(as_samples(fake), (1, 8, 8))
        return [e(pipe, 5), e(pipe, 6)]

    for processes in (1, 2):
        for values in simulated(processes, work):
            assert values[0] == values[1] == pytest.approx(expected, rel=1e-12)
    calls.clear()
    (again,) = simulated(1, work)
    assert again[0] == pytest.approx(expected, rel=1e-12) and calls == [30, 30]  # of the samples alone


class OfSequences(nn.Module):
    """Features of a user: the mean, the squared deviation and the last value of each channel."""

    def forward(self, x):
        return torch.cat((x.mean(2), x.var(2), x[..., -1]), 1)


@pytest.fixture(scope="module", params=["pt", "pt2"])
def of_sequences(request, tmp_path_factory):
    file = str(tmp_path_factory.mktemp("sequences") / f"own.{request.param}")
    if request.param == "pt":
        torch.jit.script(OfSequences()).save(file)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(OfSequences(), (torch.zeros(2, 2, 6),), dynamic_shapes=shapes), file)
    return file


def test_of_sequences_in_features_that_the_user_names(of_sequences):
    """In the units of the data, on any number of processes, and by class; a copy of the data has 1 in all four."""
    rng = np.random.default_rng(0)
    real, fake = (7 + spread * rng.normal(size=(40, 2, 6)) for spread in (3, 2))
    labels = np.arange(40) % 2
    options = {"num_samples": 40, "metrics": [*ALL, "feature_frechet"], "feature_network": of_sequences,
               "per_class": True, "classes": DataClasses(("a", "b"), [20, 20], labels, None)}  # fmt: skip

    def values(accelerator, samples=fake):
        e = evaluator(SequenceDataset(real), (2, 6), accelerator=accelerator, **options)
        e.prepare()
        found = e(KnownClasses(np.stack((samples, samples)), ("a", "b")), 5)
        return found, e.sampling.asked, e.records(found, KnownClasses(np.stack((samples, samples)), ("a", "b")), 5)

    ((found, asked, records),) = simulated(1, values)
    x, y = (OfSequences()(torch.from_numpy(v).float()).double().numpy() for v in (real, fake))
    for name, rows, own in (("", slice(None), slice(None)), ("/b", labels == 1, asked == 1)):
        assert {m: found[m + name] for m in ALL} == pytest.approx(directly(x[rows], y[own]), rel=1e-4)
        assert found["feature_frechet" + name] == pytest.approx(frechet_distance(x[rows], y[own]), rel=1e-4)
    # simulated processes are threads, of which only one at a time can read a file of torch.export
    for shared, _, _ in simulated(2 if of_sequences.endswith(".pt") else 1, values):
        assert shared == pytest.approx(found, rel=1e-9)
    data = SequenceDataset(real)
    copied, _, _ = values(None, data.scaling.to_data(torch.stack(list(data)).double()).numpy())
    assert all(copied[m] == 1 for m in ALL) and copied["feature_frechet"] == pytest.approx(0, abs=1e-6)
    assert {record["feature_network"] for record in records} == {Path(of_sequences).name}


def test_feature_networks_of_sequences_that_do_not_fit(of_sequences, tmp_path):
    data, options = SequenceDataset(np.random.default_rng(0).normal(size=(40, 2, 6))), {"num_samples": 40}
    with pytest.raises(ValueError, match="feature_frechet needs feature_network, the file of .*got 'pixels'"):
        evaluator(data, (2, 6), metrics=["feature_frechet"], **options)
    options |= {"metrics": ALL}
    with pytest.raises(ValueError, match="a TorchScript or torch.export file; there is no file none.pt2"):
        evaluator(data, (2, 6), feature_network="none.pt2", **options)
    for name, kind in (("text.pt", "TorchScript"), ("text.pt2", "torch.export")):
        (tmp_path / name).write_text("no")
        with pytest.raises(ValueError, match=f"is not a {kind} file"):
            evaluator(data, (2, 6), feature_network=str(tmp_path / name), **options)
    torch.export.save(torch.export.export(OfSequences(), (torch.zeros(2, 2, 6),)), str(tmp_path / "two.pt2"))
    with pytest.raises(ValueError, match=r"must take float32 \(B, 2, 6\), for any B"):
        evaluator(data, (2, 6), feature_network=str(tmp_path / "two.pt2"), **options)


def test_of_sequences_and_by_class():
    """In units of the real data; a class has the value of its own samples and items, whose number must suffice."""
    rng = np.random.default_rng(0)
    real, fake = 7 + 3 * rng.normal(size=(40, 2, 6)), 7 + 2 * rng.normal(size=(40, 2, 6))
    labels = np.arange(40) % 2
    data_classes = DataClasses(("a", "b"), [20, 20], labels, None)
    options = {"num_samples": 40, "metrics": ALL, "per_class": True, "classes": data_classes}
    e = evaluator(SequenceDataset(real), (2, 6), **options)
    e.prepare()
    values = e(KnownClasses(np.stack((fake, fake)), ("a", "b")), 5)
    real = real.astype(np.float32).astype(np.float64)
    for name, rows, own in (("", slice(None), slice(None)), ("/a", labels == 0, e.sampling.asked == 0)):
        mean, spread = (f(real[rows], axis=(0, 2), keepdims=True) for f in (np.mean, np.std))
        x, y = (((v - mean) / spread).reshape(-1, 12) for v in (real[rows], fake[own]))
        assert {m: values[m + name] for m in ALL} == pytest.approx(directly(x, y), rel=1e-9)
    for wrong, message in (
        ({"num_samples": 5}, "num_samples must be at least 6 for the metric coverage.*got 5"),
        ({"num_neighbours": 40}, "num_samples must be at least 41"),
        ({"num_samples": 10, "num_neighbours": 5}, "per_class needs at least 6 samples of each class.*about 12"),
        ({"num_neighbours": 0}, "num_neighbours must be at least 1, got 0"),
        ({"num_neighbours": 2, "metrics": ["frechet"]}, "applies to the metrics precision, recall.*got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator(SequenceDataset(real), (2, 6), **{**options, **wrong})
    with pytest.raises(ValueError, match="at least 6 real items, the data has 5"):
        evaluator(SequenceDataset(real[:5]), (2, 6), num_samples=40, metrics=ALL)
    assert not set(ALL) & set(evaluator(SequenceDataset(real), (2, 6)).metrics)  # computed if they are named
