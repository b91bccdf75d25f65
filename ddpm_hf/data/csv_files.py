"""Tables in .csv files: their form is found in their first lines, and their numbers are read at once.

Files above `BIG` bytes are read as float32 where that is exact enough, block by block, in little more memory than the
array takes.
"""

import csv
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddpm_hf.data.labels import check_column
from ddpm_hf.data.sequences import MISSING_WAYS
from ddpm_hf.data.tables import choose_columns, named_columns

MISSING = ("", "nan", "na", "n/a", "null")  # cells that stand for a missing value, in any case
BIG = 1 << 26  # bytes of a file that is read as float32
LOOK = 100  # lines that tell the form of a file
COMMA_NUMBER = re.compile(r"[+-]?\d*,\d+([eE][+-]?\d+)?")
POINT_NUMBER = re.compile(r"[+-]?\d*\.\d+([eE][+-]?\d+)?")
DATE = re.compile(r"\d{1,4}[-/. ]\w{1,9}[-/. ]\d{1,4}\b.*")


class Form(NamedTuple):
    """The form of a file.

    Attributes:
        separator: the separator of cells, or the pattern of several spaces.
        header: True if the first line that is neither blank nor a comment names the columns.
        decimal: the decimal mark.
        found: True if a decimal comma was found, and not asked for.
        skipped: the number of lines before the first row of values.
    """

    separator: str
    header: bool
    decimal: str
    found: bool
    skipped: int

    def options(self) -> dict[str, Any]:
        """Return the options with which pandas reads the file."""
        return {"sep": self.separator, "header": 0 if self.header else None, "index_col": False, "comment": "#",
                "skipinitialspace": True, "encoding": "utf-8-sig"}  # fmt: skip


def read_csv(
    path: str,
    columns: Sequence[str] | None = None,
    leave_out: Mapping[str, str] | None = None,
    missing: bool = False,
    decimal: str | None = None,
    notes: list[str] | None = None,
    by_column: bool = False,
    names: list[str] | None = None,
) -> np.ndarray:
    """Return the numbers of a table, (rows, columns), float64, or float32 for a large file.

    Lines that are blank or begin with # are skipped. The first line that is left is a header if one of its cells has a
    letter and is no date. The cells are separated by comma, semicolon or tab, whichever that line has most of, or by
    spaces; by semicolons or tabs if the commas are then decimal marks. A column without a single number is left out,
    unless it is among `columns`.

    Args:
        columns: names of the columns to read; None: all.
        leave_out: columns that hold no sequences, by the option that names each.
        missing: cells may be missing (empty, or one of `MISSING`); they become NaN.
        decimal: "." or ","; None: it is found.
        notes: lines about what was left out or found are appended to it.
        by_column: the array lies in memory column by column.
        names: the names of the columns that were read are appended to it, if the table has names.

    Raises:
        ValueError: the file cannot be read, has no rows, or has a cell that is no finite number; the message names it.
    """
    notes = [] if notes is None else notes
    try:
        form = find_form(path, decimal)
        big = Path(path).stat().st_size >= BIG and len(form.separator) == 1
        present = _names(path, form) if columns or leave_out or big else []  # takes time where there are thousands
        chosen = choose_columns(columns, present, path, leave_out)
        numbers = None
        if big:
            numbers = _read_big(path, form, present, chosen, missing, by_column)
        table, left = None, []
        if numbers is None:
            numbers, table, left = _read_exactly(path, form, present, chosen, named=bool(columns))
    except (OSError, ValueError, Warning) as error:  # pandas' own errors are ValueErrors
        raise ValueError(f"cannot read the table {path}: {error}") from error
    if form.found:
        notes.append(f"decimal commas were found in {path}; to read it otherwise: --csv_decimal .")
    if left:
        notes.append(f"columns of {path} that hold no numbers are left out: {', '.join(left)}")
    if not len(numbers):
        raise ValueError(f"{path} has no rows")
    if table is not None:
        _check_cells(path, form, numbers, table, left, missing)
    if not columns:
        numbers = _without_row_numbers(path, form, numbers, left, notes)
    if names is not None and form.header:
        kept = [name for name in chosen or _names(path, form) if name not in left]
        names += kept[max(0, len(kept) - numbers.shape[1]) :]  # without a first column that counts the rows
    return numbers


def _without_row_numbers(path: str, form: Form, numbers: np.ndarray, left: list[str], notes: list[str]) -> np.ndarray:
    """Return the numbers of a table without a first column that has no name and counts the rows, as pandas writes it.

    Args:
        left: the names of columns of texts, which `numbers` lacks.
        notes: a line is appended to it.
    """
    counts = form.header and numbers.shape[1] > 1 and np.array_equal(numbers[:, 0], np.arange(len(numbers)))
    first = _names(path, form)[0] if counts else ""
    if not first.startswith("Unnamed: 0") or first in left:
        return numbers
    notes.append(f"the first column of {path}, which has no name and counts the rows, is left out")
    return numbers[:, 1:]


