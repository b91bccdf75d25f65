"""Measure a saved pipeline against data: FID, KID, sequence distances, memorization, held-out loss, bits per dim.

    python training/evaluate.py --pipeline runs/digits/pipeline --data digits --feature_network pixels
    python training/evaluate.py --pipeline runs/ecg/pipeline --data ecg --num_inference_steps 10 25 50
    python training/evaluate.py --pipeline runs/x/pipeline --data digits --per_class --guidance_scale 1 1.5 2 3
    python training/evaluate.py --pipeline runs/ecg/pipeline --data ecg --task forecast --num_inference_steps 50
    python training/evaluate.py --pipeline runs/digits/pipeline --data digits --metrics bits_per_dim
    accelerate launch training/evaluate.py --pipeline me/my-model --data photos/ --num_samples 10000

The results are added to evaluation.json in the pipeline's folder, or in --output_dir, and the model card takes them
from there. Several numbers of steps, or scales of guidance, also draw steps-versus-metric.png, and bits_per_dim draws
bits-per-dim.png. With --task,
held-out items are completed instead; the scores are added to completion.json, with a picture of the first setting.
"""

import argparse
import sys

from transformers import HfArgumentParser

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.evaluation.options import EvaluateConfig


class Parser(SuggestingParser, HfArgumentParser):
    """A parser whose arguments are the fields of a dataclass."""


def evaluate(config: EvaluateConfig) -> list[dict]:
    """Do what `evaluating.evaluate` does, which is imported once the options are known, because that takes seconds."""
    from ddpm_hf.commands import evaluating

    return evaluating.evaluate(config)


def main(arguments: list) -> int:
    """Evaluate as the arguments say, and return the exit status."""
    parser = Parser(EvaluateConfig, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        evaluate(EvaluateConfig(**vars(parser.parse_args(arguments))))
    except (ValueError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
