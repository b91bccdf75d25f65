"""Classes and guidance: Ho & Salimans (arXiv:2207.12598) and autoguidance, Karras et al. (arXiv:2406.02507).

In what a model is given, the number `num_class_embeds` stands for "no class".
"""

import copy
from collections.abc import Callable

import numpy as np
import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from ddpm_hf.pipeline.rules import GUIDANCE_RULES, check_rules, is_whole
from ddpm_hf.pipeline.schedulers import Trained, training_of
from ddpm_hf.pipeline.steps import weights_move
from ddpm_hf.pipeline.windows import Windows, over_windows


def class_names(id2label: dict | None, classes: int | None) -> dict[int, str] | None:
    """Return the names of a model's classes by their numbers, checked. Keys that JSON has made texts become numbers."""
    if id2label is None:
        return None
    if not classes:
        raise ValueError(
            f"id2label needs a model with classes (num_class_embeds), and this one has none; got {id2label}"
        )
    try:
        names = {int(number): str(name) for number, name in dict(id2label).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"id2label must map numbers of classes to names, got {id2label!r}") from error
    if sorted(names) != list(range(classes)) or len(set(names.values())) != classes:
        raise ValueError(f"id2label must give each of the {classes} classes a name of its own, got {id2label!r}")
    return names


def _class_number(label: int | str | None, classes: int, names: dict[int, str] | None) -> int:
    """Return the number of the class that a number or a name says; that of "no class" for None."""
    if label is None:
        return classes
    if isinstance(label, str):
        numbers = {name: number for number, name in (names or {}).items()}
        if label in numbers:
            return numbers[label]
        known = f"the classes are {', '.join(list(numbers)[:20])}" if numbers else "its classes have no names"
        raise ValueError(f"class_labels has a name that the model does not know: {label!r}; {known}")
    if not is_whole(label) or not 0 <= label < classes:
        raise ValueError(f"class_labels must be names, None, or whole numbers from 0 to {classes - 1}; got {label!r}")
    return label


def _deviation(x: Tensor, known: Tensor | None) -> Tensor:
    """Return the standard deviation of each sample in float32, `(B, 1, ...)`, over what is unknown."""
    x, axes = x.float(), tuple(range(1, x.ndim))
    if known is None:
        return x.std(axes, keepdim=True)
    counted = ~known
    number = counted.sum(axes, keepdim=True)
    residual = x - torch.where(counted, x, 0).sum(axes, keepdim=True) / number.clamp(min=1)
    return (torch.where(counted, residual**2, 0).sum(axes, keepdim=True) / (number - 1).clamp(min=1)).sqrt()


