"""The scopes of options: the kinds of data, the values of other options, or the new model that an option applies to.

`ddpm_hf.options` gives a `Scope` to each option that does not always apply. The help, the page of options and the error
messages take their words from it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

# The kinds of data, as `open_data` tells them apart, and the words for them in messages.
KINDS = {
    "digits": "the bundled digits",
    "ecg": "the bundled electrocardiogram",
    "folder": "a folder of images",
    "data folder": "a folder of images in units of their own",
    "image array": "an array of images (.npy, .npz)",
    "image table": "a table of images",
    "image stream": "a streamed table of images",
    "sequence table": "a table of sequences",
    "sequence file": "a table of sequences (.csv, .parquet)",
    "array": "an array of sequences (.npy, .npz)",
    "recordings": "recordings (.wav, .flac, .edf, .hea)",
    "given images": "images given from Python",
    "given ImageDataset": "an ImageDataset given from Python",
    "given sequences": "sequences given from Python",
}


def _always(config: Any) -> bool:
    return True


@dataclass(frozen=True)
class Scope:
    """The circumstances in which an option has an effect.

    Attributes:
        text: the words after "Applies to".
        kinds: the kinds of data that the option applies to, a part of `KINDS`.
        holds: called with the configuration; returns True if the other options let this one apply.
        option: the name of the option that `holds` depends on, for messages.
        new_model: True if the option is for the U-Net that training builds, not for a model given from Python.
    """

    text: str
    kinds: frozenset[str] = frozenset(KINDS)
    holds: Callable[[Any], bool] = _always
    option: str | None = None
    new_model: bool = False

    def reason_against(self, config: Any, kind: str | None, given_model: bool) -> str | None:
        """Return the words for what the option does not fit, or None if the option applies.

        Args:
            config: the options of the run.
            kind: the kind of data; None: not known yet, so that every kind counts.
            given_model: True if the model comes from Python.
        """
        if not self.holds(config):
            return f"{self.option} {getattr(config, self.option)!r}"
        if kind is not None and kind not in self.kinds:
            return KINDS[kind]
        return "a model given from Python" if self.new_model and given_model else None


def _data(text: str, kinds: Iterable[str]) -> Scope:
    """Return the scope of an option of some kinds of data."""
    return Scope(text, frozenset(kinds))


def _with(option: str, *values: Any) -> Scope:
    """Return the scope of an option of runs where another option has one of these values, or is on (no values)."""
    text = f"runs with {option} {' or '.join(values)}".rstrip()
    return Scope(
        text, holds=lambda c: getattr(c, option) in values if values else bool(getattr(c, option)), option=option
    )


_BALLS = ("precision", "recall", "density", "coverage")


def _has_features(config: Any) -> bool:
    """Return True if the evaluation has a metric that is computed from features of images."""
    chosen = set(config.eval_metrics or ("fid",))
    return bool(config.eval_steps) and not chosen.isdisjoint({"fid", "kid", *_BALLS})


_READ_IMAGES = ("digits", "folder", "image table", "image stream")
_OWN_UNITS = ("data folder", "image array")
_ALL_IMAGES = (*_READ_IMAGES, *_OWN_UNITS, "given images", "given ImageDataset")
_TABLES = ("image table", "image stream", "sequence table")

IMAGES = _data("images, but not to a dataset given from Python", (*_READ_IMAGES, *_OWN_UNITS))
KEPT_IMAGES = _data(
    "images of 8 bits that are neither streamed nor given from Python",
    [kind for kind in _READ_IMAGES if kind != "image stream"],
)
CHECKED_IMAGES = _data(
    "images, but not to tensors given from Python", (*_READ_IMAGES, *_OWN_UNITS, "given ImageDataset")
)
OWN_UNITS = _data(
    "arrays of images, folders of images and tensors given from Python",
    (*_OWN_UNITS, "given images", "given sequences"),
)
ARRAYS = _data("arrays in .npy and .npz files", ("array", "image array", "data folder"))
SEQUENCES = _data(
    "sequences, but not to a dataset given from Python",
    ("ecg", "sequence table", "sequence file", "array", "recordings"),
)
IMAGE_TABLES = _data("tables of images", ("image table", "image stream"))
SEQUENCE_TABLES = _data("tables of sequences", ("sequence table", "sequence file"))
MISSING = _data(
    "tables, arrays and recordings of sequences", ("sequence table", "sequence file", "array", "recordings")
)
CSV = _data("tables in .csv files", ("sequence file",))
SEQUENCE_ARRAYS = _data("arrays of sequences (.npy, .npz)", ("array",))
CLASSES = _data("all data but the bundled electrocardiogram", [kind for kind in KINDS if kind != "ecg"])
PAIRS = _data(
    "tables, arrays and datasets given from Python",
    ("image table", "image stream", "image array", "sequence table", "sequence file", "array", "given images",
     "given sequences"),
)  # fmt: skip
PAIR_FOLDERS = _data("folders of images", ("folder", "data folder"))
STREAMS = _data("tables of images", ("image stream",))
TABLES = _data("tables that dataset_name or train_data_dir names", _TABLES)
NAMED_TABLES = Scope(
    "tables that dataset_name names", frozenset(_TABLES), lambda c: bool(c.dataset_name), "dataset_name"
)
NEW_MODEL = Scope("the model that training builds, not to one given from Python", new_model=True)
GROUP_NORM = Scope("models with norm group", holds=lambda c: c.norm == "group", option="norm", new_model=True)
FOURIER = Scope(
    "models with time_embedding learned_fourier or random_fourier", holds=lambda c: c.time_embedding != "sinusoidal",
    option="time_embedding", new_model=True,
)  # fmt: skip
SINUSOIDAL = Scope(
    "models with time_embedding sinusoidal", holds=lambda c: c.time_embedding == "sinusoidal", option="time_embedding",
    new_model=True,
)  # fmt: skip
STREAMING = _with("streaming")
MUON = _with("optimizer", "muon")
WITH_CLASSES = _with("class_labels")
KNOWN = _with("condition", "known")
LOGIT_NORMAL = _with("timestep_sampling", "logit_normal")
WARM_UP = Scope("every lr_scheduler but constant", holds=lambda c: c.lr_scheduler != "constant", option="lr_scheduler")
RESTARTS = _with("lr_scheduler", "cosine_with_restarts")
POLYNOMIAL = _with("lr_scheduler", "polynomial")
SEVERAL = Scope("runs with train_batch_size above 1", holds=lambda c: c.train_batch_size > 1, option="train_batch_size")
EMA = _with("use_ema")
EVALUATION = _with("eval_steps")
FEATURES = Scope(
    "images in runs with eval_steps and a metric of features, such as fid", frozenset(_ALL_IMAGES), _has_features,
    "eval_steps",
)  # fmt: skip
TORCHSCRIPT = Scope(
    "images in runs with eval_steps, a metric of features, and a TorchScript feature_network", frozenset(_ALL_IMAGES),
    lambda c: _has_features(c) and c.feature_network not in ("inception", "pixels"), "feature_network",
)  # fmt: skip
FIDELITY = Scope(
    f"runs with eval_steps and one of the metrics {', '.join(_BALLS)}",
    holds=lambda c: bool(c.eval_steps) and not set(c.eval_metrics or ()).isdisjoint(_BALLS),
    option="eval_metrics",
)  # fmt: skip
LIKELIHOOD = Scope(
    "runs with eval_steps and the metric bits_per_dim",
    holds=lambda c: bool(c.eval_steps) and "bits_per_dim" in (c.eval_metrics or ()), option="eval_metrics",
)  # fmt: skip
LEARNED_VARIANCE = _with("learned_variance")
HUB = _with("push_to_hub")
CONTINUED = _with("continue_from")
