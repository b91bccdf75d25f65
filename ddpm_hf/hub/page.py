"""A Gradio page to try a pipeline: samples, their way from noise, interpolation, and the visitor's own data.

Visitors complete, vary and score images and series that they upload. The Spaces that `ddpm_hf.hub.publish` writes carry
a copy of this file and of `page_model.py` beside it; both import nothing else of ddpm_hf.
"""

import gradio as gr
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

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
    image_levels,
    last_rows,
    refused,
    whole,
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

    def complete_image(self, drawn, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of the visitor's image without what was painted over, and of its completions.

        Args:
            drawn: the value of an image editor: its `background` and its `layers`, as PIL images.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        if not drawn or drawn.get("background") is None:
            raise refused("there is no image yet: upload one first")
        size = self.page.shape[:0:-1]  # (width, height)
        known = image_levels(drawn["background"], self.page.shape)
        painted = np.zeros((size[1], size[0]), dtype=bool)
        for layer in drawn.get("layers") or ():
            alpha = layer.convert("RGBA").getchannel("A").point(lambda value: 255 * (value > 0))
            painted |= np.asarray(ImageOps.fit(alpha, size, Image.Resampling.BOX)) > 0
        known = np.where(painted[..., None], np.nan, known)
        samples = self._complete(self.page.units(known), count, steps, sampler, seed, eta, chosen, scale)
        samples = self.page.levels(samples)
        shown = np.where(np.isnan(known), 0.5, known)
        return self.page.picture(np.concatenate([shown[None], samples]))

    def forecast(self, file, columns, points, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the plot of the values that follow the end of columns of a table: median, 50% and 90% bands.

        Missing values among the last rows are filled too.

        Args:
            file: the path of a CSV file.
            columns: the names of the model's channels, separated by commas; empty: the first columns of numbers.
            points: the number of values after the end of the table.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        points = whole("new values", points, 1, self.page.shape[1] - 1)
        history = last_rows(file, columns, (self.page.shape[0], self.page.shape[1] - points))
        known = np.concatenate([history, np.full((self.page.shape[0], points), np.nan)], axis=1)
        samples = self._complete(known, count, steps, sampler, seed, eta, chosen, scale)
        return self._fan(known, samples)

    def _complete(self, known, count, steps, sampler, seed, eta, chosen, scale) -> np.ndarray:
        """Return completions (count, ...) of one item, which is NaN where it is unknown."""
        passes = 1 if self.page.is_told else PASSES
        count, steps, condition, generators = self.page.asked(count, steps, seed, chosen, scale, passes)
        if not np.isnan(known).any():
            raise refused("nothing is unknown yet: paint over the part to be made anew")
        jump = max(1, min(10, steps // 4))  # a chain of no more steps than a jump has would have no jumps
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe.inpaint(
                known[None], num_samples=count, generator=generators, jump_length=jump, jump_n_sample=passes,
                **condition, **options,
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

    def vary(self, given, columns, strength, count, steps, sampler, seed, eta, chosen=EVERY_CLASS, scale=1.0):
        """Return the picture of the visitor's item and of variations of it (SDEdit).

        Args:
            given: an image, or the path of a CSV file with a series.
            columns: the names of the model's channels in the file, as in `Completing.forecast`.
            strength: the share of the way to noise that each variation begins at: 0 is the item, 1 ordinary sampling.
            count, steps, sampler, seed, eta, chosen, scale: the fields.
        """
        if strength is None or not 0 <= strength <= 1:
            raise refused(f"strength must lie in 0 to 1, got {strength}")
        count, steps, condition, generators = self.page.asked(count, steps, seed, chosen, scale)
        item = self._item(given, columns)
        with self.page.sampler(sampler, steps, eta) as options:
            (samples,) = self.page.pipe(
                **{"image" if self.page.is_image else "sequence": item[None]}, strength=float(strength),
                num_samples=count, generator=generators, **condition, **options,
            )  # fmt: skip
        return self.page.picture(self.page.levels(np.concatenate([item[None], samples])))

    def score(self, given, columns, seed):
        """Return the picture of the visitor's item with the map of its score, and its score in words.

        Args:
            given, columns: as in `vary`.
            seed: the field.
        """
        generators, item = [generator_of(whole("seed", seed, 0, LARGEST_SEED), 0)], self._item(given, columns)
        try:
            found = self.page.pipe.score(item[None], generator=generators)
        except ValueError as error:
            raise refused(str(error)) from error
        heat, text = np.asarray(found.maps)[0], f"Score: {float(np.asarray(found.scores)[0]):.4g}"
        return self._heat(self.page.levels(item[None])[0], heat), f"{text} (higher is stranger to the model)"

    def _item(self, given, columns) -> np.ndarray:
        """Return the uploaded item in the units of the pipeline, (H, W, C) or (C, length).

        Raises:
            gr.Error: if there is none, or it does not fit the model.
        """
        if given is None:
            raise refused("there is nothing yet: upload an image or a CSV file first")
        if self.page.is_image:
            return self.page.units(image_levels(given, self.page.shape))
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
            shown = item if channels in (3, 4) else item[..., 0]
            image.imshow(shown, cmap="gray", vmin=0, vmax=1)
            figure.colorbar(below.imshow(heat.mean(axis=-1), cmap="inferno", vmin=0), ax=below, shrink=0.8)
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
            samples = gr.Image(label="Samples", format="png", elem_id="samples")
        with gr.Tab("From noise to sample"):
            step = gr.Slider(0, 1, 1, step=1, label="Steps done", elem_id="step", interactive=False)
            frame = gr.Image(label="After these steps", format="png", elem_id="frame")
        with gr.Tab("Between two seeds"):
            with gr.Row():
                other = gr.Number(1, label="Other seed", elem_id="other")
                most = page.most_points
                points = gr.Number(min(8, most), label=f"Points (2 to {most})", elem_id="points")
            walk = gr.Button("Interpolate", variant="primary", elem_id="walk")
            first = f" {EVERY_CLASS.capitalize()}: here the first class." if page.classes else ""
            gr.Markdown(f"From the first sample of one seed to that of the other.{first}")
            line = gr.Image(show_label=False, format="png", elem_id="line")
        trajectory = gr.State(time_to_live=CLEAN_AFTER)
        fields = [count, steps, sampler, seed, eta, chosen, scale]
        if page.completes:
            _add_completing(page, fields)
        if page.varies:
            _add_varying(page, fields)
        if page.is_long:
            with gr.Tab("Longer series"):
                trained, most = page.shape[1], MOST_TIMES * page.shape[1]
                length = gr.Number(4 * trained, label=f"Length ({trained} to {most:,})", elem_id="length")
                longer = gr.Button("Generate a series", variant="primary", elem_id="longer")
                series = gr.Image(show_label=False, format="png", elem_id="series")
            longer.click(page.longer, [length, *fields[1:]], series)
        button.click(page.generate, fields + told, [samples, trajectory, step, frame])
        step.input(page.look_back, [trajectory, step], frame, trigger_mode="always_last", show_progress="hidden")
        walk.click(page.interpolate, [seed, other, points, steps, sampler, chosen, scale, *told], line)
    blocks.takes_files = page.completes or page.varies or page.is_paired
    return blocks.queue(default_concurrency_limit=1, max_size=MOST_WAITING)  # one pipeline, one sampler at a time


def _add_condition(page: Page) -> list:
    """Add the upload of a paired condition to the page that is being built; return its fields."""
    channels, *size = page.condition_shape
    form = " x ".join(map(str, size))
    with gr.Row():
        if page.is_image:
            text = f"Condition of the samples; it is cut and resized to {form} pixels"
            image = {"type": "pil", "image_mode": "RGBA", "sources": ["upload"], "height": 240}
            return [gr.Image(label=text, elem_id="condition", **image)]
        text = f"Condition of the samples: channels x length {channels} x {form}, from .csv (its last rows) or .npy"
        given = gr.File(file_types=[".csv", ".npy"], label=text, elem_id="condition")
        text = "Columns of a CSV file, separated by commas (empty: the first columns of numbers)"
        return [given, gr.Textbox("", label=text, max_length=1000, elem_id="condition_columns")]


def _add_completing(page: Page, fields: list) -> None:
    """Add the tab in which visitors complete their own data to the page that is being built."""
    completing = Completing(page)
    with gr.Tab("Complete an image" if page.is_image else "Forecast"):
        if page.is_image:
            known = gr.ImageEditor(
                type="pil", image_mode="RGBA", sources=["upload"], transforms=(), label="Paint over what is unknown",
                brush=gr.Brush(colors=["#e0563b"], color_mode="fixed"), elem_id="known",
            )  # fmt: skip
            inputs, answer = [known], completing.complete_image
        else:
            length = page.shape[1]
            with gr.Row():
                known = gr.File(file_types=[".csv"], label="CSV file: rows are points in time", elem_id="known")
                with gr.Column():
                    text = "Columns of the channels, separated by commas (empty: the first columns of numbers)"
                    columns = gr.Textbox("", label=text, max_length=1000, elem_id="columns")
                    text = f"New values (1 to {length - 1})"
                    points = gr.Number(max(1, length // 4), label=text, elem_id="new")
            inputs, answer = [known, columns, points], completing.forecast
        button = gr.Button("Complete", variant="primary", elem_id="complete")
        completed = gr.Image(show_label=False, format="png", elem_id="completed")
        button.click(answer, inputs + fields, completed)


def _add_varying(page: Page, fields: list) -> None:
    """Add the tab in which visitors vary and score their own data to the page that is being built."""
    varying = Varying(page)
    with gr.Tab("Vary an image" if page.is_image else "Vary a series"):
        with gr.Row():
            if page.is_image:
                given = gr.Image(type="pil", image_mode="RGBA", sources=["upload"], label="Image", elem_id="given")
            else:
                text = f"CSV file, of which the last {page.shape[1]} rows are taken"
                given = gr.File(file_types=[".csv"], label=text, elem_id="given")
            with gr.Column():
                text = "Columns of the channels, separated by commas (empty: the first columns of numbers)"
                shown = {"visible": not page.is_image}
                columns = gr.Textbox("", label=text, max_length=1000, elem_id="given_columns", **shown)
                text = "Strength (0 is the item itself, 1 is a new sample)"
                strength = gr.Slider(0, 1, 0.4, step=0.05, label=text, elem_id="strength")
        vary = gr.Button("Vary", variant="primary", elem_id="vary")
        varied = gr.Image(show_label=False, format="png", elem_id="varied")
        vary.click(varying.vary, [given, columns, strength, *fields], varied)
        if page.scores:
            score = gr.Button("Score", elem_id="score")
            words = gr.Markdown("", elem_id="score_words")
            heat = gr.Image(label="Where it is strange to the model", format="png", elem_id="heat")
            score.click(varying.score, [given, columns, fields[3]], [heat, words])


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