class Guidance:
    """Guided predictions: weak + scale * (strong - weak), where both are epsilon, both x0, or both v.

    In classifier-free guidance (Ho & Salimans, arXiv:2207.12598) the strong prediction is the model's for the class and
    the weak one the model's for no class, from one call. In autoguidance (Karras et al., arXiv:2406.02507) the strong
    one is the model's and the weak one a worse model's, the guide's, for the same class if there are classes. Scale 1
    is the strong prediction alone, from a call without the weak one, and so is every step outside of the interval.

    Args:
        numbers: the number of each sample's class; None for a model without classes.
        classes: number of classes of the model.
        scale, rescale, interval: as in the call of a pipeline.
        device: where the model runs.
        guide: the function that predicts with the guide; None for classifier-free guidance.
        guide_has_classes: the guide takes class labels.
    """

    def __init__(
        self, numbers: list[int] | None, classes: int | None, scale: float, rescale: float, interval, device,
        guide: Callable[..., Tensor] | None = None, guide_has_classes: bool = False,
    ):  # fmt: skip
        self.scale, self.rescale, self.interval, self.guide = scale, rescale, interval, guide
        self.labels, self.guide_labels = {}, {}
        if numbers is not None:
            self.labels = {"class_labels": torch.tensor(numbers, dtype=torch.int64, device=device)}
            self.guide_labels = self.labels if guide_has_classes else {}
            if guide is None:
                if all(number == classes for number in numbers):
                    self.scale = 1  # without a class, both predictions are the same
                twice = numbers + [classes] * len(numbers)
                self.labels_twice = torch.tensor(twice, dtype=torch.int64, device=device)

    def over(self, windows: Windows) -> "Guidance":
        """Return this guidance for items in windows, in which its guide predicts too."""
        other = copy.copy(self)
        other.guide = None if self.guide is None else over_windows(self.guide, windows)
        return other

    def __call__(
        self, model: Callable[..., Tensor], x: Tensor, t: Tensor, level: float, channels: int,
        known: Tensor | None = None, **optional: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return the guided prediction, `(B, C, *spatial)` or with a predicted variance `(B, 2 * C, *spatial)`.

        Args:
            x, t, optional: the inputs of the model.
            level: the noise level, from 0 (data) to 1 (the last training timestep).
            channels: C, those that are guided. A predicted variance is that of the strong prediction.
            known: bools, shaped as x, True where the model is told the value: rescaling leaves it out. None: nowhere.
        """
        if self.scale == 1 or not self.interval[0] <= level <= self.interval[1]:
            return model(x, t, **self.labels, **optional)
        if self.guide is not None:
            whole, weak = model(x, t, **self.labels, **optional), self.guide(x, t, **self.guide_labels, **optional)
        else:
            twice = {name: None if value is None else torch.cat((value, value)) for name, value in optional.items()}
            whole, weak = model(torch.cat((x, x)), t, class_labels=self.labels_twice, **twice).chunk(2)
        strong, weak = whole[:, :channels], weak[:, :channels]
        guided = weak + self.scale * (strong - weak)
        if self.rescale:  # Lin et al., arXiv:2305.08891, equations 15 and 16
            deviation = _deviation(guided, known).clamp(min=torch.finfo(torch.float32).tiny)
            ratio = _deviation(strong, known) / deviation
            guided = guided * (self.rescale * ratio + 1 - self.rescale).to(guided.dtype)
        return torch.cat((guided, whole[:, channels:]), dim=1)


def _check_guide_schedule(scheduler, trained: Trained) -> None:
    """Check that a guide's scheduler is of the process and the target that a model was trained with."""
    if not isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        raise ValueError(f"guide must have the schedule of the model, which has betas; got {type(scheduler).__name__}")
    kind, abar = training_of(scheduler)
    if kind != trained.prediction_type:
        raise ValueError(f"guide must have the prediction_type of the model, {trained.prediction_type!r}; got {kind!r}")
    steps = len(trained.alphas_cumprod)
    if len(abar) != steps or (abar - trained.alphas_cumprod).abs().max() > 1e-3:
        got = "other betas" if len(abar) == steps else f"{len(abar)} timesteps"
        raise ValueError(f"guide must have the schedule of the model, of {steps} timesteps; got {got}")


def _guide_model(pipeline, guide):
    """Return the model of a guide, which is a model or a pipeline, checked against the pipeline that it is to guide."""
    model = getattr(guide, "unet", guide)
    if not isinstance(getattr(model, "_orig_mod", model), ModelMixin):
        raise ValueError(f"guide must be a model or a pipeline, got {type(guide).__name__}")

    def size(value):  # 8 and [8, 8] are the same
        return (tuple(np.ravel(value)) * 2)[:2]

    for name in ("in_channels", "sample_size", "self_condition", "condition_channels"):
        ours, theirs = (each.config.get(name) or None for each in (pipeline.unet, model))
        free = name == "sample_size" and None in (ours, theirs)
        if not free and size(ours) != size(theirs):
            raise ValueError(f"guide must have the {name} of the model, {ours}; got {theirs}")
    if number_of_classes(model) not in (None, number_of_classes(pipeline.unet)):
        raise ValueError(
            f"guide must have the classes of the model (num_class_embeds={number_of_classes(pipeline.unet)}) or none; "
            f"got {number_of_classes(model)}"
        )
    if model is not guide:
        _check_guide_schedule(guide.scheduler, pipeline._trained)
    place, dtype = pipeline._execution_device, pipeline.unet.dtype
    if model.dtype != dtype or (model.device != place and not weights_move(model)):
        raise ValueError(
            f"guide must be on the device of the model and of its type: guide.to({str(place)!r}, {dtype}); "
            f"got {model.device}, {model.dtype}"
        )
    return model


def as_list(values):
    """Return tuples, arrays and tensors of labels or generators as lists, and one for all as it is."""
    if hasattr(values, "tolist"):
        return values.tolist()
    return list(values) if isinstance(values, tuple) else values


def for_each_sample(values, items: int, samples: int):
    """Repeat one value for each item, for the samples of each. Other values are as `as_list` returns them."""
    values = as_list(values)
    if isinstance(values, list) and len(values) == items:
        return [value for value in values for _ in range(samples)]
    return values


def make_guidance(
    pipeline, batch_size: int, class_labels=None, scale=1.0, rescale=0.0, interval=(0.0, 1.0), guide=None
) -> Guidance | None:
    """Return the `Guidance` of a call, checked; None where the model has no classes and nothing is guided."""
    classes = number_of_classes(pipeline.unet)
    check_rules(
        GUIDANCE_RULES, classes=classes, class_labels=class_labels, scale=scale, rescale=rescale, interval=interval,
        guide=guide,
    )  # fmt: skip
    numbers, device = None, pipeline._execution_device
    guide = None if guide is None else _guide_model(pipeline, guide)
    if classes:
        labels = class_labels if isinstance(class_labels, (list, tuple)) else [class_labels] * batch_size
        if len(labels) != batch_size:
            raise ValueError(
                f"class_labels must be one, or one per sample: batch_size is {batch_size}, got {len(labels)} labels"
            )
        names = pipeline.config.get("id2label")
        numbers = [_class_number(label, classes, names) for label in labels]
        if isinstance(pipeline.unet, UNet2DModel) and (classes in numbers or (scale != 1 and guide is None)):
            raise ValueError(
                "a stock UNet2DModel with classes knows no prediction without a class: class_labels must be a class "
                f"for each sample, and guidance_scale 1; got {class_labels!r} and {scale!r}"
            )
    elif guide is None:
        return None
    if guide is None:
        return Guidance(numbers, classes, scale, rescale, interval, device)
    # at scale 1 too, since a callback may change the scale
    predict, has_classes = pipeline._model_to_call(device, guide), number_of_classes(guide) is not None
    return Guidance(numbers, classes, scale, rescale, interval, device, predict, has_classes)


def number_of_classes(unet) -> int | None:
    """Return the number of classes of a model; None for a model without."""
    return getattr(unet.config, "num_class_embeds", None)
