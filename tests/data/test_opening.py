"""The door of the data: each kind of source is told from the options, and opened."""

import pytest

from ddpm_hf import TrainConfig
from ddpm_hf.data.opening import OPENERS, kind_of_source
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
