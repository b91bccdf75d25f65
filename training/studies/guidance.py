"""The digits demo under guidance: agreement with a classifier, and distance to the data, by scale and interval.

    python training/studies/guidance.py runs/digits/pipeline               # the first table of docs/classes.md
    python training/studies/guidance.py runs/digits/pipeline --calls 8 10 15 25 --num_samples 500   # the second one

Each takes some minutes of an idle machine. Samples are those of the fast sampler. The classifier is a small
convolutional network, trained on the items that the demo was trained on. The program first prints its accuracy on the
items that the demo held out.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from ddpm_hf import DDPMPipeline, TrainConfig
from ddpm_hf.config import read_yaml
from ddpm_hf.data import open_data
from ddpm_hf.data.loading import item_labels, load_item
from ddpm_hf.evaluation.classes import DataClasses
from ddpm_hf.evaluation.evaluator import Evaluator
from ddpm_hf.evaluation.settings import EvalSettings

PRESET = Path(__file__).parents[1] / "configs" / "digits.yaml"
SAMPLES, CALLS = 1000, 12
WHOLE, MIDDLE = (0.0, 1.0), (0.2, 0.8)
SETTINGS = [(scale, WHOLE) for scale in (1.0, 1.5, 2.0, 3.0, 5.0)]
SETTINGS += [(scale, MIDDLE) for scale in (1.5, 2.0, 3.0, 5.0)]
OF_CALLS = SETTINGS[:4]  # the scales whose numbers of calls are compared


def items_and_classes(items, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 1, 8, 8) in [0, 1] and their classes (N,)."""
    x = torch.stack([load_item(items, number) for number in range(len(items))])
    return (x + 1) / 2, torch.as_tensor(item_labels(items, labels))


def train_classifier(x: torch.Tensor, y: torch.Tensor, epochs: int = 30) -> nn.Module:
    """Train a classifier of images (N, 1, 8, 8) in [0, 1] with classes (N,)."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 16, 10),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(x[part]), y[part]).backward()
            optimizer.step()
    return network.eval()


def measure(
    pipeline, feed, classifier: Path, settings=SETTINGS, num_samples=SAMPLES, calls=(CALLS,)
) -> Iterator[tuple]:
    """Yield (scale, interval, results) for each scale and interval of guidance.

    The results are (agreement, FID of pixels) for each number of calls of the model.
    """
    accelerator = Accelerator(cpu=True)
    classes = DataClasses.of(feed.labels, feed.dataset, feed.held_out)
    for scale, interval in settings:
        options = EvalSettings(
            metrics=["fid"], num_samples=num_samples, feature_network="pixels", batch_size=100,
            guidance_interval=interval, classifier=str(classifier),
        )  # fmt: skip
        evaluator = Evaluator(accelerator, feed.dataset, feed.shape, options, classes=classes)
        evaluator.check(pipeline, [scale])
        evaluator.prepare()
        values = [evaluator(pipeline, number, guidance_scale=scale) for number in calls]
        yield scale, interval, [(each["class_agreement"], each["fid"]) for each in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="Pipeline of the demo of digits.")
    parser.add_argument("--calls", type=int, nargs="+", default=[CALLS], help="Numbers of calls of the model.")
    parser.add_argument("--num_samples", type=int, default=SAMPLES, help="Number of samples of each setting.")
    options = parser.parse_args()
    pipeline = DDPMPipeline.from_pretrained(options.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.use_fast_sampler()
    feed = open_data(TrainConfig(**read_yaml(str(PRESET))))
    network = train_classifier(*items_and_classes(feed.dataset, feed.labels))
    x, y = items_and_classes(feed.held_out, feed.labels)
    with torch.no_grad():
        correct = (network(x).argmax(dim=1) == y).double().mean().item()
    print(f"classifier: {correct:.1%} of {len(y)} held-out items")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classifier.pt"
        torch.jit.trace(network, x[:2]).save(str(file))
        several = len(options.calls) > 1
        names = [f"{number} calls" for number in options.calls] if several else ["agreement", "FID of pixels"]
        print(f"| scale | from | to | {' | '.join(names)} |\n" + "|---" * (3 + len(names)) + "|")
        settings = OF_CALLS if several else SETTINGS
        for scale, (low, high), results in measure(pipeline, feed, file, settings, options.num_samples, options.calls):
            cells = [(", " if several else " | ").join((f"{share:.1%}", f"{fid:.3f}")) for share, fid in results]
            print(f"| {scale:g} | {low:g} | {high:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
