"""The form in which an option of a run is declared: a dataclass field with its help, its rule and its scope.

`ddpm_hf.options` declares the options with it, and `ddpm_hf.config` checks them from it.
"""

import dataclasses
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddpm_hf.reading import is_finite, is_whole
from ddpm_hf.scope import Scope


@dataclass(frozen=True)
class Rule:
    """A test of one option's value, and the words after "must be" in its error message.

    Attributes:
        holds: called with the value; returns True if the value is allowed.
        text: the words for the allowed values.
        is_choice: True if the rule is a list of values, which the option's help explains one by one.
    """

    holds: Callable[[Any], bool]
    text: str
    is_choice: bool = False


def whole_number(least: int, most: int | None = None) -> Rule:
    """Return the rule of integers from `least` to `most` (both included; None: no upper bound)."""
    if most is None:
        return Rule(lambda value: value >= least, f"a whole number of at least {least}")
    return Rule(lambda value: least <= value <= most, f"a whole number from {least} to {most}")


def one_of(*values: str) -> Rule:
    """Return the rule of a choice with many values, which the message lists."""
    return Rule(lambda value: value in values, f"one of {', '.join(values)}", is_choice=True)


def either(*values: Any) -> Rule:
    """Return the rule of a choice with few values, which the message quotes."""
    *others, last = map(repr, values)
    return Rule(lambda value: value in values, f"{', '.join(others)} or {last}", is_choice=True)


AT_LEAST_0 = Rule(lambda value: value >= 0, "at least 0")
ABOVE_0 = Rule(lambda value: value > 0, "greater than 0")
FROM_0_TO_1 = Rule(lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1 = Rule(lambda value: 0 <= value < 1, "in [0, 1)")


def _is_text(value: Any) -> bool:
    """Return True for text that can be encoded in UTF-8 (a file name need not be: Python keeps surrogates in it)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class NumberOrAuto:
    """The type of an option that is a finite number or the text "auto".

    Calling it, as the command line does, returns the number that a text or a number stands for, as a float. Anything
    else is returned as it is.
    """

    def __new__(cls, value: Any) -> Any:
        try:
            return value if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            return value


TYPE_RULES = {
    NumberOrAuto: Rule(lambda value: value == "auto" or is_finite(value), "'auto' or a finite number"),
    bool: Rule(lambda value: isinstance(value, bool), "true or false"),
    int: Rule(is_whole, "a whole number (of at most 64 bits)"),
    float: Rule(is_finite, "a finite number"),
    str: Rule(_is_text, "a text in UTF-8"),
    list[int]: Rule(
        lambda value: isinstance(value, list) and bool(value) and all(map(is_whole, value)), "one or more whole numbers"
    ),
    list[float]: Rule(
        lambda value: isinstance(value, list) and bool(value) and all(map(is_finite, value)),
        "one or more finite numbers",
    ),
    list[str]: Rule(lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of texts in UTF-8"),
}


def split_optional(annotation: Any) -> tuple[Any, bool]:
    """Return the type of an option without "| None", and True if it had that."""
    if not isinstance(annotation, types.UnionType):
        return annotation, False
    (kind,) = (part for part in annotation.__args__ if part is not types.NoneType)
    return kind, True


class Help(str):
    """The help of an option on the command line, with everything else that its field declares.

    It is a string because HfArgumentParser hands the whole metadata of a field to argparse, which takes only the help.

    Attributes:
        meaning: the help without the rule and the default.
        default: the words for the default; empty if the option is left out without effect.
        rule: the rule of the option's values, besides that of its type; None if every value of the type is allowed.
        scope: the circumstances in which the option has an effect; None if it always has one.
        off: the value that asks for nothing, which may be given anywhere.
        changeable: True if a resumed run may change the option, because it does not alter the trained weights.
    """

    meaning: str
    default: str
    rule: Rule | None
    scope: Scope | None
    off: Any
    changeable: bool


def option(
    default: Any, help: str, rule: Rule | None = None, applies: Scope | None = None, *, off: Any = None,
    changeable: bool = False, none: str = "",
) -> Any:  # fmt: skip
    """Return the dataclass field of an option.

    Args:
        default: the value of an option that is not given.
        help: the meaning, in sentences that end with a full stop.
        rule: as in `Help`.
        applies: the scope, as in `Help`.
        off: as in `Help`.
        changeable: as in `Help`.
        none: what happens at the default None, in words that follow "Default:".
    """
    meaning = f"{help} Applies to {applies.text}." if applies else help
    bounds = f" Must be {rule.text}." if rule and not rule.is_choice else ""
    shown = none if default is None else show(default)
    text = Help(f"{meaning}{bounds}{f' Default: {shown}.' if shown else ''}")
    text.default = shown
    text.meaning, text.rule, text.scope, text.off, text.changeable = meaning, rule, applies, off, changeable
    kind = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": text})


def declared(field: dataclasses.Field) -> Help:
    """Return what `option` has attached to a field."""
    return field.metadata["help"]


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field, made anew if it is a list."""
    return field.default_factory() if field.default is dataclasses.MISSING else field.default


def show(value: Any) -> str:
    """Return a value as one writes it on the command line."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
