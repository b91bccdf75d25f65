"""The door of the data: `open_data` turns options, or a dataset given from Python, into a feed for training.

The kind of data is chosen here, in `kind_of_source`, and each kind is opened by one function below. From here on every
call leads down: sources (`images`, `tables`, `sequence_files`) -> datasets (`ImageDataset`, `SequenceDataset`,
`ImageStream`) -> `loading` -> `feed`.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddpm_hf.config import BUNDLED, SOURCES, TrainConfig
from ddpm_hf.data import tables
from ddpm_hf.data.conditions import array_conditions, folder_conditions, image_conditions, sequence_conditions
from ddpm_hf.data.feed import StoredFeed, StreamedFeed, is_map_style
from ddpm_hf.data.given import GivenUnits
from ddpm_hf.data.images import ImageDataset, digits, find_images, image_folder, subfolder_labels
from ddpm_hf.data.labels import Labels, check_column, table_labels
from ddpm_hf.data.listing import Listing, list_folder
from ddpm_hf.data.ranges import dark_warning
from ddpm_hf.data.recordings import ENDINGS, RecordingDataset, open_recordings, recording_files, rows_as_recordings
from ddpm_hf.data.scientific_images import ScientificImages, array_shape, is_scientific
from ddpm_hf.data.sequence_files import read_condition, read_labels, read_sequences
from ddpm_hf.data.sequences import SequenceDataset, as_sequences, ecg, read_scans
from ddpm_hf.data.streaming import ImageStream


def open_data(config: TrainConfig, dataset: Any = None) -> StoredFeed | StreamedFeed:
    """Open the data that a configuration names, or a map-style dataset given from Python, for training.

    Raises:
        ValueError: both or neither are given, or the data does not fit the options.
    """
    named = [name for name in SOURCES if getattr(config, name)]
    if dataset is not None and named:
        raise ValueError(f"give one source of data, got a dataset and {named[0]}={getattr(config, named[0])!r}")
    kind = None
    if dataset is None:
        kind, dataset = _opened(config)
    elif config.image_norm is not None or config.image_range is not None:
        if isinstance(dataset, (ImageDataset, SequenceDataset, ScientificImages, ImageStream)):
            option = "image_norm" if config.image_norm else "image_range"
            raise ValueError(
                f"{option} is for tensors and arrays given from Python, and {type(dataset).__name__} has a scaling of "
                f"its own; got {getattr(config, option)!r}"
            )
        if not is_map_style(dataset) or not len(dataset):
            StoredFeed(dataset, config)  # refuses it
        dataset = GivenUnits(dataset, config.image_norm, config.image_range)
    feed = (StreamedFeed if isinstance(dataset, ImageStream) else StoredFeed)(dataset, config, kind)
    config.check_scope(feed.kind)
    return feed


def build_dataset(config: TrainConfig, **own_units: Any) -> ImageDataset | ImageStream | SequenceDataset:
    """Open the source of data that a configuration names.

    Args:
        own_units: further arguments of `ScientificImages`, for images in units of their own.

    Raises:
        ValueError: it names no source, nothing is found there, or the data does not fit the options.
    """
    return _opened(config, own_units)[1]


def _opened(
    config: TrainConfig, own_units: dict | None = None
) -> tuple[str, ImageDataset | ImageStream | SequenceDataset]:
    """Open the source of data that a configuration names; return its kind and the dataset."""
    listing = list_folder(config.train_data_dir) if config.train_data_dir else None  # once: there may be many files
    kind = kind_of_source(config, listing)
    config.check_scope(kind)
    if kind in ("data folder", "image array"):
        return kind, OPENERS[kind](config, listing, **own_units or {})
    return kind, OPENERS[kind](config, listing) if kind in LISTED else OPENERS[kind](config)


def kind_of_source(config: TrainConfig, listing: Listing | None = None) -> str:
    """Return the kind of data, of `scope.KINDS`, that a configuration names.

    Args:
        listing: the content of the folder `train_data_dir`, if it has been listed already.

    Raises:
        ValueError: it names none, or asks for streaming of data that cannot be streamed.
    """
    if config.dataset_name in BUNDLED:
        return config.dataset_name
    if config.train_data_file:
        return _kind_of_file(config)
    if config.train_data_dir and not tables.table_folder(config.train_data_dir, listing):
        if config.streaming:
            raise ValueError(
                f"streaming is for tables; the images of {config.train_data_dir} are read as needed anyway"
            )
        if holds_recordings(config.train_data_dir, listing):
            return "recordings"
        return "data folder" if _has_own_units(config, listing or list_folder(config.train_data_dir)) else "folder"
    if not (config.train_data_dir or config.dataset_name):
        raise ValueError("no data: give one of dataset_name, train_data_dir, train_data_file, or a dataset from Python")
    if config.streaming:
        return "image stream"
    return "sequence table" if config.sequence_columns else "image table"


def holds_recordings(folder: str, listing: Listing | None = None) -> bool:
    """Return True if a folder holds recordings and nothing that is read as an image."""
    files = (listing or list_folder(folder)).files
    endings = {Path(file).suffix.lower() for file in files}
    return bool(endings & set(ENDINGS)) and not endings & {*Image.registered_extensions(), ".npy"}


def _kind_of_file(config: TrainConfig) -> str:
    """Return the kind of data in a file: an array of four dimensions holds images, and so does one of three where an
    option of images is given."""
    path = config.train_data_file
    if Path(path).suffix.lower() in ENDINGS or Path(path).is_dir():
        return "recordings"
    if Path(path).suffix.lower() not in (".npy", ".npz"):
        return "sequence file"
    shape = array_shape(path, _left_out(config).values())
    asked = (config.resolution, config.image_channels, config.image_norm, config.image_range)
    images = shape is not None and (len(shape) == 4 or len(shape) == 3 and any(each is not None for each in asked))
    return "image array" if images else "array"


def _has_own_units(config: TrainConfig, listing: Listing) -> bool:
    """Return True if the images of a folder are in units of their own.

    They are if an option says so, by image_norm, image_range or image_channels; if the first image is scientific; or if
    there are .npy files and no other images.
    """
    if config.image_norm is not None or config.image_range is not None or config.image_channels not in (None, 1, 3, 4):
        return True
    try:
        return is_scientific(find_images(config.train_data_dir, listing)[0][0])
    except ValueError:  # there are no images, which is told when they are opened
        return any(path.lower().endswith(".npy") for path in listing.files)


# ---------------------------------------------------------------------------------------------
# One function for each kind


def _resolution(config: TrainConfig, default: int) -> tuple[int, int]:
    given = config.resolution or [default]
    return tuple(given * 2 if len(given) == 1 else given)


def _picture_channels(config: TrainConfig, default: int = 3) -> int:
    """Return the channels of pictures of 8 bits.

    Raises:
        ValueError: another number is asked for.
    """
    if config.image_channels not in (None, 1, 3, 4):
        raise ValueError(f"image_channels must be 1, 3 or 4 for {_name(config)}, got {config.image_channels}")
    return config.image_channels or default


def _name(config: TrainConfig) -> str:
    return config.dataset_name or config.train_data_dir


def _crops(config: TrainConfig) -> dict[str, Any]:
    return {"center_crop": config.center_crop, "random_flip": config.random_flip, "cache_gb": config.cache_gb}


def _open_digits(config: TrainConfig) -> ImageDataset:
    if config.class_labels not in (None, "label"):
        raise ValueError(f"class_labels of the digits must be 'label', got {config.class_labels!r}")
    classes = config.class_labels is not None
    return digits(_resolution(config, 8), _picture_channels(config, 1), classes, **_crops(config))


def _open_ecg(config: TrainConfig) -> SequenceDataset:
    return ecg(config.sequence_length or 256, config.stride or 2, config.sequence_norm)


def _check_folder_classes(config: TrainConfig) -> None:
    if config.class_labels not in (None, "folder"):
        raise ValueError(
            "class_labels of a folder of images must be 'folder', which takes the names of its subfolders; got "
            f"{config.class_labels!r}"
        )


def _open_folder(config: TrainConfig, listing: Listing | None = None) -> ImageDataset:
    _check_folder_classes(config)
    classes, size = config.class_labels is not None, _resolution(config, 64)
    data = image_folder(config.train_data_dir, size, _picture_channels(config), classes, listing, **_crops(config))
    data.notes = [*data.notes, *(warning for warning in [dark_warning(data)] if warning)]
    data.condition = _folder_conditions(config, data)
    return data


def _folder_conditions(config: TrainConfig, data: ImageDataset | ScientificImages) -> Any:
    """Return the conditions of the images of a folder, or None without condition_dir."""
    if config.condition_dir is None:
        return None
    skip = config.on_bad_image == "skip"
    return folder_conditions(config.condition_dir, config.train_data_dir, data, config.channels_last, skip)


def _own_units(config: TrainConfig) -> dict[str, Any]:
    """Return the options of `ScientificImages` that a configuration has."""
    return {
        "channels": config.image_channels, "norm": config.image_norm, "value_range": config.image_range,
        "center_crop": config.center_crop, "random_flip": config.random_flip, "channels_last": config.channels_last,
        "skip_bad": config.on_bad_image == "skip", "scans": read_scans(config.output_dir),
    }  # fmt: skip


def _open_data_folder(config: TrainConfig, listing: Listing | None = None, **own_units: Any) -> ScientificImages:
    _check_folder_classes(config)
    folder = config.train_data_dir
    listing = listing or list_folder(folder)
    try:
        paths, notes = find_images(folder, listing)
    except ValueError:
        paths, notes = find_images(folder, listing, more=(".npy",))
    labels = None if config.class_labels is None else subfolder_labels(Path(folder), paths)
    name = os.path.basename(os.path.normpath(folder))
    data = ScientificImages(paths, _resolution(config, 64), labels=labels, name=name, **_own_units(config), **own_units)
    data.notes = [*notes, *data.notes]
    data.condition = _folder_conditions(config, data)
    return data


def _open_image_array(config: TrainConfig, listing: Listing | None = None, **own_units: Any) -> ScientificImages:
    path = config.train_data_file
    array = read_sequences(path, leave_out=_left_out(config))
    labels = None if config.class_labels is None else read_labels(path, config.class_labels, len(array))
    size = None if config.resolution is None else _resolution(config, 64)
    data = ScientificImages(array, size, labels=labels, name=path, **_own_units(config), **own_units)
    if config.condition_column is not None:
        where = f"{config.condition_column!r} of {path}"
        condition = read_condition(path, config.condition_column)
        data.condition = array_conditions(condition, data, where, config.channels_last)
    return data


def _open_image_table(config: TrainConfig) -> ImageDataset:
    table, name = open_table(config)
    column = tables.image_column(tables.features(table), config.image_column, name)
    images, labels = tables.ImageColumn(table, column), _table_labels(config, table, name)
    size = _resolution(config, 64)
    data = ImageDataset(images, size, _picture_channels(config), labels=labels, **_crops(config))
    if config.condition_column is not None:
        check_column(config.condition_column, table.column_names, name, option="condition_column")
        where = f"the column {config.condition_column!r} of {name}"
        data.condition = image_conditions(tables.ImageColumn(table, config.condition_column), data, where)
    return data


def _open_image_stream(config: TrainConfig) -> ImageStream:
    table, name = open_table(config)
    column = tables.image_column(tables.features(table), config.image_column, name)
    form = ImageDataset((), _resolution(config, 64), _picture_channels(config), config.center_crop, config.random_flip)
    return ImageStream(
        table, column, form, config.shuffle_buffer, name, config.class_labels, config.condition_column,
        config.num_samples,
    )  # fmt: skip


def _open_sequence_file(config: TrainConfig) -> SequenceDataset:
    path, is_table = config.train_data_file, kind_of_source(config) == "sequence file"
    if config.csv_decimal is not None and not path.lower().endswith(".csv"):
        raise ValueError(f"csv_decimal applies to .csv files; got {config.csv_decimal!r} with {path}: leave it out")
    gaps, notes = config.condition == "known" or config.on_missing != "stop", []
    names: list[str] = []
    array = read_sequences(
        path, config.sequence_columns, config.stride is not None, _left_out(config), gaps, config.csv_decimal, notes,
        names,
    )  # fmt: skip
    is_recording = config.recording or len(array.shape) == 1
    if not is_table:
        array = _arranged(config, array, path)
    labels = None
    if config.class_labels is not None:
        if is_recording:
            raise ValueError(
                f"class_labels needs a class for each sequence, and {path} holds one recording, which would have a "
                f"single class; got {config.class_labels!r}: leave it out"
            )
        _check_not_recording(config, array, path, is_table)
        labels = read_labels(path, config.class_labels, array.shape[0])
    data = _cut(config, array, path, labels)
    data.channel_names = names if len(names) == data.array.shape[1] else None
    data.notes[:0] = notes
    if config.condition_column is not None:
        where = f"{config.condition_column!r} of {path}"
        condition = read_condition(path, config.condition_column, config.stride is not None, gaps, config.csv_decimal)
        if is_recording and condition.ndim < 3:  # (points,), or (channels, points) as the items
            condition = np.atleast_2d(condition.T if config.channels_last else condition)[None]
        elif config.channels_last and condition.ndim == 3:
            condition = np.swapaxes(condition, 1, 2)
        data.condition = sequence_conditions(condition, data, where, config.on_missing == "interpolate")
    return data


def _open_recordings(config: TrainConfig, listing: Listing | None = None) -> RecordingDataset:
    if config.class_labels not in (None, "folder"):
        raise ValueError(
            "class_labels of recordings must be 'folder', which takes the names of the subfolders; got "
            f"{config.class_labels!r}"
        )
    path = config.train_data_file or config.train_data_dir
    if not Path(path).exists():
        raise ValueError(f"train_data_file must be a file on disk, got {path}: No such file")
    files = recording_files(path, listing.files if listing else None)
    labels = None
    if config.class_labels is not None:
        labels = Labels.read([Path(file).parent.name for file in files], f"the subfolders of {path}")
    if config.on_missing == "interpolate":
        raise ValueError("on_missing must be stop, drop or mask for recordings in files, got 'interpolate'")
    _check_mask(config)
    return RecordingDataset(
        open_recordings(files), path, config.sequence_norm, config.sequence_length, config.stride, labels,
        drop=config.on_missing == "drop", missing=config.condition == "known",
    )  # fmt: skip


def _arranged(config: TrainConfig, array: Any, name: str) -> Any:
    """Return the array of a file as the options say: its channels first, and a recording as one sequence.

    Raises:
        ValueError: an option does not fit the number of dimensions.
    """
    shape = tuple(array.shape)
    if config.recording:
        if len(shape) > 2 or config.stride is None:
            raise ValueError(
                f"recording needs an array (channels, points), and stride, which cuts its windows; {name} has the "
                f"shape {shape}, and stride is {config.stride}"
            )
        array = np.atleast_2d(array.T if config.channels_last else array)[None]
        if array.shape[1] > array.shape[2]:
            other = "without" if config.channels_last else "with"
            warnings.warn(
                f"{name} of shape {shape} is taken for one recording of {array.shape[1]:,} channels and "
                f"{array.shape[2]:,} points. If it is the other way round: {other} --channels_last",
                stacklevel=2,
            )
    elif config.channels_last:
        if len(shape) != 3:
            raise ValueError(f"channels_last needs an array (N, length, channels); {name} has the shape {shape}")
        array = np.swapaxes(array, 1, 2)
    elif len(shape) == 3 and 0 < shape[2] < shape[1]:
        warnings.warn(
            f"{name} of shape {shape} is taken for {shape[1]} channels of length {shape[2]}, because its last axis is "
            "time. A length below the number of channels is rare: if the last axis is the channels, --channels_last",
            stacklevel=2,
        )
    elif len(shape) == 2 and config.stride is not None and shape[0] > 1 and config.class_labels is None:
        warnings.warn(
            f"{name} of shape {shape} is taken for {shape[0]:,} sequences of one channel. If it is one recording of "
            f"{shape[0]:,} channels: --recording",
            stacklevel=2,
        )
    return array


def _open_sequence_table(config: TrainConfig) -> SequenceDataset:
    table, name = open_table(config)
    left_out = _left_out(config)
    names: list[str] = []
    array = tables.table_sequences(table, config.sequence_columns, config.stride is not None, name, left_out, names)
    _check_not_recording(config, array, name)
    data = _cut(config, array, name, _table_labels(config, table, name))
    data.channel_names = names or None
    if config.condition_column is not None:
        condition = tables.table_condition(table, config.condition_column, config.stride is not None, name)
        where = f"the column {config.condition_column!r} of {name}"
        data.condition = sequence_conditions(condition, data, where, config.on_missing == "interpolate")
    return data


OPENERS = {
    "digits": _open_digits,
    "ecg": _open_ecg,
    "folder": _open_folder,
    "data folder": _open_data_folder,
    "image array": _open_image_array,
    "image table": _open_image_table,
    "image stream": _open_image_stream,
    "sequence table": _open_sequence_table,
    "sequence file": _open_sequence_file,
    "array": _open_sequence_file,
    "recordings": _open_recordings,
}
LISTED = ("folder", "data folder", "recordings")  # kinds that are given the listing of their folder


def open_table(config: TrainConfig) -> tuple[Any, str]:
    """Return the table that a configuration names, and its name in messages."""
    if config.train_data_dir:
        return tables.open_folder(config.train_data_dir, config.dataset_split, config.streaming), config.train_data_dir
    name = config.dataset_name
    return tables.open_named(name, config.dataset_config_name, config.dataset_split, config.streaming), name


def _left_out(config: TrainConfig) -> dict[str, str]:
    """Return the columns or arrays that hold no sequences, by the option that names each."""
    options = {"class_labels": config.class_labels, "condition_column": config.condition_column}
    return {option: column for option, column in options.items() if column is not None}


def _table_labels(config: TrainConfig, table: Any, name: str) -> Labels | None:
    return None if config.class_labels is None else table_labels(table, config.class_labels, name)


def _check_not_recording(config: TrainConfig, array: Any, name: str, is_table: bool = True) -> None:
    """Check that a table with classes has a sequence in each row.

    Raises:
        ValueError: its rows are points in time of one recording.
    """
    points = is_table and config.stride is not None and not isinstance(array, tables.ListColumns)
    if config.class_labels is not None and points:
        raise ValueError(
            f"class_labels needs a class for each sequence, and with stride the rows of {name} are points in time of "
            "one recording: leave stride out, or give columns of lists"
        )


def _check_mask(config: TrainConfig) -> None:
    """Check that missing values are masked only for models that complete."""
    if config.on_missing == "mask" and config.condition != "known":
        raise ValueError("on_missing 'mask' needs --condition known, which trains the model on what is known; got "
                         f"condition {config.condition!r}")  # fmt: skip


def _cut(config: TrainConfig, array: Any, name: str, labels: Labels | None = None) -> SequenceDataset:
    """Cut windows if a stride is given; otherwise take whole sequences, or their first `sequence_length` samples."""
    _check_mask(config)
    length, missing = config.sequence_length, config.condition == "known"
    if length is not None and len(array.shape) >= 1 and array.shape[-1] < length:
        # the rows of a table may as well be points in time
        long = len(array.shape) == 2 and array.shape[0] >= length and config.stride is None
        way_out = f"; to cut windows of {length} from a table whose rows are points in time: --stride" if long else ""
        raise ValueError(f"sequence_length must be at most the data's length {array.shape[-1]}, got {length}{way_out}")
    if config.on_missing == "drop":
        if config.condition_column is not None:
            raise ValueError("on_missing must be stop or interpolate with condition_column, got 'drop'")
        array = as_sequences(array, name, is_recording=config.stride is not None)
        return RecordingDataset(
            rows_as_recordings(array, name), name, config.sequence_norm, length, config.stride, labels, drop=True
        )
    # a stride as long as the sequence leaves room for a single window, at the start
    stride = config.stride or (None if length is None else array.shape[-1])
    fill, scans = config.on_missing == "interpolate", read_scans(config.output_dir)
    return SequenceDataset(array, name, config.sequence_norm, length, stride, labels, missing, fill, scans)
