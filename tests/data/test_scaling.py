"""Scaling between data units and model units: there and back, constants, JSON, bits."""

import json

import numpy as np
import pytest
import torch

from ddpm_hf.data.scaling import EIGHT_BIT, MODEL_UNITS, Scaling, scaling_of

DATA = np.random.default_rng(0).normal([[10.0], [-3.0], [7.0]], [[2.0], [1e-3], [0.0]], size=(5, 3, 40))
LOW, HIGH = DATA.min(axis=(0, 2)), DATA.max(axis=(0, 2))


@pytest.mark.parametrize("norm", ["minmax", "meanstd"])
def test_there_and_back(norm):
    """Both maps are inverse to each other up to rounding, for arrays and tensors; a constant channel comes back too."""
    more = () if norm == "minmax" else (DATA.mean(axis=(0, 2)), DATA.std(axis=(0, 2)))
    scaling = getattr(Scaling, norm)(LOW, HIGH, *more)
    x = scaling.to_model(DATA)
    np.testing.assert_allclose(scaling.to_data(x), DATA, rtol=4 * np.finfo(float).eps)
    assert np.array_equal(scaling.to_model(torch.from_numpy(DATA)).numpy(), x)
    assert np.array_equal(scaling.to_data(torch.from_numpy(x)).numpy(), scaling.to_data(x))
    assert scaling.limit == pytest.approx(np.abs(x).max()) and scaling.constants() == {2: 7.0}
    assert (scaling.to_model(DATA + 1)[:, 2] == 0).all()  # held-out data may differ there
    if norm == "minmax":
        np.testing.assert_allclose([x.min(axis=(0, 2))[:2], x.max(axis=(0, 2))[:2]], [[-1, -1], [1, 1]], rtol=1e-12)
    else:
        np.testing.assert_allclose(x.mean(axis=(0, 2)), 0, atol=1e-12)
        np.testing.assert_allclose(x.std(axis=(0, 2))[:2], 1, rtol=1e-9)


def test_json():
    scaling = Scaling((1.5, 0.1), (2.0, 0.0))
    assert Scaling.from_json(json.loads(json.dumps(scaling.to_json()))) == scaling
    assert scaling.to_json() == {"data_shift": [1.5, 0.1], "data_scale": [2.0, 0.0]}
    assert MODEL_UNITS.to_json() == {} and scaling_of([1, 2]) is MODEL_UNITS


def test_levels_of_images():
    """All 256 levels keep the bits that every run so far was trained on."""
    levels = torch.arange(256, dtype=torch.uint8)
    x = EIGHT_BIT.to_model(levels)
    assert x.dtype == torch.float32 and torch.equal(x, levels.float() / 127.5 - 1)
    assert x[0] == -1 and x[-1] == 1 and torch.equal(EIGHT_BIT.to_data(x[None]).round()[0], levels.double())
