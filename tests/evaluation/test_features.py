"""Feature networks: pixels, TorchScript files, clean-fid's Inception or what is said where it is missing."""

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer
from torch import nn

from ddpm_hf.evaluation import features
from ddpm_hf.evaluation.features import FeatureNetwork


class Small(nn.Module):
    def forward(self, x):
        return torch.stack((x.mean(dim=(1, 2, 3)), x.amax(dim=(1, 2, 3)), x[:, 0, 0, 0]), dim=1)[..., None, None]


@pytest.fixture
def small(tmp_path):
    torch.jit.script(Small()).save(str(tmp_path / "small.pt"))
    return str(tmp_path / "small.pt")


def pictures(channels=3, side=16, count=4):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def test_pixels_are_the_picture():
    x = pictures(side=8)
    found = FeatureNetwork("pixels")(x)
    np.testing.assert_allclose(found.numpy(), np.moveaxis(x, -1, 1).reshape(4, -1) / 255, atol=1e-6)


def test_a_torchscript_network_sees_clean_fids_resizing(small):
    network = FeatureNetwork(small, 299)
    assert network.dimensions == 3
    x = pictures()
    expected = np.stack([build_resizer("clean")(image) for image in x])
    found = network(x)
    np.testing.assert_allclose(found[:, 0], expected.mean(axis=(1, 2, 3)), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 2], expected[:, 0, 0, 0])
    assert network.digest != FeatureNetwork(small, 64).digest != FeatureNetwork("pixels").digest


def test_grey_and_transparent_pictures():
    network = FeatureNetwork("pixels")
    grey = pictures(1, 8)
    torch.testing.assert_close(network(grey), network(grey.repeat(3, axis=3)))
    clear = pictures(4, 8)
    clear[..., 3] = 0
    assert (network(clear) == 1).all()
    clear[..., 3] = 255
    torch.testing.assert_close(network(clear), network(clear[..., :3]))
    for wrong in (pictures().astype(np.float32), pictures(2), pictures()[0]):
        with pytest.raises(ValueError, match="8-bit"):
            network(wrong)


def test_a_missing_inception_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_inception_path", lambda: tmp_path / features.INCEPTION)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"needs the file {tmp_path}.*put https://.*/{features.INCEPTION} there"):
        FeatureNetwork("inception")
    (tmp_path / features.INCEPTION).write_bytes(b"half")
    with pytest.raises(ValueError, match="cannot be loaded as clean-fid's Inception"):
        FeatureNetwork("inception")


def test_a_failed_download_leaves_nothing(tmp_path, monkeypatch):
    def half(fpath):
        (tmp_path / features.INCEPTION).write_bytes(b"half")
        raise OSError("no network")

    monkeypatch.setattr(features, "_inception_path", lambda: tmp_path / features.INCEPTION)
    monkeypatch.setattr("cleanfid.downloads_helper.check_download_inception", half)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match="its download failed: no network"):
        FeatureNetwork("inception")
    assert not list(tmp_path.iterdir())


class InceptionLike(nn.Module):
    """The interface of clean-fid's file: `layers`, on pictures of 299 in [-1, 1], gives 2,048 features."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d((32, 64)), nn.Flatten(2), nn.AdaptiveAvgPool1d(2048))
        self.layers.append(Mean())

    def forward(self, x):
        return self.layers(x)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=1)


def test_clean_fids_own_network_is_run_as_it_runs_it(tmp_path, monkeypatch):
    torch.jit.script(InceptionLike()).save(str(tmp_path / features.INCEPTION))
    network = FeatureNetwork(str(tmp_path / features.INCEPTION), resolution=64)  # that file's own is 299
    assert network.dimensions == 2048
    white = network(np.full((1, 8, 8, 3), 255, np.uint8))
    torch.testing.assert_close(white, torch.full((1, 2048), (255 - 128) / 128))
    monkeypatch.setattr(features, "_inception_path", lambda: tmp_path / features.INCEPTION)
    assert FeatureNetwork("inception").digest == network.digest


class Wrong(nn.Module):
    def forward(self, x):
        return x[:, :, :100, :100]


def test_networks_that_do_not_fit(tmp_path, small):
    with pytest.raises(ValueError, match="there is no file"):
        FeatureNetwork(str(tmp_path / "none.pt"))
    (tmp_path / "text.pt").write_text("no")
    with pytest.raises(ValueError, match="not a TorchScript file"):
        FeatureNetwork(str(tmp_path / "text.pt"))
    torch.jit.script(Wrong()).save(str(tmp_path / "wrong.pt"))
    with pytest.raises(ValueError, match=r"must give \(B, D\), got \(2, 3, 100, 100\)"):
        FeatureNetwork(str(tmp_path / "wrong.pt"))
    torch.jit.script(nn.Linear(5, 2)).save(str(tmp_path / "linear.pt"))
    with pytest.raises(ValueError, match=r"must take float32 \(B, 3, 64, 64\)"):
        FeatureNetwork(str(tmp_path / "linear.pt"), 64)
