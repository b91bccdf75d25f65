"""Score items by a saved pipeline: how strange each is to the model, and where; a run that was stopped goes on.

    python training/score.py --pipeline runs/digits/pipeline --data scans/ --output scores.csv --maps pictures
    python training/score.py --pipeline runs/ecg/pipeline --data new.npy --output scores.parquet --maps npy
    python training/score.py --pipeline runs/x/pipeline --data test/ --labels folder --normal good --output scores.csv
    accelerate launch training/score.py --pipeline me/my-model --data big.parquet --reference train/ --output scores.csv

The table has a row for each item: its file or number, its score (higher is stranger), and with --reference, or scores
that were saved in the pipeline, the percentile of its score among those. Beside scores.csv lie scores.json (settings
and metrics) and, if they are asked for, scores-maps.npy and the folder scores-maps. Data is read as evaluate.py reads
it. Neither the number of processes nor the batch size changes a score, except for rounding.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.choices import SAMPLING_PRECISIONS
from ddpm_hf.evaluation.options import EvaluateConfig

METHODS = ("reconstruction", "denoising", "noise")
# Options that tell how data is read; they mean what they mean for evaluate.py.
READING = ("dataset_config_name", "dataset_split", "image_column", "channels_last", "image_range", "sequence_columns",
           "stride", "csv_decimal", "recording", "on_missing", "on_bad_image", "dataloader_num_workers",
           "condition_column", "condition_dir")  # fmt: skip


def make_parser() -> SuggestingParser:
    """Return the parser of the options, under headings."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("items and scores")
    what.add_argument("--pipeline", required=True, help="Folder or Hub name of a saved pipeline.")
    what.add_argument("--data", required=True, help="Items to score: a folder, an array, a table, or another source "
                      "that evaluate.py takes.")  # fmt: skip
    what.add_argument("--output", type=Path, required=True, help="Table to write, .csv or .parquet.")
    what.add_argument("--maps", nargs="+", choices=("npy", "pictures"), default=[], help="Also write the map of each "
                      "item: as one array, or as a picture over the item, or both.")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="Seed of the noise. Default: %(default)s.")
    what = parser.add_argument_group("method")
    what.add_argument("--method", choices=METHODS, default=METHODS[0], help="Error of the reconstruction, "
                      "the bound of -log p, or error of the predicted noise. Default: %(default)s.")  # fmt: skip
    what.add_argument("--strengths", type=float, nargs="+", help="Strengths of the noise, above 0 and at most 1, that "
                      "items are reconstructed from. Default: 0.1 0.2 0.3 0.4.")  # fmt: skip
    what.add_argument("--num_timesteps", type=int, help="Number of timesteps of the methods denoising and noise, and "
                      "so of calls of the model for each item. Default: 20.")  # fmt: skip
    what.add_argument("--smoothing", type=float, default=0.0, help="Deviation of the Gaussian that smooths the maps, "
                      "in pixels or points; 0: they are not smoothed. Default: %(default)s.")  # fmt: skip
    what.add_argument("--complete", action="store_true", help="Complete items with missing values (NaN) before "
                      "they are scored: sequences and scientific images. Default: a missing value is an "
                      "error.")  # fmt: skip
    what.add_argument("--scheduler", help="ddpm, ddim, fast, or a scheduler class of diffusers; the method denoising "
                      "needs one of the first two. Default: the pipeline's.")  # fmt: skip
    what = parser.add_argument_group("classes, for a model with classes")
    what.add_argument("--class_labels", help="The classes of the items, as in training: a column, a file, or 'folder' "
                      "for the names of subfolders. Default: as in the pipeline's run, if --data is its data, and "
                      "otherwise no class.")  # fmt: skip
    what.add_argument("--class_for_all", help="One class for all items, by its name or number, or 'none' for no class.")
    what = parser.add_argument_group("reference for percentiles")
    what.add_argument("--reference", help="Data, usually that of training, whose scores the percentiles refer to. "
                      "Default: scores that were saved in the pipeline, or no percentiles.")  # fmt: skip
    what.add_argument("--num_reference", type=int, default=1000, help="Largest number of items of "
                      "--reference. Default: %(default)s.")  # fmt: skip
    what.add_argument("--save_reference", action="store_true", help="Save the scores of --reference in the folder of "
                      "the pipeline, for later percentiles.")  # fmt: skip
    what = parser.add_argument_group("known anomalies")
    what.add_argument("--labels", help="Which items are anomalous: a file (.npy, .csv, .txt), a column of a table, or "
                      "'folder' for the names of subfolders; 0 is normal and 1 anomalous.")  # fmt: skip
    what.add_argument("--normal", nargs="+", help="The classes of --labels that are normal, if they are not 0 and 1.")
    what.add_argument("--masks", help="Which parts are anomalous: a folder of pictures with the items' names, or an "
                      "array of the items' shape (.npy, .npz). The maps are then kept as .npy.")  # fmt: skip
    what = parser.add_argument_group("how data is read")
    for field in fields(EvaluateConfig):
        if field.name in READING:
            _add_field(what, field)
    what = parser.add_argument_group("machine")
    what.add_argument("--batch_size", type=int, default=64, help="Number of noisy items in a call of the model. "
                      "Default: %(default)s.")  # fmt: skip
    what.add_argument("--mixed_precision", choices=SAMPLING_PRECISIONS, default="no", help="Precision of the model's "
                      "calls. Default: %(default)s.")  # fmt: skip
    return parser


def _add_field(group, field) -> None:
    """Add an option of evaluate.py with its default and help."""
    name, text = f"--{field.name}", field.metadata["help"]
    if field.default is False:
        group.add_argument(name, action="store_true", help=text)
    elif field.name == "sequence_columns":
        group.add_argument(name, nargs="+", help=text)
    elif field.name == "image_range":
        group.add_argument(name, type=float, nargs=2, help=text)
    else:
        kind = int if field.name in ("stride", "dataloader_num_workers") else str
        group.add_argument(name, type=kind, default=field.default, help=text)


def main(arguments: list) -> int:
    """Score as the arguments say, and return the exit status."""
    given = make_parser().parse_args(arguments)
    # after the options, because they are slow to import
    from ddpm_hf.commands.sampling import exit_status
    from ddpm_hf.commands.scoring import score

    return exit_status(lambda: score(given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
