"""Command lines of the programs: unknown options, for which the message names the nearest one, and options that have
an effect only beside others."""

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn


def unknown_option(name: str, known: Iterable[str]) -> str:
    """Return the message for an unknown option, with the nearest of the known ones."""
    bare = {option.lstrip("-"): option for option in known}  # dashes would make short names alike
    near = difflib.get_close_matches(name.lstrip("-"), bare, n=1)
    return f"unknown option {name!r}" + (f"; did you mean {bare[near[0]]}?" if near else "")


class Need(NamedTuple):
    """The circumstance that options need to have an effect.

    Attributes:
        options: the names of the options.
        holds: called with the facts of a call; returns true if the options have an effect.
        text: the words after "applies to", a format string in which `{c.name}` is a fact.
        found: the words after the value in the message, such as "for sequences"; also a format string.
    """

    options: tuple[str, ...]
    holds: Callable[[Any], Any]
    text: str
    found: str = ""


def check_needs(needs: Iterable[Need], asked: Mapping[str, Any], facts: Any) -> None:
    """Check that every option that is asked for has an effect.

    Args:
        needs: what options need.
        asked: the options that are not at their defaults, with their values.
        facts: an object whose attributes are the facts that `holds` reads.

    Raises:
        ValueError: one has none; the message has what it applies to, and its value.
    """
    for need in needs:
        for name in need.options:
            if name in asked and not need.holds(facts):
                text, found = need.text.format(c=facts), need.found.format(c=facts)
                got = f"{asked[name]!r} {found}".rstrip()
                raise ValueError(f"--{name} applies to {text}; got {got}: leave it out")


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

    def asked(self, given: argparse.Namespace) -> dict[str, Any]:
        """Return the options that are not at their defaults, with their values."""
        return {name: value for name, value in vars(given).items() if value != self.get_default(name)}

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")