def _check_cells(path: str, form: Form, numbers: np.ndarray, table: Any, left: list[str], missing: bool) -> None:
    """Check that a table has a column of numbers, and a finite number in each cell unless it may be missing.

    Raises:
        ValueError: it has none, or has another cell.
    """
    import pandas

    if not numbers.shape[1]:
        raise ValueError(
            f"{path} must have a column of numbers; {', '.join(left)} hold none. Decimal commas are read by "
            "--csv_decimal ,"
        )
    bad = ~np.isfinite(numbers)
    cells = table.to_numpy()
    empty = pandas.Series(cells.ravel()).str.strip().str.lower().isin(MISSING).to_numpy().reshape(cells.shape)
    wrong = np.argwhere(bad & ~empty if missing else bad)
    if len(wrong):
        row, column = map(int, wrong[0])
        ways = f"{MISSING_WAYS}. " if empty[row, column] else ""
        comma = COMMA_NUMBER.fullmatch(cells[row, column].strip()) and form.decimal == "."
        ways += "For decimal commas: --csv_decimal ,. " if comma else ""
        raise ValueError(
            f"{path} must hold a finite number in every cell (rows all of one length): row {row} has "
            f"{cells[row, column]!r} in column {table.columns[column]!r}, one of {len(wrong)} such cells. {ways}"
            "To leave columns out, name the others: --sequence_columns"
        )


def _read_exactly(path: str, form: Form, present: list[str], chosen: list[str], named: bool) -> tuple:
    """Return the numbers of some columns in float64, their cells as texts, and the names of columns without a number.

    The texts are None if every cell is a finite number. Columns without a number are kept if `named`.
    """
    import pandas

    options = form.options()
    if named or len(chosen) < len(present):
        options["usecols"] = [present.index(name) for name in chosen]

    def read(**more):
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # rows of more values than names
            table = pandas.read_csv(path, **options, **more)
        table.columns = [str(name).strip() for name in table.columns]
        return table[list(chosen)] if named else table

    try:
        numbers = read(dtype=np.float64, decimal=form.decimal).to_numpy()
    except ValueError:
        numbers = np.full((1, 1), np.nan)  # some cell is not a number
    if np.isfinite(numbers).all():
        return numbers, None, []
    table = read(dtype=str, keep_default_na=False).fillna("")
    cells = pandas.Series(table.to_numpy().ravel())
    if form.decimal == ",":
        commas = cells.str.strip().str.fullmatch(COMMA_NUMBER.pattern)
        cells = cells.where(~commas, cells.str.replace(",", "."))
    numbers = pandas.to_numeric(cells, errors="coerce").to_numpy(np.float64).reshape(table.shape)
    left = []
    if not named:
        texts = np.isnan(numbers).all(axis=0) & [
            not table[name].str.strip().str.lower().isin(MISSING).all() if table.columns.is_unique else True
            for name in table.columns
        ]
        left = [name for name, is_text in zip(table.columns, texts) if is_text]
        numbers, table = numbers[:, ~texts], table.loc[:, ~texts]
    return numbers, table, left


def _read_big(
    path: str, form: Form, present: list[str], chosen: list[str], missing: bool, by_column: bool
) -> np.ndarray | None:
    """Return the numbers of some columns, or None where pandas must look at the cells.

    They are float32 if its rounding, 2^-24 of the largest number, is at most 5e-7 of the range of every column; else
    float64. The blocks of the file are freed while they are copied into the array, so that both take little more memory
    than the array.
    """
    import pyarrow
    from pyarrow import csv as arrow_csv

    if len(set(present)) < len(present):
        return None
    for kind in (pyarrow.float32(), pyarrow.float64()):
        nulls = sorted({form(word) for word in MISSING for form in (str, str.upper, str.title)} | {"NaN", "N/a"})
        try:
            table = arrow_csv.read_csv(
                path,
                # in one thread: several ones queue any number of blocks as text, which takes more than the array
                arrow_csv.ReadOptions(skip_rows=form.skipped, column_names=present, use_threads=False),
                arrow_csv.ParseOptions(delimiter=form.separator),
                arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(chosen, kind), include_columns=chosen, decimal_point=form.decimal,
                    null_values=nulls if missing else [],
                ),
            )  # fmt: skip
        except pyarrow.ArrowInvalid:  # a comment, or a cell that is no number
            return None
        shape = (len(chosen), table.num_rows) if by_column else (table.num_rows, len(chosen))
        numbers = np.empty(shape, kind.to_pandas_dtype())
        numbers = numbers.T if by_column else numbers
        blocks, start = table.to_batches()[::-1], 0
        del table  # the blocks alone hold its memory now
        while blocks:
            block = blocks.pop()
            for place in range(len(chosen)):
                numbers[start : start + len(block), place] = block.column(place).to_numpy(zero_copy_only=False)
            start += len(block)
            del block
            pyarrow.default_memory_pool().release_unused()
        exact = True
        for column in numbers.T:
            if np.isinf(column).any() or (not missing and np.isnan(column).any()):
                return None
            low, high = np.fmin.reduce(column), np.fmax.reduce(column)
            exact &= bool(max(abs(low), abs(high)) <= 8 * (high - low))
        if exact or kind == pyarrow.float64():
            return numbers
        del numbers, column
    return None


