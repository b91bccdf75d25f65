"""Convert a checkpoint of denoising-diffusion-pytorch to a pipeline.

    python training/convert.py results/model-100.pt --output_dir my-model

The program prints what it inferred from the file. The options give what a file does not contain.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.run.checkpoint import ASIDE


def _options(arguments: list) -> dict:
    """Parse the arguments."""
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="The model-*.pt file.")
    parser.add_argument("--output_dir", required=True, help="Folder of the pipeline; it must be new or empty.")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="Weights to take: averaged or not. Default: ema."
    )
    parser.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        help="Size of images in pixels, one number or height and width. Default: 128.",
    )
    parser.add_argument("--seq_length", type=int, help="Length of sequences. Default: 128.")
    parser.add_argument(
        "--attn_heads", type=int, nargs="+", help="Attention heads, one number or one per stage. Default: 4."
    )
    parser.add_argument("--norm_groups", type=int, default=8, help="Groups of the norms in files of 2023. Default: 8.")
    parser.add_argument(
        "--theta", type=float, default=10000.0, help="Longest period of the time embedding, over 2 pi. Default: 10000."
    )
    parser.add_argument(
        "--self_condition",
        action="store_true",
        default=None,
        help="The model has self-conditioning. Needed only if it has learned variance too.",
    )
    parser.add_argument(
        "--learned_variance",
        action="store_true",
        default=None,
        help="The model has learned variance. Needed only if it has self-conditioning too.",
    )
    parser.add_argument("--sampling_timesteps", type=int, help="Sampling steps that a call takes. Default: all.")
    parser.add_argument(
        "--ddim_sampling_eta", type=float, default=0.0, help="Share of DDPM's noise in DDIM sampling (eta). Default: 0."
    )
    parser.add_argument("--no_auto_normalize", dest="auto_normalize", action="store_false",
                        help="The data was not given in [0, 1], so sequences are not scaled to it.")  # fmt: skip
    options = vars(parser.parse_args(arguments))
    for name in ("image_size", "attn_heads"):
        if options[name] and len(options[name]) == 1:
            options[name] = options[name][0]
    return options


def main(arguments: list) -> int:
    """Convert as the arguments say, and return the exit status."""
    options = _options(arguments)
    # after the options, because they are slow to import
    from ddpm_hf.convert import build, read_checkpoint
    from ddpm_hf.run.lineage import Lineage

    checkpoint, output = options.pop("checkpoint"), Path(options.pop("output_dir"))
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output_dir must be a new or empty folder, and {output} is not one")
        findings = read_checkpoint(checkpoint, **options)
        print(findings)
        pipeline = build(findings)
        # the folder appears whole or not at all
        aside = output.with_name(output.name + ASIDE)
        shutil.rmtree(aside, ignore_errors=True)  # the remains of a conversion that was killed
        pipeline.save_pretrained(aside)
        lineage = Lineage("converted", Path(checkpoint).name).public()  # for the card
        (aside / "training.json").write_text(json.dumps({"lineage": lineage}, indent=1))
        if output.exists():
            output.rmdir()
        os.replace(aside, output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f'\nfrom ddpm_hf import {type(pipeline).__name__}\npipe = {type(pipeline).__name__}.from_pretrained("{output}")'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
