"""Convert a checkpoint of denoising-diffusion-pytorch to a pipeline.

    python training/convert.py results/model-100.pt --output_dir my-model

Prints what it inferred from the file; the options say what a file cannot tell.
"""

import argparse
import os
import sys
from pathlib import Path

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.convert import build, read_checkpoint
from ddpm_hf.run.checkpoint import ASIDE


def main(arguments: list) -> int:
    parser = SuggestingParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="Its model-*.pt file.")
    parser.add_argument("--output_dir", required=True, help="Folder of the pipeline; must be new or empty.")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="Which weights. Default: ema.")
    parser.add_argument(
        "--image_size", type=int, nargs="+", help="Pixels, one number or height and width. Default: 128."
    )
    parser.add_argument("--seq_length", type=int, help="Length of sequences. Default: 128.")
    parser.add_argument("--attn_heads", type=int, nargs="+", help="One number or one per stage. Default: 4.")
    parser.add_argument("--norm_groups", type=int, default=8, help="Groups of the 2023 form's norms. Default: 8.")
    parser.add_argument(
        "--theta", type=float, default=10000.0, help="Longest period of the time embedding, over 2 pi. Default: 10000."
    )
    parser.add_argument(
        "--self_condition", action="store_true", default=None, help="For a model with learned variance too."
    )
    parser.add_argument("--learned_variance", action="store_true", default=None, help="With self-conditioning too.")
    parser.add_argument("--sampling_timesteps", type=int, help="Default sampling steps. Default: all.")
    parser.add_argument("--ddim_sampling_eta", type=float, default=0.0, help="DDIM's noise. Default: 0.")
    parser.add_argument("--no_auto_normalize", dest="auto_normalize", action="store_false",
                        help="The data was not given in [0, 1].")  # fmt: skip
    options = vars(parser.parse_args(arguments))
    checkpoint, output = options.pop("checkpoint"), Path(options.pop("output_dir"))
    if options["image_size"]:
        options["image_size"] = options["image_size"][0] if len(options["image_size"]) == 1 else options["image_size"]
    if options["attn_heads"] and len(options["attn_heads"]) == 1:
        options["attn_heads"] = options["attn_heads"][0]
    try:
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ValueError(f"output_dir must be a new or empty folder, {output} is not")
        findings = read_checkpoint(checkpoint, **options)
        print(findings)
        pipeline = build(findings)
        # whole or not at all
        aside = output.with_name(output.name + ASIDE)
        pipeline.save_pretrained(aside)
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
