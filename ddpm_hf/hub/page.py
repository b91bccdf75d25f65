"""A Gradio page to try a pipeline: samples, their way from noise, interpolation, and the visitor's own data.

Visitors complete, vary and score images and series that they upload. The Spaces that `ddpm_hf.hub.publish` writes carry
a copy of this file and of `page_model.py` and `page_input.py` beside it; they import nothing else of ddpm_hf.
"""

import inspect

import gradio as gr
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ddpm_hf.hub.page_input import (
    MODES,
    image_array,
    image_levels,
    last_rows,
    number,
    refused,
    told_on_the_page,
    whole,
)
from ddpm_hf.hub.page_model import (
    EVERY_CLASS,
    FAST,
    LARGEST_SEED,
    MOST_SCALE,
    MOST_TIMES,
    NO_CLASS,
    OWN,
    STOCK,
    Page,
    drawn_figure,
    generator_of,
)

MOST_VISITORS = 8  # the number of visitors whose frames are kept
MOST_WAITING = 32  # the number of clicks in the queue
LARGEST_REQUEST = 2**20  # bytes; the page's fields send hundreds
LARGEST_FILE = 2**23  # bytes of an uploaded image or table, on pages that take them
PASSES = 5  # how often RePaint passes each place, for models that were not trained to complete
CLEAN_EVERY, CLEAN_AFTER = 600, 3600  # seconds after which pictures in gradio's cache, and frames, are removed


