"""Train a diffusion model: options -> `ddpm_hf.train`.

    accelerate launch training/train.py                                   # the digits demo
    accelerate launch training/train.py --config training/configs/ecg.yaml
    accelerate launch training/train.py --train_data_dir photos/ --resolution 64 --output_dir runs/photos

Options come from --config (YAML), then from the command line; --help lists them.
"""

import argparse
import os
import sys
from pathlib import Path

from accelerate import PartialState
from transformers import HfArgumentParser

from ddpm_hf.config import TrainConfig, read_yaml

DEMO = Path(__file__).parent / "configs" / "digits.yaml"
SOURCES = ("dataset_name", "train_data_dir", "train_data_file")


def parse(arguments: list) -> TrainConfig:
    """Options of the command line over those of --config; without any data, the demo's.

    Raises:
        ValueError: an unknown option in the file, or a value outside its range.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    known, rest = first.parse_known_args(arguments)
    parser = HfArgumentParser(TrainConfig, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                              allow_abbrev=False)  # fmt: skip
    parser.add_argument("--config", default=None, help="YAML file of options; the command line overrides it.")
    names_data = any(argument.split("=")[0].lstrip("-").replace("-", "_") in SOURCES for argument in rest)
    if known.config or not names_data:
        parser.set_defaults(**read_yaml(known.config or DEMO))
    if known.config and names_data:  # a file's source of data gives way to the command line's
        parser.set_defaults(**{source: None for source in SOURCES})
    config, _ = parser.parse_args_into_dataclasses(arguments)
    return config


def launcher() -> list:
    """What this process was started with."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return ["torchrun"] if "TORCHELASTIC_RUN_ID" in os.environ else ["python"]
    processes = os.environ.get("WORLD_SIZE", "1")
    return ["accelerate", "launch", *(["--num_processes", processes] if processes != "1" else [])]


def main(arguments: list) -> int:
    try:
        config = parse(arguments)
        from ddpm_hf.trainer import TrainingError, train  # after the options are known to be good: it is slow to import
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        result = train(config, command=[*launcher(), "training/train.py", *arguments])
    except (ValueError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None and PartialState().is_main_process:
        name, field = ("DDPMPipeline", "images")
        if '"DDPMPipeline1D"' in (result.pipeline_dir / "model_index.json").read_text():
            name, field = ("DDPMPipeline1D", "sequences")
        print(
            f"\nfrom ddpm_hf import {name}\n"
            f'pipe = {name}.from_pretrained("{result.pipeline_dir}")\n'
            f"{field} = pipe(batch_size=16).{field}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
