"""Options of the data: where items come from, how they are read, and how they get into memory."""

from dataclasses import dataclass

from ddpm_hf import scope
from ddpm_hf.rules import AT_LEAST_0, Rule, either, one_of, option, whole_number

SEQUENCE_NORMS = ("minmax", "meanstd")
IMAGE_NORMS = ("bits", "minmax", "meanstd")


@dataclass
class DataOptions:
    """Where the items come from: exactly one source, unless a dataset is given from Python."""

    _argument_group_name = "Data"

    dataset_name: str | None = option(
        None, "Bundled data: 'digits' (8x8 images) or 'ecg' (windows of a recording); or the name of a dataset on the "
        "Hub, or a local folder that the datasets library can load."
    )  # fmt: skip
    dataset_config_name: str | None = option(
        None, "Configuration of the dataset on the Hub.", applies=scope.NAMED_TABLES
    )
    dataset_split: str = option(
        "train", "Split of a dataset on the Hub, or of a folder of tables.", applies=scope.TABLES
    )
    train_data_dir: str | None = option(
        None, "Folder of images, searched with its subfolders, in any format that Pillow reads except EPS; or of "
        "tables of images: a dataset saved to disk, .parquet, .arrow, or webdataset .tar files. TIFF files with values "
        "of any range or any number of bands, and .npy files with an image each, are scientific images: their samples "
        "are in the units of the data."
    )  # fmt: skip
    train_data_file: str | None = option(
        None, "File of sequences or images. Array .npy or .npz: sequences (N, channels, length), or (N, length) for "
        "one channel; images (N, channels, height, width), or (N, height, width) if an option of images is given. "
        "Table .csv: each row is a sequence; with stride, each row is a point in time and each column a channel. "
        "Table .parquet: as .csv, or each column is a channel whose cells are lists. Recordings .wav, .flac, .edf or "
        "WFDB's .hea, or a folder of them; with stride, they may have any lengths."
    )  # fmt: skip
    channels_last: bool = option(
        False, "Arrays have their channels last: images (N, height, width, channels), also those of .npy files in a "
        "folder, and sequences (N, length, channels).", applies=scope.ARRAYS, off=False,
    )  # fmt: skip
    image_column: str | None = option(
        None, "Column of the images in a table.",
        none="the only column of images, or the one with a usual name (image, jpg, ...)", applies=scope.IMAGE_TABLES,
    )  # fmt: skip
    sequence_columns: list[str] | None = option(
        None, "Columns of the sequences in a table. To read sequences, dataset_name needs them.",
        none="all columns", applies=scope.SEQUENCE_TABLES,
    )  # fmt: skip
    class_labels: str | None = option(
        None, "Where the classes of the items are. Folder of images: 'folder', for the names of its subfolders. "
        "Digits: 'label'. Table: a column (ClassLabel, whole numbers or texts). Array: another array of the .npz file, "
        "or a file (.npy, .csv, .txt) with a class for each sequence. Dataset from Python: an entry of the items if "
        "they are dicts, any name if they are pairs (x, y).",
        Rule(bool, "a name or a file"), scope.CLASSES, none="no classes",
    )  # fmt: skip
    condition_column: str | None = option(
        None, "Where the condition of each item is: an image or a sequence of the item's size, or of that size divided "
        "by a whole number. Table of images: a column. Table of sequences: a column, or several that commas separate. "
        "Array: another array of the .npz file, or a .npy file. Dataset from Python: an entry of the items if they are "
        "dicts, any name if they are (x, condition), or (x, y, condition) with class_labels.",
        Rule(bool, "a name or a file"), scope.PAIRS, none="no conditions",
    )  # fmt: skip
    condition_dir: str | None = option(
        None, "Folder of the conditions of the images in train_data_dir, each under the same path up to its ending. "
        "They have the size of the images, or that size divided by a whole number, and may be .npy or TIFF files.",
        Rule(bool, "a folder"), scope.PAIR_FOLDERS, none="no conditions",
    )  # fmt: skip
    holdout: int = option(
        0, "Number of items that are kept out of training, drawn by the seed, to evaluate the model on. If items are "
        "windows, whole sequences are kept out, or stretches of a single sequence; a window's length before and after "
        "each stretch is left out of training too.", whole_number(0)
    )  # fmt: skip


