"""Train a diffusion model: options -> `ddpm_hf.train`.

    accelerate launch training/train.py                                   # the digits demo
    accelerate launch training/train.py --config training/configs/ecg.yaml
    accelerate launch training/train.py --train_data_dir photos/ --resolution 64 --output_dir runs/photos

Options come from --config (YAML), then from the command line; --help lists them.
"""

import os

PARENT = os.getppid()  # before the long imports, so that a launcher that ends while they run is noticed

import argparse
import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

from transformers import HfArgumentParser

from ddpm_hf.arguments import SuggestingParser
from ddpm_hf.config import HEADINGS, SOURCES, TrainConfig, read_yaml
from ddpm_hf.rules import declared, default_of

# Beside the package in a checkout, inside it where it is installed.
PRESETS = [Path(__file__).parents[2] / "training" / "configs", Path(__file__).parents[1] / "configs"]
DEMO = next(folder for folder in PRESETS if folder.is_dir()) / "digits.yaml"


class Parser(SuggestingParser, HfArgumentParser):
    """The options of dataclasses as arguments, with the one-line messages of `SuggestingParser`."""


def parse(arguments: list) -> TrainConfig:
    """Put the options together: the defaults, then those of --config, then those of the command line.

    Without --config and without a source of data, the file is that of the digits demo.

    Raises:
        ValueError: the file has an unknown option, a value breaks its rule, or an option does not apply.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=None)
    known, rest = first.parse_known_args(arguments)
    parser = Parser(
        HEADINGS,  # one argument group each
        usage="%(prog)s [--config file.yaml] [--option value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", default=None, help="YAML file of options; the command line overrides it.")
    named = {argument.split("=")[0].lstrip("-").replace("-", "_") for argument in rest}
    names_data = not named.isdisjoint(SOURCES)
    from_elsewhere = not named.isdisjoint(("continue_from", "init_from"))
    in_file = read_yaml(known.config or DEMO) if known.config or not (names_data or from_elsewhere) else {}
    parser.set_defaults(**in_file)
    if known.config and names_data:  # a file's source of data gives way to the command line's
        parser.set_defaults(**{source: None for source in SOURCES})
    options = vars(parser.parse_args(arguments))
    del options["config"]
    typed = typed_options(rest)
    if options["continue_from"] or options["init_from"]:  # options that are not given come from there
        given = {*typed, *in_file}
        return TrainConfig(**{name: value for name, value in options.items() if name in given})
    for f in dataclasses.fields(TrainConfig):  # the command line may turn off what an option in the file belongs to
        applies = declared(f).scope
        part_of_typed = f.name in in_file and f.name not in typed and applies and applies.option in typed
        if part_of_typed and not applies.holds(SimpleNamespace(**options)):
            options[f.name] = default_of(f)
    config = TrainConfig(**options)
    config.also_given(typed - set(in_file))  # an option that takes back the file's value may be at its default
    return config


def typed_options(arguments: list) -> set[str]:
    """Return the names of the options in a command line; --no_x counts as x."""
    names = {argument[2:].split("=")[0].replace("-", "_") for argument in arguments if argument.startswith("--")}
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    return {name if name in fields else name.removeprefix("no_") for name in names}


def main(arguments: list) -> int:
    """Train as the arguments say, and return the exit status: 2 after a mistake of the user or a failed run."""
    try:
        config = parse(arguments)
        # after the options are known to be good: they are slow to import
        from accelerate import PartialState

        from ddpm_hf.trainer import launcher
        from ddpm_hf.trainer.loop import TrainingError, train
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    launcher.first_parent = PARENT
    try:
        result = train(config, command=[*launcher.name(), "training/train.py", *arguments])
    except (ValueError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result is not None and PartialState().is_main_process:
        from ddpm_hf.hub.card import Parts, sampling_code

        parts = Parts(result.pipeline_dir)
        print(
            f"\nfrom ddpm_hf import {parts.kind}\n"
            f'pipe = {parts.kind}.from_pretrained("{result.pipeline_dir}")\n'
            f"{sampling_code(parts, 'batch_size=16')}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