def csv_column(path: str, column: str) -> list[str]:
    """Return the cells of one column of a table.

    Raises:
        ValueError: the table cannot be read, or has no such column.
    """
    import pandas

    try:
        form = find_form(path)
        present = _names(path, form)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the table {path}: {error}") from error
    check_column(column, present, path)
    options = form.options() | {"usecols": [present.index(column)]}
    table = pandas.read_csv(path, dtype=str, keep_default_na=False, **options)
    return [text.strip() for text in table.iloc[:, 0]]


def csv_columns(path: str, text: str, option: str) -> list[str]:
    """Return the columns of a table that a text names, separated by commas.

    Raises:
        ValueError: the table cannot be read, or has no such column; the message has the name of the option.
    """
    try:
        present = _names(path, find_form(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the table {path}: {error}") from error
    names = named_columns(text, present)
    for name in names:
        check_column(name, present, path, option=option)
    return names


def _names(path: str, form: Form) -> list[str]:
    """Return the names of a table's columns."""
    import pandas

    first = pandas.read_csv(path, nrows=0 if form.header else 1, dtype=str, **form.options())
    return [str(name).strip() for name in first.columns]


def find_form(path: str, decimal: str | None = None) -> Form:
    """Find the form of a table in its first lines.

    Args:
        decimal: the decimal mark; None: it is found.

    Raises:
        ValueError: there are only comments, or the first row has another number of cells than the header.
    """
    lines, places = [], []
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, line in enumerate(file):
            if line.strip() and not line.lstrip().startswith("#"):
                lines.append(line)
                places.append(number)
            if len(lines) == LOOK:
                break
    if not lines:
        raise ValueError("it has no rows")
    first = lines[0]
    unquoted = re.sub('"[^"]*"', "", first)
    separator = max(",;\t", key=unquoted.count)
    for other in ";\t":  # commas may be decimal marks
        if separator == "," and other in unquoted and _fit_decimal_commas(lines, other):
            separator = other
    if decimal is None and separator == "," and not {";", "\t"} & set(unquoted) and _has_spaced_commas(lines):
        return Form(r"\s+", False, ",", True, places[0])
    if decimal == "," and separator == "," and '"' not in first:
        separator = ";" if ";" in unquoted else "\t" if "\t" in unquoted else r"\s+"
    split = first.replace(",", ".") if decimal == "," else first
    if separator == r"\s+" or (separator not in unquoted and len(split.split()) > 1):
        if all(map(is_number, split.split())):
            return Form(r"\s+", False, decimal or ".", False, places[0])
        separator = ";" if separator == r"\s+" else separator

    rows = [_cells(line, separator) for line in lines]
    # a date or a decimal comma is a wrong cell of the first row, not a name
    header = any(any(map(str.isalpha, cell)) and not is_number(cell) and not DATE.match(cell) for cell in rows[0])
    if header and len(rows) > 1 and len(rows[0]) != len(rows[1]):
        raise ValueError(
            f"the header must have a name for each value of a row, got {len(rows[0])} names and {len(rows[1])} values"
        )
    found = decimal is None and separator in ";\t" and _has_decimal_commas(rows[header:])
    return Form(separator, header, decimal or ("," if found else "."), found, places[0] + header)


def _fit_decimal_commas(lines: list[str], separator: str) -> bool:
    """Return True if the commas of all rows but the first line are decimal marks once `separator` splits the cells."""
    rows = [_cells(line, separator) for line in (lines[1:] or lines)]
    alike = len({len(row) for row in rows}) == 1 and len(rows[0]) > 1
    return alike and all(COMMA_NUMBER.fullmatch(cell.strip()) for row in rows for cell in row if "," in cell)


def _has_spaced_commas(lines: list[str]) -> bool:
    """Return True if spaces separate several numbers in each line, and all of them have decimal commas."""
    rows = [line.split() for line in lines]
    alike = len({len(row) for row in rows}) == 1 and len(rows[0]) > 1
    return alike and all(COMMA_NUMBER.fullmatch(cell) for row in rows for cell in row)


def _has_decimal_commas(rows: list[list[str]]) -> bool:
    """Return True if some cells are numbers with a decimal comma, and none is one with a point."""
    cells = [cell.strip() for row in rows for cell in row]
    return any(map(COMMA_NUMBER.fullmatch, cells)) and not any(map(POINT_NUMBER.fullmatch, cells))


def _cells(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator, skipinitialspace=True))


def is_number(text: str) -> bool:
    """Return True for the text of a number, such as "1e3" or "nan"; 1_0, a number for Python, is a name."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
