"""Command lines of the programs: an option that does not exist is answered with the nearest one that does."""

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn


def unknown_option(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown option, with the nearest of the known ones."""
    bare = {option.lstrip("-"): option for option in known}  # dashes would make short names alike
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    return f"unknown option {name!r}" + (f"; did you mean {bare[near[0]]}?" if near else "")


class SuggestingParser(argparse.ArgumentParser):
    """A parser that ends with status 2 and one line: what is wrong, and the nearest option where one is unknown.

    Options must be written out: an abbreviation is an unknown option.
    """

    def __init__(self, *arguments, **options):
        self.known_names: list[str] = []
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def add_argument(self, *names, **options):
        action = super().add_argument(*names, **options)
        self.known_names += action.option_strings
        return action

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        for argument in rest:
            if argument.startswith("-"):
                self.error(unknown_option(argument.split("=")[0], self.known_names))
        if rest:
            self.error(f"unexpected {' '.join(rest)}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")
