"""The sampling loop: algorithm 2 of Ho et al. (arXiv:2006.11239), with the step of any diffusers scheduler.

Self-conditioning follows Chen et al. (arXiv:2208.04202).
"""

import inspect
from collections.abc import Callable, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ddpm_hf.pipeline.finite import check_finite
from ddpm_hf.pipeline.graphs import GraphedModel
from ddpm_hf.pipeline.guidance import Guidance, as_list, make_guidance
from ddpm_hf.pipeline.pairs import encode_condition, number_of_conditions
from ddpm_hf.pipeline.pieces import check_max_batch_size, in_pieces
from ddpm_hf.pipeline.rules import check_call, check_steps, check_timesteps
from ddpm_hf.pipeline.saving import SavedWithCode
from ddpm_hf.pipeline.schedulers import (
    check_scheduler,
    fast_scheduler,
    is_own_scheduler,
    log_snr_timesteps,
    step_options,
    takes_variance,
)
from ddpm_hf.pipeline.steps import X0Estimate, use_channels_last, without_known
from ddpm_hf.pipeline.windows import Windows, choose_windows, over_windows


# This class is longer than 250 lines because the loop documents everything that can enter a step of it.
class SamplingPipeline(SavedWithCode):
    """The sampling loop. `_size`, `_tensor`, `_encode`, `_decode` and `_output` of the subclasses say what the data is.

    Attributes:
        max_batch_size: the most samples that one call of the model is given; larger batches are split inside of each
            step. None: about 128 MiB of activations on a CPU and 4 GiB on a card, estimated from the model's width
            (`suggested_batch`). All noise is drawn for the whole batch, so samples do not depend on it, but for
            rounding. A saved pipeline does not keep it.
    """

    max_batch_size: int | None = None
    _output_types: tuple
    _size_names: str  # of the arguments that say the size of larger samples
    _methods: tuple = ("single", "joint")
    _callback_tensor_inputs = ["latents"]
    _check_finite = staticmethod(check_finite)
    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0
    _graphs: GraphedModel | None = None
    _guide_graphs: GraphedModel | None = None

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after that step; the next call starts afresh."""
        return self._interrupt

    @property
    def guidance_scale(self) -> float:
        """Scale of the guidance of the running call; a callback may change it by setting `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of timesteps of the running call, or of the last one."""
        return self._num_timesteps

    def __setattr__(self, name: str, value) -> None:
        """Set an attribute. A new scheduler is checked, and ends the fast sampler.

        The fast sampler's spacing then goes, and the number of steps that the pipeline had before returns.

        Raises:
            ValueError: the scheduler cannot sample from the model, or max_batch_size is no whole number of at least 1;
                the message has the reason.
        """
        if name == "scheduler":
            unet, trained = self.__dict__.get("unet"), self.__dict__.get("_trained")
            self.__dict__["_trained"] = check_scheduler(value, unet, trained)
        if name == "max_batch_size":
            check_max_batch_size(value)
        super().__setattr__(name, value)
        if name == "unet":
            use_channels_last(value)
        if name == "scheduler" and self.config.get("log_snr_spacing"):
            own = self.config.get("steps_before_fast")
            self.register_to_config(num_inference_steps=own, log_snr_spacing=False, steps_before_fast=None)

    def use_fast_sampler(self, num_inference_steps: int = 15):
        """Sample with few calls of the model, by DPM-Solver++ of order 2 (Lu et al., arXiv:2211.01095).

        The solver is diffusers' own, on the schedule that the model was trained on, at `log_snr_timesteps`.
        docs/studies.md compares its samples with those of other samplers.

        The pipeline's scheduler is replaced, and a saved pipeline keeps that. Setting any scheduler ends it: the
        spacing is then the scheduler's own, and the number of steps the one that the pipeline had before. The way
        back is `pipe.scheduler = GaussianScheduler.from_config(pipe.scheduler.config)`.

        Args:
            num_inference_steps: default number of steps from now on; 1 to T.

        Returns:
            self

        Raises:
            ValueError: num_inference_steps is outside its range.
        """
        check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        self.scheduler = fast_scheduler(self.scheduler)
        self.register_to_config(
            steps_before_fast=self.config.num_inference_steps,
            num_inference_steps=num_inference_steps,
            log_snr_spacing=True,
        )
        return self

    def use_cuda_graphs(self, enabled: bool = True):
        """Capture the model's calls as CUDA graphs and replay them, which spares the host its time on a graphics card.

        The first call of each size is slower, as its graph is captured. See `GraphedModel` for when a graph is
        captured again, and when the model is called as usual; on a CPU it always is. A saved pipeline does not keep
        this setting, and a pipeline with it must not be called from two threads at the same time.

        Args:
            enabled: False ends it and frees the memory of the graphs.

        Returns:
            self
        """
        if enabled:
            self._graphs = self._graphs or GraphedModel()
        else:
            for graphs in filter(None, (self._graphs, self._guide_graphs)):
                graphs.release()
            self._graphs = self._guide_graphs = None
        return self

    def is_spaced_by_log_snr(self) -> bool:
        """Return True if the steps are those of the fast sampler. Another scheduler has its own."""
        return self.config.log_snr_spacing and isinstance(self.scheduler, DPMSolverMultistepScheduler)

    def _size(self) -> tuple:
        raise AssertionError("a pipeline of images or of sequences says its size")

    def _channels(self) -> int:
        return self.unet.config.in_channels

    def _given(self, items, name: str) -> Tensor:
        """Return given items in their own units on the CPU, `(B, C, *spatial)`; PIL images, of 8 bits, as float32."""
        data = self._tensor(items, name).cpu()
        return data.float() if self._output_types[0] == "pil" and not hasattr(items, "dtype") else data

    def _set_timesteps(self, num_inference_steps: int | None, timesteps: Sequence[int] | None) -> None:
        """Choose the timesteps of the chain: those given, or as many as a call or the pipeline says.

        They stay on the CPU, whatever device the model is on. Every scheduler reads them back in its steps, for its
        tables, and would wait for a graphics card there. No scheduler of docs/samplers.md needs them elsewhere.
        (`UniPCMultistepScheduler` also copies numbers to the device in each step, and solves a small system there.)
        """
        scheduler = self.scheduler
        if timesteps is not None:
            if num_inference_steps is not None:
                raise ValueError(f"give num_inference_steps or timesteps, not both; got {num_inference_steps} and them")
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"{type(scheduler).__name__} takes no explicit timesteps; give num_inference_steps")
            check_timesteps(as_list(timesteps), scheduler.config.num_train_timesteps)
            scheduler.set_timesteps(timesteps=timesteps, device="cpu")
            return
        total = scheduler.config.num_train_timesteps
        steps = num_inference_steps if num_inference_steps is not None else self.config.num_inference_steps or total
        check_steps(steps, total)
        if self.is_spaced_by_log_snr():
            scheduler.set_timesteps(timesteps=log_snr_timesteps(scheduler.alphas_cumprod, steps), device="cpu")
        else:
            scheduler.set_timesteps(steps, device="cpu")

    def _model_to_call(self, device: torch.device, guide=None) -> Callable[..., Tensor]:
        """Return the function that predicts in one chain: the model or a guide, or the graphs of its calls."""
        model = self.unet if guide is None else guide
        if self._graphs is None:
            call = lambda *inputs, **optional: model(*inputs, **optional).sample  # noqa: E731
        elif guide is None:
            call = self._graphs.prepare(model, device)
        else:
            self._guide_graphs = self._guide_graphs or GraphedModel(self._graphs.make_backend, self._graphs.most)
            call = self._guide_graphs.prepare(model, device)
        return in_pieces(call, model, self.max_batch_size)

    @torch.no_grad()
    def _denoise(
        self, x: Tensor, timesteps, options: dict, trajectory: list | None = None, callback=None, callback_inputs=(),
        guidance: Guidance | None = None, condition: Tensor | None = None, windows: Windows | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the chain from x_T to x_0. The loop reads nothing back from the device.

        Args:
            x: x_T, `(B, C, *spatial)`.
            timesteps: those of the chain, in its order, on the CPU.
            options: further arguments of the scheduler's step.
            trajectory: a list to which the x of each step is appended; None: they are not kept.
            guidance: the predictions of a model with classes, or with a guide; None: those of the model as they are.
            condition: known values and where they are, or a paired condition in the size of x, for a model that takes
                one; None: none is given.
            windows: those in which the model predicts, of a larger x; None: it predicts for all of x at once.

        Raises:
            FloatingPointError: x_0 is not finite.
        """
        self_condition = self.unet.config.get("self_condition", False)
        estimate_x0 = X0Estimate(self.scheduler) if self_condition else None
        channels = 2 * x.shape[1] if takes_variance(self.scheduler) else x.shape[1]
        model = self._model_to_call(x.device)
        if windows is not None:
            model, guidance = over_windows(model, windows), guidance and guidance.over(windows)
        timesteps_for_model = timesteps.to(x.device)  # one copy for all steps
        last = max(self.scheduler.config.num_train_timesteps - 1, 1)
        constant = {} if condition is None else {"condition": condition}
        told = condition is not None and self.config.get("condition") != "paired"
        known = condition[:, x.shape[1] :] > 0 if told else None
        self._num_timesteps, self._guidance_scale = len(timesteps), 1.0 if guidance is None else guidance.scale
        self._interrupt, x0, sums = False, None, []
        for i, t in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(x, t)
            seen = without_known(model_input, known)
            extra = {"x_self_cond": without_known(x0, known), **constant} if self_condition else constant
            if guidance is None:
                prediction = model(seen, timesteps_for_model[i], **extra)
            else:
                level, guidance.scale = float(t) / last, self._guidance_scale
                prediction = guidance(model, seen, timesteps_for_model[i], level, x.shape[1], known, **extra)
            prediction = prediction[:, :channels]
            result = self.scheduler.step(prediction, int(t) if is_own_scheduler(self.scheduler) else t, x, **options)
            x = result.prev_sample
            if self_condition:
                x0 = getattr(result, "pred_original_sample", None)
                if x0 is None:
                    x0 = estimate_x0(prediction[:, : x.shape[1]], model_input, t)
            if callback is not None:
                # The contract of diffusers: callback(pipeline, step, timestep, tensors) -> tensors to go on with.
                tensors = {name: {"latents": x}[name] for name in callback_inputs}
                x = (callback(self, i, t, tensors) or {}).get("latents", x)
            # read after the loop: it is not finite if a value is not, at one reduction for each call of the model
            sums.append(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)))
            if trajectory is not None:
                trajectory.append(x)
            if self._interrupt:  # set by a callback, or from another thread, as in diffusers' own pipelines
                break
        self._check_finite(self.unet, x, sums, timesteps)
        return x

    @torch.no_grad()
    def _generate(
        self, batch_size, num_inference_steps, generator, latents, eta, output_type, return_dict,
        callback_on_step_end, callback_inputs, return_all_timesteps, timesteps, class_labels, condition, *guidance,
        size=None, method=None, overlap=None,
    ):  # fmt: skip
        """Sample, as the calls of the subclasses say; `guidance` is its scale, rescaling, interval and guide."""
        windows = self._windows(size, method, overlap)
        class_labels, generator = as_list(class_labels), as_list(generator)
        if isinstance(class_labels, list) and batch_size == 1:
            batch_size = len(class_labels)
        if condition is not None and batch_size == 1:
            batch_size = number_of_conditions(condition)
        check_call(self, batch_size, generator, output_type, latents, callback_on_step_end, callback_inputs, size)
        callback_inputs = [callback_inputs] if isinstance(callback_inputs, str) else callback_inputs
        condition = encode_condition(self, condition, batch_size, size=size, windows=windows)
        guidance = make_guidance(self, batch_size, class_labels, *guidance)
        self._set_timesteps(num_inference_steps, timesteps)
        options = step_options(self.scheduler, generator, eta)
        device, dtype = self._execution_device, self.unet.dtype
        if latents is None:
            shape = (batch_size, self._channels(), *(size or self._size()))
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        x = latents.to(device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        return self._run(
            x, self.scheduler.timesteps, options, guidance, output_type, return_dict, callback_on_step_end,
            callback_inputs, return_all_timesteps, condition, windows,
        )  # fmt: skip

    def _windows(self, size: tuple | None, method: str | None, overlap: int | None) -> Windows | None:
        """Return the windows for samples of a size, checked; None for one call of the model."""
        trained = None if self.unet.config.sample_size is None else self._size()
        return choose_windows(self._size_names, size, trained, method, overlap, self._methods)

    def _run(
        self, x: Tensor, chain, options: dict, guidance: Guidance | None, output_type: str, return_dict: bool, callback,
        callback_inputs, return_all_timesteps: bool, condition: Tensor | None = None,
        windows: Windows | None = None,
    ):  # fmt: skip
        """Run the chain from x, and return its samples as a call does; the arguments are those of `_denoise`."""
        trajectory = [x] if return_all_timesteps else None
        x = self._denoise(x, chain, options, trajectory, callback, callback_inputs, guidance, condition, windows)
        self.maybe_free_model_hooks()
        samples = self._decode(x, output_type)
        if trajectory is not None:
            n = len(trajectory)
            flat = self._decode(torch.stack(trajectory, dim=1).flatten(0, 1), output_type)  # the steps of each sample
            if isinstance(flat, list):
                trajectory = [flat[i * n : (i + 1) * n] for i in range(len(x))]
            else:
                trajectory = flat.reshape(len(x), n, *flat.shape[1:])
        return self._output(samples, trajectory, return_dict)
