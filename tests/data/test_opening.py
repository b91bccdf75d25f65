"""The door of the data: each kind of source is told from the options, and opened."""

import numpy as np
import pytest

from ddpm_hf import TrainConfig
from ddpm_hf.data.opening import OPENERS, kind_of_source, open_data
from ddpm_hf.scope import KINDS


def test_every_kind_of_source_has_an_opener():
    assert set(OPENERS) == {kind for kind in KINDS if not kind.startswith("given")}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("digits", {"dataset_name": "digits"}),
        ("ecg", {"dataset_name": "ecg"}),
        ("array", {"train_data_file": "x.NPY"}),
        ("sequence file", {"train_data_file": "x.csv"}),
        ("image table", {"dataset_name": "me/photos"}),
        ("image stream", {"dataset_name": "me/photos", "streaming": True}),
        ("sequence table", {"dataset_name": "me/waves", "sequence_columns": ["a"]}),
    ],
)
def test_the_kind_follows_from_the_options(kind, options):
    assert kind_of_source(TrainConfig(**options)) == kind


@pytest.mark.parametrize("options", [{}, {"image_norm": "minmax"}])
def test_what_is_not_map_style_is_refused(options):
    """A dict of splits, as the datasets library gives it without a split, is no dataset."""
    for wrong in (iter([1]), {"train": [np.zeros((1, 8, 8))]}):
        with pytest.raises(ValueError, match=r"must be map-style .*dataset\['train'\].*, got (list_iterator|dict)"):
            open_data(TrainConfig(**options), wrong)
    with pytest.raises(ValueError, match="the data is empty"):
        open_data(TrainConfig(**options), [])
