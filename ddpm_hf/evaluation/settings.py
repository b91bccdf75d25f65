"""The names of the metrics, and the settings of an evaluation."""

from collections.abc import Sequence
from dataclasses import dataclass

HELD_OUT = ("held_out_loss", "held_out_weighted_loss")
LIKELIHOOD = ("bits_per_dim",)  # computed only where it is named, because it takes long
AGREEMENT = "class_agreement"  # computed if there is a classifier
FIDELITY = ("precision", "recall", "density", "coverage")  # computed if they are named
FEATURE_FRECHET = "feature_frechet"  # of sequences, in the features of a network that is named
OF_FEATURES = ("fid", "kid", *FIDELITY)  # those that compare features of images
BY_CLASS = (
    "fid",
    "kid",
    FEATURE_FRECHET,
    "frechet",
    "spectral_frechet",
    "sliced_wasserstein",
    "autocorrelation_error",
    *FIDELITY,
)
HIGHER_IS_BETTER = FIDELITY  # of the metrics that can choose the best pipeline
IMAGE_METRICS = ("fid", "kid", "memorization", *FIDELITY, *HELD_OUT, *LIKELIHOOD)
SEQUENCE_METRICS = ("frechet", "spectral_frechet", "sliced_wasserstein", "autocorrelation_error", "memorization",
                    FEATURE_FRECHET, *FIDELITY, *HELD_OUT, *LIKELIHOOD)  # fmt: skip
METRICS = tuple(dict.fromkeys(IMAGE_METRICS + SEQUENCE_METRICS))
BIASED = (
    "fid",
    "frechet",
    FEATURE_FRECHET,
    "spectral_frechet",
    "sliced_wasserstein",
)  # biased upwards, the more so the fewer samples there are
FEW = 10_000  # the number of samples below which the bias is reported


