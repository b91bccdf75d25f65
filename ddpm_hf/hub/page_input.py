"""Reading of what visitors of the Gradio page type and upload: checks, conversions, and the messages that are shown.

This file imports nothing of ddpm_hf, because the Spaces that `ddpm_hf.hub.publish` writes carry a copy of it.
"""

import contextlib
import warnings

import gradio as gr
import numpy as np
import pandas as pd
from PIL import Image, ImageOps

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # of Pillow, by the number of channels


def refused(message: str) -> gr.Error:
    """Return an error whose message the page shows; it leaves no traceback in the server's log."""
    return gr.Error(message, print_exception=False)


@contextlib.contextmanager
def told_on_the_page():
    """Show the warnings and the errors of the pipeline in a block on the page.

    Raises:
        gr.Error: if the pipeline raises an error about a value that it is given, or about samples of NaN.
    """
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, FloatingPointError) as error:
            raise refused(str(error)) from error
        finally:
            for text in dict.fromkeys(str(each.message) for each in kept if each.category is UserWarning):
                gr.Warning(text)


def number(name: str, value, low: float, high: float, kind: str = "lie in") -> float:
    """Return the value of a field that holds a number.

    Raises:
        gr.Error: if it is no number, or lies outside [low, high]; `name` and `kind` stand in the message.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN too
        raise refused(f"{name} must {kind} {low} to {high}, got {'nothing' if value is None else value}")
    return float(value)


def whole(name: str, value, low: int, high: int) -> int:
    """Return the value of a field as a whole number.

    Raises:
        gr.Error: if it is not a whole number, or lies outside [low, high]; `name` stands in the message.
    """
    kind = "be a whole number from"
    if number(name, value, low, high, kind) % 1:
        raise refused(f"{name} must {kind} {low} to {high}, got {value}")
    return int(value)


def image_levels(image, shape: tuple[int, ...]) -> np.ndarray:
    """Return an uploaded image, cropped and resized to a shape (C, H, W), as levels from 0 to 1, (H, W, C).

    Args:
        image: a PIL image, or the path of a picture.
        shape: the shape.

    Raises:
        gr.Error: if an image cannot have these channels, or the file cannot be read.
    """
    size, channels = shape[:0:-1], shape[0]  # (width, height)
    mode = MODES.get(channels)
    if mode is None:
        raise refused(f"the model's images have {channels} channels, and a picture cannot have them")
    try:
        image = image if isinstance(image, Image.Image) else Image.open(image)
        if image.mode.startswith("I") or image.mode == "F":
            image = deep_gray(image)
        elif channels in (1, 3):  # what is transparent becomes white
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        image = ImageOps.fit(image if image.mode == "F" else image.convert(mode), size)
    except gr.Error:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise refused("the file cannot be read as an image") from error
    if image.mode != "F":
        return (np.asarray(image, dtype=np.float32) / 255).reshape(size[1], size[0], channels)
    levels = np.asarray(image).clip(0, 1)[..., None].repeat(channels, axis=2)  # resizing overshoots
    if mode.endswith("A"):
        levels[..., -1] = 1
    return levels


def deep_gray(image: Image.Image) -> Image.Image:
    """Return an image of 16 bits, or of floats from 0 to 1, as one of floats from 0 to 1.

    Pillow's own conversion would clip 16 bits to 255.

    Raises:
        gr.Error: if values lie outside the range.
    """
    limit = 1 if image.mode == "F" else 65535
    values = np.asarray(image, dtype=np.float32)
    if not (values.min() >= 0 and values.max() <= limit):  # NaN too
        raise refused(f"values of the image must lie in 0 to {limit}, got {values.min():g} to {values.max():g}")
    return Image.fromarray(values / limit)


def load_numbers(file) -> np.ndarray:
    """Return the array of real numbers of an uploaded .npy file.

    Raises:
        gr.Error: if the file has none.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy raises many kinds
        raise refused(f"the file cannot be read as .npy: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufb":
        raise refused(f"the file must have real numbers, got {getattr(array, 'dtype', type(array).__name__)}")
    return array


def image_array(file, shape: tuple[int, ...]) -> np.ndarray:
    """Return the image (H, W, C) of an uploaded .npy file of a shape (C, H, W), or (H, W, C); one channel may be left
    out.

    Raises:
        gr.Error: if the file cannot be read, or has another shape or an infinite number.
    """
    array, (channels, *size) = load_numbers(file), shape
    if channels == 1 and array.shape == tuple(size):
        array = array[None]
    if array.shape == (*size, channels) != shape:
        array = np.moveaxis(array, -1, 0)
    if array.shape != shape or np.isinf(array).any():
        raise refused(
            f"the file must have finite numbers of the shape {shape}, got the shape {array.shape}"
            f"{' with infinity' if array.shape == shape else ''}"
        )
    return np.moveaxis(array, 0, -1).astype(np.float64)


def last_rows(file, columns, shape: tuple[int, int]) -> np.ndarray:
    """Return the last rows of a table's columns in a shape (C, rows), where missing values are NaN.

    Columns without names have the names 0, 1, 2, ...

    Args:
        file: the path of a CSV file.
        columns: the names of the columns, separated by commas; empty: the first columns of numbers.
        shape: the number of columns, and the number of rows.

    Raises:
        gr.Error: if the file is no table with these columns of numbers, or has fewer rows.
    """
    channels, rows = shape
    if not file:
        raise refused("there is no file yet: upload a CSV file first")
    try:
        table = pd.read_csv(file, header=None, dtype=str, comment="#", skipinitialspace=True)
    except (ValueError, OSError) as error:  # pandas' own errors, and those of the encoding, are ValueErrors
        raise refused(f"the file cannot be read as CSV: {error}") from error
    numbers = table.apply(pd.to_numeric, errors="coerce")
    has_names = numbers.iloc[0].isna().all()  # the first line may name the columns
    labels = [str(name).strip() for name in (table.iloc[0] if has_names else table.columns)]
    numbers = numbers[int(has_names) :].to_numpy(dtype=np.float64).T
    names = [name.strip() for name in (columns or "").split(",") if name.strip()]
    names = names or [name for name, row in zip(labels, numbers) if np.isfinite(row).any()][:channels]
    missing = [name for name in names if name not in labels]
    if missing:
        raise refused(f"the file has no column {', '.join(missing)}; its columns are {', '.join(labels[:20])}")
    if len(names) != channels:
        raise refused(f"the file must give as many columns of numbers as the model has channels, {channels}, got "
                      f"{len(names)}; its columns, separated by commas, are {', '.join(labels[:20])}")  # fmt: skip
    values = numbers[[labels.index(name) for name in names]]
    if values.shape[1] < rows:
        raise refused(f"the columns must have at least {rows} rows, got {values.shape[1]}")
    history = values[:, -rows:]
    if not np.isfinite(history).any(axis=1).all():
        raise refused(f"each of the columns {', '.join(names)} must have a number among its last {rows} rows")
    return np.where(np.isfinite(history), history, np.nan)


def sequence_condition(file, columns, shape: tuple[int, int]) -> np.ndarray:
    """Return the sequence of an uploaded file, which must have a shape (C, length).

    Args:
        file: the path of a .csv file, whose last rows are taken, or of a .npy file.
        columns: the names of the columns of a .csv file, as `last_rows` takes them.

    Raises:
        gr.Error: if the file cannot be read, or has another shape or numbers that are not finite.
    """
    if not str(file).lower().endswith(".npy"):
        series = last_rows(file, columns, shape)
    else:
        series = np.atleast_2d(load_numbers(file))
    if series.shape != shape or not np.isfinite(series).all():
        raise refused(
            f"the condition must be finite numbers of the shape {shape}, got {series.dtype} of the "
            f"shape {series.shape}{' with NaN or infinity' if series.shape == shape else ''}"
        )
    return series
