"""Command lines of the programs: the message for an unknown option names the nearest one that exists."""

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
    """A parser that reports a mistake in one line, with the nearest option for an unknown one, and exits with status 2.

    Options must be written out: an abbreviation is an unknown option.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{**options, "allow_abbrev": False})

    def parse_args(self, args=None, namespace=None):
        found, rest = self.parse_known_args(args, namespace)
        for argument in rest:
            if argument.startswith("-"):
                # the one place where argparse has the options of its argument groups too
                self.error(unknown_option(argument.split("=")[0], self._option_string_actions))
        if rest:
            self.error(f"unexpected {' '.join(rest)}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")
