"""Generate many samples of a saved pipeline into a folder, on all processes; a run that was stopped goes on.

    python training/sample.py --pipeline runs/digits/pipeline --num_samples 1000 --output_dir samples/
    python training/sample.py --pipeline runs/ecg/pipeline --num_samples 500 --output_dir ecg/ --format parquet
    accelerate launch training/sample.py --pipeline me/my-model --num_samples 50000 --output_dir samples/ --format npz
    python training/sample.py --pipeline runs/larger/pipeline --condition small/ --num_samples 4 --output_dir large/

Sample number i follows from the seed and i, for any number of processes. A run that was stopped must be started again
with the same settings, batch size included; they are in settings.json.
"""

import argparse
import sys
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.choices import IMAGE_FORMATS, SAMPLING_PRECISIONS, SEQUENCE_FORMATS


# This function is longer than 60 lines because it has the help of every option.
def make_parser() -> SuggestingParser:
    """Return the parser of the options, under headings."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("samples")
    what.add_argument("--pipeline", required=True, help="Folder or Hub name of a saved pipeline.")
    what.add_argument("--num_samples", type=int, required=True, help="Number of samples; with --condition, of each "
                      "condition.")  # fmt: skip
    what.add_argument("--output_dir", type=Path, required=True, help="New folder, or that of a run that was stopped.")
    what.add_argument("--format", help=f"Images: {', '.join(IMAGE_FORMATS)} (default: png; npy for scientific "
                      f"images). Sequences: {', '.join(SEQUENCE_FORMATS)} (default: npy). png and webp write one "
                      "file per sample.")  # fmt: skip
    what.add_argument("--seed", type=int, default=0, help="Seed of all samples. Default: %(default)s.")
    what = parser.add_argument_group("classes and guidance")
    what.add_argument("--class_labels", nargs="+", help="Names or numbers of classes, which the samples take in turn; "
                      "'all' means every class, and a .csv or .txt file has one in each row. Default: "
                      "all.")  # fmt: skip
    what.add_argument("--guidance_scale", type=float, default=1.0, help="Scale of guidance; 1 is none. Default: "
                      "%(default)s.")  # fmt: skip
    what.add_argument("--guidance_rescale", type=float, default=0.0, help="From 0 to 1: how far "
                      "guided predictions get the standard deviation of unguided ones. Default: "
                      "%(default)s.")  # fmt: skip
    what.add_argument("--guidance_interval", type=float, nargs=2, default=[0.0, 1.0],
                      help="Lowest and highest noise level with guidance. Default: 0 1.")  # fmt: skip
    what.add_argument("--guide", help="Folder or Hub name of a pipeline of a worse model, for autoguidance.")
    what = parser.add_argument_group("paired conditions")
    what.add_argument("--condition", help="Conditions, for a model that is given one beside each sample: a picture, a "
                      "folder of pictures, .npy or .npz; for sequences .npy, .npz, .csv or .parquet; or a folder of "
                      ".npy files with one each. Each gets --num_samples samples. With --length, --height or "
                      "--width they have the size in proportion.")  # fmt: skip
    what = parser.add_argument_group("completing")
    what.add_argument("--known", help="Items to complete, in turn: .npy, .npz, .csv or .parquet of sequences; .npy, "
                      ".npz, a picture or a folder of pictures for images. NaN is unknown.")  # fmt: skip
    what.add_argument("--mask", help="File of the same kinds: 1 or white where the items are unknown; one mask for all "
                      "items, or one for each.")  # fmt: skip
    what.add_argument("--jump_length", type=int, default=10, help="Number of steps that a jump of "
                      "RePaint goes back. Default: %(default)s.")  # fmt: skip
    what.add_argument("--jump_n_sample", type=int, default=10, help="Number of times that RePaint passes each "
                      "place that it jumps from, for models that were not trained to complete. Default: "
                      "%(default)s.")  # fmt: skip
    what = parser.add_argument_group("longer series and larger images")
    what.add_argument("--length", type=int, help="Length of sequences. Default: as trained.")
    what.add_argument("--height", type=int, help="Height of images in pixels. Default: as trained.")
    what.add_argument("--width", type=int, help="Width of images in pixels. Default: as trained.")
    what.add_argument("--method", help="single: one call of the model for the whole size; joint: overlapping "
                      "windows that are denoised together; sequential (sequences): window after window. Default: "
                      "single up to twice the trained size, joint beyond.")  # fmt: skip
    what.add_argument("--overlap", type=int, help="Values that neighbouring windows share. Default: half a window.")
    what = parser.add_argument_group("variations of given items")
    what.add_argument("--init_image", help="Images to vary, in turn: a picture, a folder of pictures, .npy or .npz. "
                      "Pictures are cropped and resized to the size of the model's images.")  # fmt: skip
    what.add_argument("--init_sequence", help="Sequences to vary, in turn: .npy, .npz, .csv or .parquet.")
    what.add_argument("--strength", type=float, help="How much noise the given items get, from 0 to 1: 0 returns them "
                      "as they are, 1 gives ordinary samples. Default: 0.5, with --init_image or "
                      "--init_sequence.")  # fmt: skip
    what = parser.add_argument_group("sampler")
    what.add_argument(
        "--scheduler", help="ddpm, ddim, fast, or a scheduler class of diffusers. Default: the pipeline's."
    )
    what.add_argument("--num_inference_steps", type=int, help="Number of steps. Default: the pipeline's.")
    what.add_argument("--eta", type=float, help="Share of DDIM's noise, 0 to 1. Default: the scheduler's.")
    what = parser.add_argument_group("machine")
    what.add_argument("--batch_size", type=int, default=64, help="Number of samples that a process makes "
                      "at once. Default: %(default)s.")  # fmt: skip
    what.add_argument("--mixed_precision", choices=SAMPLING_PRECISIONS, default="no", help="Precision of the model's "
                      "calls. Default: %(default)s.")  # fmt: skip
    return parser


def main(arguments: list) -> int:
    """Sample as the arguments say, and return the exit status."""
    given = make_parser().parse_args(arguments)
    from ddpm_hf.commands.sampling import exit_status, sample  # after the options, because it is slow to import

    return exit_status(lambda: sample(given))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