class Completing:
    """Completing of the visitor's own data: the answers of one of the page's tabs.

    Args:
        page: the page of the pipeline.
    """

    def __init__(self, page: Page):
        self.page = page

    def complete_image(self, drawn, *fields):
        """Return the picture of the visitor's image without what was painted over, and of its completions.

        Args:
            drawn: the value of an image editor: its `background` and its `layers`, as PIL images.
            fields: the fields, as `Page.generate` takes them.
        """
        if not drawn or drawn.get("background") is None:
            raise refused("there is no image yet: upload one first")
        size = self.page.shape[:0:-1]  # (width, height)
        known = image_levels(drawn["background"], self.page.shape)
        painted = np.zeros((size[1], size[0]), dtype=bool)
        for layer in drawn.get("layers") or ():
            alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 0))
            painted |= np.asarray(ImageOps.fit(alpha, size, Image.Resampling.BOX)) > 0
        return self._completed(self.page.units(np.where(painted[..., None], np.nan, known)), *fields)

    def complete_array(self, file, *fields):
        """Return the picture of the image of a file and of its completions.

        Args:
            file: the path of a .npy file, which has NaN where the image is unknown.
            fields: the fields, as `Page.generate` takes them.
        """
        if not file:
            raise refused("there is no file yet: upload a .npy file first")
        return self._completed(image_array(file, self.page.shape), *fields)

    def _completed(self, known: np.ndarray, *fields) -> Image.Image:
        """Return one picture of an image, (H, W, C) in the units of the pipeline, which is NaN where it is unknown, and
        of its completions."""
        samples = self.page.levels(self._complete(known, *fields))
        shown = np.where(np.isnan(known), 0.5, self.page.levels(known[None])[0])
        return self.page.picture(np.concatenate([shown[None], samples]))

    def forecast(self, file, columns, points, *fields):
        """Return the plot of the values that follow the end of columns of a table: median, 50% and 90% bands.

        Missing values among the last rows are filled too.

        Args:
            file: the path of a CSV file.
            columns: the names of the model's channels, separated by commas; empty: the first columns of numbers.
            points: the number of values after the end of the table.
            fields: the fields, as `Page.generate` takes them.
        """
        points = whole("new values", points, 1, self.page.shape[1] - 1)
        history = last_rows(file, columns, (self.page.shape[0], self.page.shape[1] - points))
        known = np.concatenate([history, np.full((self.page.shape[0], points), np.nan)], axis=1)
        samples = self._complete(known, *fields)
        return self._fan(known, samples)

    def _complete(
        self, known, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0, told=None, told_columns=""
    ) -> np.ndarray:
        """Return completions (count, ...) of one item, which is NaN where it is unknown."""
        passes = 1 if self.page.is_told else PASSES
        if sampler != OWN and not self.page.is_told:
            raise refused(f"this model is completed by RePaint, which needs {OWN}: choose it as the sampler")
        count, steps, beside, generators = self.page.asked(
            count, steps, seed, chosen, scale, told, told_columns, passes=passes
        )
        if not np.isnan(known).any():
            how = "paint over" if self.page.paints else "give the file NaN in"
            raise refused(f"nothing is unknown yet: {how} the part to be made anew")
        jump = max(1, min(10, steps // 4))  # a chain of no more steps than a jump has would have no jumps
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe.inpaint(
                known[None], num_samples=count, generator=generators, jump_length=jump, jump_n_sample=passes,
                **beside, **options,
            )  # fmt: skip
        return samples

    def _fan(self, known: np.ndarray, samples: np.ndarray) -> Image.Image:
        """Return one picture of a sequence (C, length), NaN where unknown, and completions (N, C, length)."""
        figure = Figure(figsize=(12, 2.6 * len(known) + 0.5), layout="constrained", dpi=80)
        axes = figure.subplots(len(known), 1, sharex=True, squeeze=False).ravel()
        times = np.arange(known.shape[1])
        for channel, axis in enumerate(axes):
            quantiles = np.quantile(samples[:, channel], (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
            low_90, low_50, median, high_50, high_90 = quantiles
            axis.fill_between(times, low_90, high_90, color="tab:orange", alpha=0.25, linewidth=0, label="90% band")
            axis.fill_between(times, low_50, high_50, color="tab:orange", alpha=0.45, linewidth=0, label="50% band")
            axis.plot(times, median, color="tab:red", linewidth=1.2, label="median")
            axis.plot(times, known[channel], color="tab:blue", linewidth=1.4, label="known")
            axis.grid(alpha=0.25)
        axes[0].legend(loc="upper left", fontsize=8)
        return drawn_figure(figure)


class Varying:
    """Variations and scores of the visitor's own data: the answers of one of the page's tabs.

    Args:
        page: the page of the pipeline.
    """

    def __init__(self, page: Page):
        self.page = page

    def vary(
        self, given, columns, strength, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0, told=None,
        told_columns="",
    ):  # fmt: skip
        """Return the picture of the visitor's item and of variations of it (SDEdit).

        Args:
            given: an image, or the path of a file: a picture or a .npy file, or a CSV file with a series.
            columns: the names of the model's channels in the file, as in `Completing.forecast`.
            strength: the share of the way to noise that each variation begins at: 0 is the item, 1 ordinary sampling.
            count, steps, sampler, seed, eta, chosen, scale, told, told_columns: the fields, as in `Page.generate`.
        """
        strength = number("strength", strength, 0, 1)
        item = self._item(given, columns)
        count, steps, beside, generators = self.page.asked(count, steps, seed, chosen, scale, told, told_columns)
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe(
                **{"image" if self.page.is_image else "sequence": item[None]}, strength=strength,
                num_samples=count, generator=generators, **beside, **options,
            )  # fmt: skip
        return self.page.picture(self.page.levels(np.concatenate([item[None], samples])))

    def score(self, given, columns, seed, chosen=EVERY_CLASS, told=None, told_columns=""):
        """Return the picture of the visitor's item with the map of its score, and its score in words.

        Args:
            given, columns: as in `vary`.
            seed, chosen, told, told_columns: the fields. If no single class is chosen, the item is scored without one.
        """
        generators, item = [generator_of(whole("seed", seed, 0, LARGEST_SEED), 0)], self._item(given, columns)
        beside = self.page.beside(1, NO_CLASS if chosen == EVERY_CLASS else chosen, 1, told, told_columns)
        takes = inspect.signature(self.page.pipe.score).parameters  # no guidance; in old code no class
        beside = {name: value for name, value in beside.items() if name in takes}
        with told_on_the_page():
            found = self.page.pipe.score(item[None], generator=generators, **beside)
        words = f"{float(np.asarray(found.scores)[0]):.4g} (higher is stranger to the model)"
        if found.percentiles is not None:
            words += f", percentile {found.percentiles[0]:.0f} of the scores of normal items"
        name = ""
        if self.page.classes:
            (label,) = beside.get("class_labels", [None])
            name = " without a class" if label is None else f" given the class {self.page.classes[label]}"
        return self._heat(self.page.levels(item[None])[0], np.asarray(found.maps)[0]), f"Score{name}: {words}"

    def _item(self, given, columns) -> np.ndarray:
        """Return the uploaded item in the units of the pipeline, (H, W, C) or (C, length).

        Raises:
            gr.Error: if there is none, or it does not fit the model.
        """
        if given is None:
            raise refused(f"there is nothing yet: upload {'an image' if self.page.is_image else 'a CSV file'} first")
        if self.page.is_image:
            item = self.page.image(given, self.page.shape)
            if not np.isfinite(item).all():
                raise refused("each pixel must have a number in each channel, got NaN")
            return item
        series = last_rows(given, columns, self.page.shape)
        if not np.isfinite(series).all():
            raise refused(f"each of the last {self.page.shape[1]} rows must have a number in each column")
        return series

    def _heat(self, item: np.ndarray, heat: np.ndarray) -> Image.Image:
        """Return one picture of an item and of the map of its score, of the same shape."""
        if self.page.is_image:
            figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=80)
            image, below = figure.subplots(1, 2)
            channels = item.shape[-1]
            image.imshow(item if channels in (3, 4) else item[..., 0], cmap="gray", vmin=0, vmax=1)
            image.set_title("as the model sees it" if channels in (1, 3, 4) else "its first channel")
            figure.colorbar(below.imshow(heat.mean(axis=-1), cmap="inferno", vmin=0), ax=below, shrink=0.8)
            below.set_title("where it is strange to the model")
            for axis in (image, below):
                axis.set_axis_off()
            return drawn_figure(figure)
        figure = Figure(figsize=(12, 2.6 * len(item) + 0.5), layout="constrained", dpi=80)
        ratios = {"height_ratios": [3, 1] * len(item)}
        axes = figure.subplots(2 * len(item), 1, sharex=True, squeeze=False, **ratios).ravel()
        for channel, values in enumerate(item):
            axes[2 * channel].plot(values, color="tab:blue", linewidth=1.2)
            axes[2 * channel].grid(alpha=0.25)
            axes[2 * channel + 1].fill_between(np.arange(len(values)), heat[channel], color="tab:red", linewidth=0)
            axes[2 * channel + 1].set_title("where it is strange to the model", fontsize=9, loc="left")
        return drawn_figure(figure)


def build_page(pipe, title: str) -> gr.Blocks:
    """Return the page of a pipeline of ddpm_hf, which `serve` serves, under a title."""
    page = Page(pipe)
    total = page.own.config.num_train_timesteps
    # without analytics: a page with someone's own data must not report to Gradio
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(CLEAN_EVERY, CLEAN_AFTER)) as blocks:
        gr.Markdown(f"# {title}\n{sum(p.numel() for p in pipe.unet.parameters()):,} parameters, {total:,} timesteps.")
        with gr.Row():
            most = page.most_samples
            count = gr.Number(min(9, most), label=f"Samples (1 to {most})", elem_id="count")
            steps = gr.Number(min(page.steps, total), label=f"Steps (1 to {total})", elem_id="steps")
            seed = gr.Number(0, label="Seed", elem_id="seed")
            eta = gr.Number(0, label="Eta: DDIM's noise (0 to 1)", elem_id="eta")
        sampler = gr.Dropdown([OWN, FAST, *STOCK], value=OWN, label="Sampler", elem_id="sampler")
        menu = [(name, name) for name in (EVERY_CLASS, NO_CLASS)]
        menu += [(name, number) for number, name in enumerate(page.classes)]
        shown = {"visible": bool(page.classes)}
        with gr.Row(**shown):
            chosen = gr.Dropdown(menu, value=EVERY_CLASS, label="Class", elem_id="class", **shown)
            label = "Guidance scale (1 is no guidance)"
            scale = gr.Slider(0, MOST_SCALE, 1, step=0.1, label=label, elem_id="scale", **shown)
        told = _add_condition(page) if page.is_paired else []
        with gr.Tab("Samples"):
            button = gr.Button("Generate", variant="primary", elem_id="generate")
            samples = gr.Image(show_label=False, format="png", elem_id="samples")
        with gr.Tab("From noise to sample"):
            step = gr.Slider(0, 1, 1, step=1, label="Steps done", elem_id="step", interactive=False)
            frame = gr.Image(show_label=False, format="png", elem_id="frame")
        with gr.Tab("Between two seeds"):
            with gr.Row():
                other = gr.Number(1, label="Other seed", elem_id="other")
                most = page.most_points
                points = gr.Number(min(8, most), label=f"Points (2 to {most})", elem_id="points")
            walk = gr.Button("Interpolate", variant="primary", elem_id="walk")
            first = f" {EVERY_CLASS.capitalize()}: here the first class." if page.classes else ""
            gr.Markdown(f"From the first sample of one seed to that of the other, without DDIM's noise.{first}")
            line = gr.Image(show_label=False, format="png", elem_id="line")
        trajectory = gr.State(time_to_live=CLEAN_AFTER)
        fields = [count, steps, sampler, seed, eta, chosen, scale, *told]
        if page.completes:
            _add_completing(page, fields)
        if page.varies:
            _add_varying(page, fields)
        if page.is_long:
            _add_longer(page, fields)
        button.click(page.generate, fields, [samples, trajectory, step, frame])
        step.input(page.look_back, [trajectory, step], frame, trigger_mode="always_last", show_progress="hidden")
        walk.click(page.interpolate, [seed, other, points, steps, sampler, chosen, scale, *told], line)
    blocks.takes_files = page.completes or page.varies or page.is_paired
    return blocks.queue(default_concurrency_limit=1, max_size=MOST_WAITING)  # one pipeline, one sampler at a time


def _add_picture(label: str, elem_id: str, shape: tuple, has_units: bool, **options):
    """Add the upload of an image to the page that is being built; return its field.

    A file that is no picture gets a message; gradio's own field would show none, and log a traceback.

    Args:
        label, elem_id: those of the field.
        shape: the shape (C, H, W) of the images.
        has_units: True for images in units of their own, which may also be given as an array.
        options: further options of a field of pictures.
    """
    form = " x ".join(map(str, shape))
    if shape[0] not in MODES:
        return gr.File(file_types=[".npy"], label=f"{label}, {form}: .npy in units of its own", elem_id=elem_id)
    text = f"{label}, {form}: a picture, which is cropped and resized"
    if has_units:
        return gr.File(file_types=[".npy", "image"], label=f"{text}, or .npy in units of its own", elem_id=elem_id)
    with gr.Column():
        gr.Markdown(text)  # the label of a field of images lies over the image
        field = gr.Image(
            type="pil", image_mode=None, sources=["upload"], label=text, show_label=False, elem_id=elem_id, **options
        )
    read = field.preprocess

    def preprocess(payload):
        try:
            return read(payload)
        except Exception as error:  # Pillow raises many kinds
            raise refused("the file cannot be read as an image") from error

    field.preprocess = preprocess
    return field


def _add_series(label: str, elem_id: str, *more_types: str) -> list:
    """Add the upload of a series, and the names of its columns, to the page that is being built; return both fields."""
    file = gr.File(file_types=[".csv", *more_types], label=label, elem_id=elem_id)
    label = "Columns of a CSV file, separated by commas (empty: the first columns of numbers)"
    return [file, gr.Textbox("", label=label, max_length=1000, elem_id=f"{elem_id}_columns")]


def _add_condition(page: Page) -> list:
    """Add the upload of a paired condition to the page that is being built; return its fields."""
    with gr.Row():
        if page.is_image:
            has_units = page.pipe.config.get("condition_scale") is not None
            return [_add_picture("Condition of the samples", "condition", page.condition_shape, has_units, height=240)]
        channels, length = page.condition_shape
        text = f"Condition of the samples: channels x length {channels} x {length}, from .csv (its last rows) or .npy"
        return _add_series(text, "condition", ".npy")


def _add_completing(page: Page, fields: list) -> None:
    """Add the tab in which visitors complete their own data to the page that is being built."""
    completing = Completing(page)
    with gr.Tab("Complete an image" if page.is_image else "Forecast"):
        if not page.is_image:
            length = page.shape[1]
            with gr.Row():
                inputs = _add_series("CSV file: rows are points in time", "known")
                text = f"New values (1 to {length - 1}), after as many known ones as make {length} together"
                text += "; the condition belongs to all of them" if page.is_paired else ""
                inputs.append(gr.Number(max(1, length // 4), label=text, elem_id="new"))
            answer = completing.forecast
        elif page.paints:
            known = gr.ImageEditor(
                type="pil", image_mode="RGBA", sources=["upload"], transforms=(), label="Paint over what is unknown",
                brush=gr.Brush(colors=["#e0563b"], color_mode="fixed"), elem_id="known",
            )  # fmt: skip
            inputs, answer = [known], completing.complete_image
        else:
            text = f"An array of the shape {page.shape}, .npy, with NaN where it is unknown"
            inputs, answer = [gr.File(file_types=[".npy"], label=text, elem_id="known")], completing.complete_array
        button = gr.Button("Complete", variant="primary", elem_id="complete")
        completed = gr.Image(show_label=False, format="png", elem_id="completed")
        button.click(answer, inputs + fields, completed)


def _add_varying(page: Page, fields: list) -> None:
    """Add the tab in which visitors vary and score their own data to the page that is being built."""
    varying = Varying(page)
    verb = "Vary or score" if page.scores else "Vary"
    with gr.Tab(f"{verb} {'an image' if page.is_image else 'a series'}"):
        with gr.Row():
            if page.is_image:
                given = [_add_picture("Image", "given", page.shape, page.has_units), gr.State("")]  # it has no columns
            else:
                given = _add_series(f"CSV file, of which the last {page.shape[1]} rows are taken", "given")
            text = "Strength of varying (0 is the item itself, 1 is a new sample)"
            strength = gr.Slider(0, 1, 0.4, step=0.05, label=text, elem_id="strength")
        vary = gr.Button("Vary", variant="primary", elem_id="vary")
        varied = gr.Image(show_label=False, format="png", elem_id="varied")
        vary.click(varying.vary, [*given, strength, *fields], varied)
        given[0].change(lambda: None, None, varied, show_progress="hidden")  # the old item's
        if page.scores:
            beside = ["the class that is chosen above, if it is a single one"] if page.classes else []
            beside += ["the condition above"] if page.is_paired else []
            score = gr.Button(f"Score{', given ' if beside else ''}{' and '.join(beside)}", elem_id="score")
            words = gr.Markdown("", elem_id="score_words")
            heat = gr.Image(show_label=False, format="png", elem_id="heat")
            seed, chosen, told = fields[3], fields[5], fields[7:]
            score.click(varying.score, [*given, seed, chosen, *told], [heat, words])
            given[0].change(lambda: (None, ""), None, [heat, words], show_progress="hidden")


def _add_longer(page: Page, fields: list) -> None:
    """Add the tab of series that are longer than the model's to the page that is being built."""
    with gr.Tab("Longer series"):
        trained, most = page.shape[1], MOST_TIMES * page.shape[1]
        text = f"Length ({trained} to {most:,})"
        if page.is_paired:
            text += f", with {page.condition_shape[1]} values of the condition for each {trained}"
        length = gr.Number(4 * trained, label=text, elem_id="length")
        longer = gr.Button("Generate a series", variant="primary", elem_id="longer")
        first = f" {EVERY_CLASS.capitalize()}: here the first class." if page.classes else ""
        gr.Markdown(f"One series is drawn, whatever the number of samples.{first}")
        series = gr.Image(show_label=False, format="png", elem_id="series")
    longer.click(page.longer, [length, *fields[1:]], series)


class SmallRequests:
    """Middleware that refuses requests that are larger than what the page's fields send, and most uploaded files.

    Args:
        app: the application.
        takes_files: True for a page to which images or tables of at most `LARGEST_FILE` bytes may be uploaded.
    """

    def __init__(self, app, takes_files: bool = False):
        self.app, self.takes_files = app, takes_files

    async def __call__(self, scope, receive, send):
        uploads = (
            scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")
        )
        most, received = LARGEST_FILE if uploads else LARGEST_REQUEST, 0

        async def receive_little():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= most else {"type": "http.disconnect"}

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if uploads and not self.takes_files:
            answer = PlainTextResponse("this page takes no files", status_code=403)
        elif not length.isdigit() or int(length) > most:
            answer = PlainTextResponse(f"a request may have at most {most:,} bytes", status_code=413)
        else:
            return await self.app(scope, receive_little, send)
        return await answer(scope, receive, send)


def serve(blocks: gr.Blocks, **options):
    """Serve the page with limits to what visitors send and to what is kept of it.

    Args:
        blocks: the page.
        options: further arguments of gradio's `launch`.
    """
    takes_files = getattr(blocks, "takes_files", False)
    largest = LARGEST_FILE if takes_files else LARGEST_REQUEST
    limits = {"max_file_size": largest, "state_session_capacity": MOST_VISITORS}
    middleware = [Middleware(SmallRequests, takes_files=takes_files)]
    return blocks.launch(**limits, app_kwargs={"middleware": middleware}, **options)