@dataclass
class EvalSettings:
    """Settings of an evaluation: metrics, numbers of samples and of real items, features, seeds.

    Args:
        metrics: a selection of `IMAGE_METRICS` or `SEQUENCE_METRICS`; None means all that the data
            allows, without those of `FIDELITY`.
        num_samples: the number of generated samples.
        num_real: the largest number of real items to compare with; if there are more, `seed` draws them.
        feature_network, feature_resolution: the features of the metrics of `OF_FEATURES`; see `FeatureNetwork`. For
            sequences, the file of a `SequenceFeatures` for `FEATURE_FRECHET` and `FIDELITY`; other names mean none.
        num_neighbours: k, the number of the neighbour that the balls of the metrics of `FIDELITY` reach to; None means
            3 for precision and recall, and 5 for density and coverage.
        batch_size: the number of samples that a process generates at once.
        seed: the seed of the samples, of the real items that are drawn, and of the held-out loss.
        cache_dir: the folder for statistics of real pictures; None means ddpm_hf/ in the Hugging Face cache.
        workers: the number of processes that load data.
        on_bad_image: "stop", or "skip": a picture that cannot be read is left out everywhere and reported.
        guidance_interval: the lowest and the highest noise level with guidance, in [0, 1]; see the call of a pipeline.
        per_class: compute the metrics of `BY_CLASS` also for each class of the data, from the samples of that class and
            its real items.
        classifier: the TorchScript or .pt2 file of a classifier for the metric `class_agreement`; see `Classifier`.
        likelihood_items, likelihood_timesteps: the largest number of items of `bits_per_dim`, and the number of
            timesteps for each of them; see `Likelihood`.
        random_flip: True if training mirrors pictures although the dataset does not say so. For memorization a picture
            and its mirror image are then one item, so a mirrored copy is a copy.
    """

    metrics: Sequence[str] | None = None
    num_samples: int = 1000
    num_real: int = 50_000
    feature_network: str = "inception"
    feature_resolution: int = 299
    batch_size: int = 64
    seed: int = 0
    cache_dir: str | None = None
    workers: int = 0
    on_bad_image: str = "stop"
    random_flip: bool = False
    guidance_interval: Sequence[float] = (0.0, 1.0)
    per_class: bool = False
    classifier: str | None = None
    num_neighbours: int | None = None
    likelihood_items: int = 256
    likelihood_timesteps: int = 100

    def check(self) -> None:
        """Check what does not depend on the data.

        Raises:
            ValueError: if a number is too small, or `on_bad_image` is unknown.
        """
        least = {
            "num_samples": 2, "num_real": 2, "batch_size": 1, "workers": 0, "seed": 0, "likelihood_items": 1,
            "likelihood_timesteps": 2, "feature_resolution": 1,
        }  # fmt: skip
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be at least {value}, got {getattr(self, name)}")
        if self.num_neighbours is not None and self.num_neighbours < 1:
            raise ValueError(f"num_neighbours must be at least 1, got {self.num_neighbours}")
        asked = sorted(set(self.metrics or ()) & set(FIDELITY))
        if self.num_neighbours is not None and not asked:
            raise ValueError(
                f"num_neighbours applies to the metrics {', '.join(FIDELITY)}; got {self.num_neighbours} without any "
                "of them: leave it out, or name one"
            )
        for name in ("num_samples", "num_real") if asked else ():
            if getattr(self, name) < self.least_rows():
                raise ValueError(
                    f"{name} must be at least {self.least_rows()} for the metric {asked[0]}, which measures "
                    f"distances to neighbour number {self.least_rows() - 1}; got {getattr(self, name)}"
                )
        if self.on_bad_image not in ("stop", "skip"):
            raise ValueError(f"on_bad_image must be 'stop' or 'skip', got {self.on_bad_image!r}")
        low_high = tuple(self.guidance_interval)
        if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1] <= 1:
            raise ValueError(f"guidance_interval must be two ascending numbers in [0, 1], got {low_high}")

    def names_file(self) -> bool:
        """Return True if the feature network is one in a file."""
        return self.feature_network not in ("inception", "pixels")

    def least_rows(self) -> int:
        """Return the number of samples, and of real items, that the metrics need at least for their neighbours.

        Balls to neighbour k need k + 1 rows. The four metrics are computed together, so the larger k counts.
        """
        if not set(self.metrics or ()) & set(FIDELITY):
            return 1
        return 1 + max(neighbours_of(metric, self.num_neighbours) for metric in FIDELITY)


def neighbours_of(metric: str, asked: int | None) -> int:
    """Return the number k of neighbours for a metric of `FIDELITY`: `asked`, or, if it is None, that of its paper."""
    return asked or (3 if metric in ("precision", "recall") else 5)


def choose_metrics(asked: Sequence[str] | None, is_image: bool, has_held_out: bool) -> list[str]:
    """Return the metrics to compute.

    Args:
        asked: the metrics that the user names; None means all that the data allows, without
            those of `FIDELITY` and `LIKELIHOOD` and `FEATURE_FRECHET`.
        is_image: True for images, False for sequences.
        has_held_out: True if there are items that training does not see.

    Raises:
        ValueError: if a metric is not one of this kind of data, or lacks the items that it needs.
    """
    possible = IMAGE_METRICS if is_image else SEQUENCE_METRICS
    usual = [metric for metric in possible if metric not in (FEATURE_FRECHET, *FIDELITY, *LIKELIHOOD)]
    metrics = list(asked or (metric for metric in usual if metric not in HELD_OUT or has_held_out))
    wrong = [metric for metric in metrics if metric not in possible]
    if wrong:
        kind = "images" if is_image else "sequences"
        raise ValueError(f"metrics of {kind} are {', '.join(possible)}; got {', '.join(wrong)}")
    named = next((metric for metric in metrics if metric in HELD_OUT), None)
    if named and not has_held_out:
        raise ValueError(f"the metric {named} needs items that training does not see: holdout of at least 1")
    return metrics