@dataclass
class ImageOptions:
    """How images are read."""

    _argument_group_name = "Images"

    resolution: list[int] | None = option(
        None, "Height and width in pixels; one number gives a square. The shorter side of an image is resized, and the "
        "rest is cropped.",
        Rule(lambda sizes: len(sizes) in (1, 2) and min(sizes) >= 1, "one or two whole numbers of pixels, at least 1"),
        scope.IMAGES,
        none="64; 8 for digits; for an array, the size of its images",
    )  # fmt: skip
    image_channels: int | None = option(
        None, "1 (grey), 3 (RGB) or 4 (RGBA). With 1 and 3, transparent images are laid on white. Scientific images "
        "keep their channels, of any number.",
        whole_number(1), scope.IMAGES, 
        none="3; 1 for digits; for scientific images, the channels of the data",
    )  # fmt: skip
    image_norm: str | None = option(
        None, "Read images as scientific images, whose samples are in the units of the data, and scale them for the "
        "model: 'bits' scales the full range of the integer type to [-1, 1], 'minmax' the range of each channel, and "
        "'meanstd' scales each channel to mean 0 and standard deviation 1.", one_of(*IMAGE_NORMS), scope.OWN_UNITS,
        none="pictures of 8 bits; for arrays and scientific files, bits for whole numbers and minmax for floats",
    )  # fmt: skip
    image_range: list[float] | None = option(
        None, "Lowest and highest value of scientific images, which are scaled to [-1, 1]; 0 4095 for 12 bits. Values "
        "outside are clipped, and a warning says how many.",
        Rule(lambda ends: len(ends) == 2 and ends[0] < ends[1], "two finite numbers, the lower first"),
        scope.OWN_UNITS, none="image_norm",
    )  # fmt: skip
    center_crop: bool = option(
        True, "Crop images from the centre (true) or at a random place (false). Images in the shape of resolution are "
        "not cropped.",
        applies=scope.IMAGES,
    )  # fmt: skip
    random_flip: bool = option(False, "Mirror half of the images left to right.", applies=scope.IMAGES, off=False)
    on_bad_image: str = option(
        "stop", "What to do with an image that cannot be read: 'stop' ends the run and names the image, 'skip' counts "
        "it and goes on.", either("stop", "skip"), scope.CHECKED_IMAGES, changeable=True
    )  # fmt: skip


@dataclass
class SequenceOptions:
    """How sequences are read."""

    _argument_group_name = "Sequences"

    recording: bool = option(
        False, "Read an array (channels, points) as one recording, instead of as sequences (N, length) of one channel; "
        "stride cuts its windows. An array (points,) is always one recording.",
        applies=scope.SEQUENCE_ARRAYS, off=False,
    )  # fmt: skip
    csv_decimal: str | None = option(
        None, "Decimal mark of a .csv file.", either(".", ","), scope.CSV,
        none="a comma if semicolons or tabs separate the cells and the numbers have commas, else a point",
    )  # fmt: skip
    on_missing: str = option(
        "stop", "What to do with missing values (NaN, empty cells): 'stop' ends the run and names the first, 'drop' "
        "leaves out the sequences or windows that have one, 'interpolate' fills them in from the line between the "
        "neighbours in time, 'mask' trains on the known values; condition known implies it.",
        either("stop", "drop", "interpolate", "mask"), scope.MISSING, off="stop",
    )  # fmt: skip

    sequence_length: int | None = option(
        None, "Length of the sequences, in points: longer ones are cut to their beginning. With stride, and for ecg, "
        "the length of the windows.",
        whole_number(1), scope.SEQUENCES, none="the length of the data; 256 for ecg",
    )  # fmt: skip
    stride: int | None = option(
        None, "Train on windows of sequence_length points, whose starts are stride points apart.",
        whole_number(1), scope.SEQUENCES, none="whole sequences; 2 for ecg",
    )  # fmt: skip
    sequence_norm: str = option(
        "minmax", "Scaling of each channel: 'minmax' scales its range to [-1, 1], 'meanstd' scales it to mean 0 and "
        "standard deviation 1.", one_of(*SEQUENCE_NORMS), scope.SEQUENCES
    )  # fmt: skip


@dataclass
class LoadingOptions:
    """How items get into memory."""

    _argument_group_name = "Loading"

    dataloader_num_workers: int | None = option(
        None, "Number of processes that load data, for each training process; 0: the training process loads them "
        "itself.", whole_number(0), changeable=True,
        none="0; on a card, for images that are read from files or tables, the cores of this machine, divided among "
        "its training processes, but at most 8",
    )  # fmt: skip
    streaming: bool = option(
        False,
        "Read tables of images (dataset_name, or train_data_dir) as they come, without a copy on disk.",
        applies=scope.STREAMS,
        off=False,
    )
    shuffle_buffer: int = option(
        1000, "Number of undecoded images that streaming shuffles together; each process has up to twice as many in "
        "memory.", whole_number(1), scope.STREAMING
    )  # fmt: skip
    cache_gb: float = option(
        1.0, "Memory for decoded images, in GB per training process (Linux). Images that fit are decoded only once.",
        AT_LEAST_0, scope.KEPT_IMAGES, off=0, changeable=True,
    )  # fmt: skip
