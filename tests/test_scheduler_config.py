"""Options and configuration of GaussianScheduler: rules, saving, and stock schedulers in both directions."""

import math

import diffusers
import pytest
import torch

from ddpm_hf.scheduler import GaussianScheduler, cosine_betas, linear_betas, sigmoid_betas

# -- options


@pytest.mark.parametrize("alias,name", [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v_prediction")])
def test_aliases_are_stored_under_the_first_name(alias, name):
    assert GaussianScheduler(prediction_type=alias).config.prediction_type == name


@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "noise"}, {"beta_schedule": "exp"}, {"variance_type": "none"}, {"sampler": "euler"},
        {"cosine_s": -1.0}, {"beta_start": None}, {"eta": "much"}, {"trained_betas": "abc"},
        {"eta": -1.0}, {"num_train_timesteps": 0}, {"timestep_spacing": "log"}, {"clip_sample_range": 0.0},
        {"sigmoid_tau": 0.0, "beta_schedule": "sigmoid"}, {"beta_schedule": "trained"}, {"sample_max_value": 0.5},
    ],
)  # fmt: skip
def test_bad_options_are_named_with_their_value(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError) as caught:
        GaussianScheduler(**options)
    assert str(value) in str(caught.value)


HUGE = 10**400  # no float holds it
NO_NUMBER = (math.nan, math.inf, -math.inf, HUGE, "text", "1", "", True, [1.0], {}, b"1", 1j, object())
NO_NAME = (*NO_NUMBER, None, 0, 1.5)
NO_SWITCH = ("no", "False", 0, 1, None, math.nan, [])
BAD = {
    "num_train_timesteps": (*NO_NUMBER, -1, 0, 2.5, 10**9),
    "trained_betas": (
        "text",
        True,
        0.1,
        [[0.1]],
        [0.1, "x"],
        [HUGE],
        [math.nan],
        [-0.1, 0.1],
        [0.1, math.inf],
        {},
        [None],
    ),
    "steps_offset": (*NO_NUMBER, None, -1, 0.5, 1e300),
    "eta": (*NO_NUMBER, None, -0.1, 1.1),
    "clip_sample_range": (*NO_NUMBER, None, -1.0, 0, 1e308),
    "dynamic_thresholding_ratio": (*NO_NUMBER, None, -1.0, 0, 1.1),
    "sample_max_value": (*NO_NUMBER, None, -1.0, 0.5),
    "beta_start": (*NO_NUMBER, None, -1.0, 0, 0.5),
    "beta_end": (*NO_NUMBER, None, -1.0, 0, 1e-9, 1, 1e308),
    "cosine_s": (*NO_NUMBER, None, -1.0, 1e308),
    "sigmoid_start": (*NO_NUMBER, None, 3.0, -1e308),
    "sigmoid_end": (*NO_NUMBER, None, -3.0, 1e308),
    "snr_shift": (*NO_NUMBER, None, 1e308, -1e308),
    "sigmoid_tau": (*NO_NUMBER, None, -1.0, 0, 0.07, 5e-324, 1e308),
    **dict.fromkeys(("beta_schedule", "prediction_type", "variance_type", "sampler", "timestep_spacing"), NO_NAME),
    **dict.fromkeys(("clip_sample", "use_clipped_model_output", "thresholding", "rescale_betas_zero_snr"), NO_SWITCH),
}


@pytest.mark.parametrize("name", BAD)
def test_every_option_refuses_bad_values_by_name(name):
    used = {"beta_": "linear", "cosine": "cosine"}
    schedule = next((value for start, value in used.items() if name.startswith(start)), "sigmoid")
    for value in BAD[name]:
        options = {"beta_schedule": schedule, name: value}
        with pytest.raises(ValueError, match=name):
            GaussianScheduler(**options)
    assert set(BAD) == GaussianScheduler._get_init_keys(GaussianScheduler) - {"self"}


def test_sampling_refuses_bad_values_by_name():
    s = GaussianScheduler(beta_schedule="cosine", prediction_type="epsilon")
    x = torch.zeros(1, 1)
    for value in (*NO_NUMBER, 0, -1, 2.5, 1001):
        with pytest.raises(ValueError, match="num_inference_steps"):
            s.set_timesteps(value)
    for value in ("text", 5, {}, [5, 5], [5.5], [math.nan], [HUGE], ["5"], [True], [None], torch.tensor(5)):
        with pytest.raises(ValueError, match="timesteps"):
            s.set_timesteps(timesteps=value)
    for value in (*NO_NUMBER, -0.1, 1.1):
        with pytest.raises(ValueError, match="eta"):
            s.step(x, 999, x, eta=value)
    for value in (*NO_NUMBER, -1, 0):
        with pytest.raises(ValueError, match="min_snr_gamma"):
            s.loss_weights(5, value)
    s.set_timesteps(timesteps=torch.tensor([900, 5]))
    assert s.timesteps.tolist() == [900, 5]


def test_save_and_load(tmp_path):
    s = GaussianScheduler(250, "sigmoid", sigmoid_tau=0.7, prediction_type="sample", eta=0.3)
    s.save_pretrained(tmp_path)
    again = GaussianScheduler.from_pretrained(tmp_path)
    assert torch.equal(again.betas, s.betas)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {k: v for k, v in s.config.items() if k[0] != "_"}


def test_changing_the_schedule_of_a_configuration():
    """Published betas give way where an option that they follow from is changed."""
    config = GaussianScheduler().config
    changed = GaussianScheduler.from_config(config, beta_schedule="linear")
    assert changed.config.trained_betas == linear_betas(1000).tolist()
    assert len(GaussianScheduler.from_config(config, num_train_timesteps=50)) == 50
    # explicit betas stay where only their rescaling is asked for, and where nothing is changed
    explicit = GaussianScheduler(trained_betas=[0.1, 0.2, 0.9], prediction_type="sample")
    same = GaussianScheduler.from_config(explicit.config, num_train_timesteps=3)
    assert same.config.trained_betas == [0.1, 0.2, 0.9]
    rescaled = GaussianScheduler.from_config(explicit.config, rescale_betas_zero_snr=True)
    assert rescaled.alphas_cumprod[0] == pytest.approx(0.9) and rescaled.config.trained_betas[-1] == 1
    unclipped = GaussianScheduler.from_config(config, clip_sample=False)
    x0 = torch.full((1, 1), 3.0)
    assert torch.equal(unclipped.clip_x0(x0), x0)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_from_a_stock_configuration(schedule):
    """Schedule, target and clipping of a stock scheduler are kept, its defaults too."""
    stock = diffusers.DDPMScheduler(num_train_timesteps=100, beta_schedule=schedule)
    ours = GaussianScheduler.from_config(stock.config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert ours.config.prediction_type == "epsilon" and ours.config.clip_sample
    back = diffusers.DDPMScheduler.from_config(ours.config)
    torch.testing.assert_close(back.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)


# -- from stock configurations

STOCK = sorted(name for name in dir(diffusers) if name.endswith("Scheduler"))
KEPT = {"DDPMScheduler": "ddpm", "DDPMParallelScheduler": "ddpm", "DDIMScheduler": "ddim",
        "DDIMParallelScheduler": "ddim"}  # fmt: skip


def chain(scheduler, steps, target, std=0.5):
    """x_0 from one x_T, by the best model for N(0.3, std^2) data on the scheduler's own abar."""
    scheduler.set_timesteps(steps)
    x = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(2, 1, 4)
    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps.tolist():
        abar = scheduler.alphas_cumprod[t].item()
        total = std**2 * abar + 1 - abar
        x0 = 0.3 + std**2 * abar**0.5 / total * (x - abar**0.5 * 0.3)
        epsilon = (1 - abar) ** 0.5 / total * (x - abar**0.5 * 0.3)
        v = abar**0.5 * epsilon - (1 - abar) ** 0.5 * x0
        out = {"sample": x0, "epsilon": epsilon, "v_prediction": v}[target]
        if scheduler.config.get("variance_type") == "learned_range":
            out = torch.cat((out, torch.full_like(out, 0.3)), dim=1)
        x = scheduler.step(out, t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("name", sorted(KEPT))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample", "timestep_spacing": "trailing"},
        {"clip_sample": False, "beta_start": 1e-3, "beta_end": 0.05, "steps_offset": 1},
        {"clip_sample_range": 0.4},
        {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.7},
        {"trained_betas": torch.linspace(0.01, 0.1, 100).tolist()},
        {"variance_type": "fixed_small_log", "beta_schedule": "sigmoid"},
        {"variance_type": "fixed_large"},
        {"variance_type": "learned_range", "timestep_spacing": "linspace"},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_a_stock_sampler_is_kept(name, options):
    """A DDIM configuration steps as DDIM at every number of steps, a DDPM one ancestrally; stock abar is float32."""
    if "variance_type" in options and KEPT[name] == "ddim":
        options = {"prediction_type": "sample"}
    stock = getattr(diffusers, name)(num_train_timesteps=100, **options)
    ours = GaussianScheduler.from_config(stock.config)
    saved = GaussianScheduler.from_config({**stock.config, "_class_name": name})
    assert ours.config.sampler == saved.config.sampler == KEPT[name]
    assert {**ours.config, "_class_name": "GaussianScheduler"} == dict(saved.config)
    torch.testing.assert_close(ours.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    for steps in (10, 50) if options.get("steps_offset") else (10, 100):
        target = stock.config.prediction_type
        got, expected = chain(ours, steps, target), chain(stock, steps, target)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", STOCK)
def test_every_stock_configuration_is_kept_or_refused_by_name(name):
    try:
        config = getattr(diffusers, name)().config
    except (ImportError, TypeError):  # another library is needed, or there are no defaults
        config = {"_class_name": name}
    saved = {**config, "_class_name": name}
    if name in KEPT:  # in numbers: see above
        assert GaussianScheduler.from_config(saved).config.sampler == KEPT[name]
        return
    with pytest.raises(ValueError, match=name):
        GaussianScheduler.from_config(saved)
    with pytest.raises(ValueError, match="Scheduler"):
        GaussianScheduler.from_config(config)
    try:
        taken = GaussianScheduler.from_config(saved, sampler="ddim")
    except ValueError as error:
        assert name in str(error)
        return
    stock = getattr(diffusers, name)()
    torch.testing.assert_close(taken.alphas_cumprod, stock.alphas_cumprod, rtol=1e-5, atol=1e-7)
    assert taken.config.prediction_type == stock.config.prediction_type and taken.config.sampler == "ddim"
    assert taken.config.clip_sample == stock.config.get("clip_sample", False) and not taken.config.thresholding


@pytest.mark.parametrize(
    ("name", "message"),
    [("FlowMatchEulerDiscreteScheduler", "and GaussianScheduler has neither its steps nor its schedule"),
     ("DPMSolverMultistepScheduler", "whose steps GaussianScheduler does not have: give sampler='ddim' or 'ddpm'")],
)  # fmt: skip
def test_a_configuration_in_memory_is_known_by_all_its_options(name, message):
    """The options of some classes are the first ones of others."""
    with pytest.raises(ValueError, match=f"the options are those of {name}, {message}"):
        GaussianScheduler.from_config(getattr(diffusers, name)().config)


def test_a_keyword_beside_a_stock_configuration_changes_only_itself():
    """Stock "sigmoid" is a sigmoid of betas: with another end it is still that, and with zero SNR it is rescaled."""
    stock = diffusers.DDPMScheduler(beta_schedule="sigmoid", prediction_type="v_prediction", clip_sample_range=3.0)
    for options in ({"beta_end": 0.01}, {"num_train_timesteps": 200}, {"rescale_betas_zero_snr": True}, {"eta": 0.5}):
        ours = GaussianScheduler.from_config(stock.config, **options)
        changed = diffusers.DDPMScheduler.from_config(stock.config, **{k: v for k, v in options.items() if k != "eta"})
        torch.testing.assert_close(ours.alphas_cumprod, changed.alphas_cumprod, rtol=1e-5, atol=1e-7)
        assert ours.config.sampler == "ddpm" and ours.config.clip_sample_range == 3
    # the keyword beta_schedule is the constructor's; stock's names stay stock's
    ours = GaussianScheduler.from_config(stock.config, beta_schedule="sigmoid")
    assert ours.config.trained_betas == sigmoid_betas(1000).tolist() and ours.config.clip_sample_range == 3
    ours = GaussianScheduler.from_config(stock.config, beta_schedule="squaredcos_cap_v2")
    torch.testing.assert_close(ours.betas, cosine_betas(1000).float(), rtol=1e-5, atol=1e-7)
    assert GaussianScheduler.from_config(stock.config, sampler="ddim").config.sampler == "ddim"


@pytest.mark.parametrize(
    "options, keywords, match",
    [
        ({"set_alpha_to_one": False}, {}, "set_alpha_to_one must be True"),
        ({}, {"sigmoid_tau": 0.5}, "sigmoid_tau would change nothing"),
        ({"trained_betas": [0.1, 0.2]}, {"beta_end": 0.5}, "beta_end would change nothing"),
        ({}, {"sigmoid_tua": 0.5}, "does not know: sigmoid_tua"),
        ({}, {"solver_order": 3}, "does not know: solver_order"),
        ({}, {"beta_schedule": "exp"}, "'exp'"),
        ({"prediction_type": "flow"}, {}, "flow"),
        ({"rescale_betas_zero_snr": True}, {}, "rescale_betas_zero_snr.*epsilon"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(options, keywords, match):
    total = len(options.get("trained_betas", range(1000)))
    stock = diffusers.DDIMScheduler(total, **options)
    with pytest.raises(ValueError, match=match):
        GaussianScheduler.from_config(stock.config, **keywords)
    with pytest.raises(ValueError, match="does not know: beta_strat"):
        GaussianScheduler.from_config({**stock.config, "beta_strat": 1})
    assert GaussianScheduler.from_config(diffusers.DDIMScheduler(set_alpha_to_one=False).config, set_alpha_to_one=True)


@pytest.mark.parametrize("name", [*KEPT, "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler",
                                  "EulerDiscreteScheduler", "LCMScheduler"])  # fmt: skip
def test_a_stock_scheduler_made_of_our_configuration_gives_it_back(name):
    own = GaussianScheduler(50, "sigmoid", sigmoid_tau=0.7, eta=0.2, steps_offset=0, clip_sample_range=2.0)
    kind = getattr(diffusers, name)
    through = kind.from_config(own.config)
    for config in (through.config, {**through.config, "_class_name": name}):
        back = GaussianScheduler.from_config(config)
        public = [{k: v for k, v in s.config.items() if k in GaussianScheduler._get_init_keys(s)} for s in (own, back)]
        assert public[0] == public[1]
    # a schedule that was changed meanwhile is the stock library's
    if name in KEPT:
        other = kind.from_config(own.config, trained_betas=None, beta_schedule="linear")
        back = GaussianScheduler.from_config(other.config)
        torch.testing.assert_close(back.alphas_cumprod, other.alphas_cumprod, rtol=1e-5, atol=1e-7)


# -- betas, and what the configuration publishes


@pytest.mark.parametrize(
    "options, wrong",
    [
        ({"beta_schedule": "sigmoid", "sigmoid_tau": 0.07}, "sigmoid_tau=0.07"),
        ({"beta_schedule": "sigmoid", "sigmoid_start": -100.0}, "sigmoid_start=-100.0"),
        ({"beta_schedule": "sigmoid", "sigmoid_end": 50.0}, "sigmoid_end=50.0"),
        ({"beta_schedule": "cosine", "cosine_s": 1e30}, "cosine_s=1e[+]30"),
        ({"beta_schedule": "linear", "beta_start": 1e-30}, "beta_start=1e-30"),
        ({"beta_schedule": "cosine", "num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "timesteps=1"),
        ({"trained_betas": [0.1, math.nan, 0.2]}, "nan at t=1, from trained_betas"),
        ({"trained_betas": [0.1, 1.0, 0.2], "rescale_betas_zero_snr": True}, "1 at t=1, from trained_betas"),
        ({"trained_betas": [0.99] * 200}, "from trained_betas"),
        ({"trained_betas": [1e-17, 0.5]}, "1e-17 at t=0, from trained_betas"),
    ],
)
def test_betas_are_checked_whatever_made_them(options, wrong):
    """At sigmoid_tau=0.07 the schedule's last 71 betas were 0 / 0, and samples NaN."""
    with pytest.raises(ValueError, match=wrong):
        GaussianScheduler(**options)


def test_what_is_published_is_float32_as_in_stock_schedulers():
    """A hand-written loop keeps its dtype; inside, coefficients stay float64."""
    ours = GaussianScheduler(beta_schedule="cosine", prediction_type="epsilon")
    stock = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    for name in ("betas", "alphas", "alphas_cumprod"):
        values = getattr(ours, name)
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, getattr(stock, name), rtol=1e-5, atol=1e-7)
    x = torch.randn(2, 3)
    abar = ours.alphas_cumprod[[10, 500]].reshape(2, 1)
    noisy = abar.sqrt() * x + (1 - abar).sqrt() * x
    assert noisy.dtype == torch.float32 and torch.nn.Linear(3, 3)(noisy).shape == (2, 3)
    torch.testing.assert_close(noisy, ours.add_noise(x, x, torch.tensor([10, 500])), rtol=1e-5, atol=1e-6)
    assert ours.snr(999).dtype == torch.float64


@pytest.mark.parametrize(
    "made, changed, limit",
    [
        ({}, {}, 1.0),
        ({}, {"clip_sample_range": 2}, 2.0),
        ({}, {"clip_sample": False}, math.inf),
        ({}, {"sample_max_value": 3.0}, 1.0),
        ({"clip_sample": False}, {"clip_sample": True}, 1.0),
        ({"clip_sample_range": 2.0}, {"clip_sample_range": 1.0}, 1.0),
        ({"thresholding": True, "clip_sample_range": 2.0}, {}, 1.0),
    ],
)
def test_what_is_published_is_what_is_used(made, changed, limit):
    """Ours and a stock DDIM of its configuration clip x0 at the same place, before and after a change."""
    own = GaussianScheduler.from_config(GaussianScheduler(**made).config, **changed)
    x0 = torch.linspace(-4, 4, 9, dtype=torch.float64).reshape(1, 1, 9)
    assert torch.equal(own.clip_x0(x0), x0.clamp(-limit, limit))
    stock = diffusers.DDIMScheduler.from_config(own.config)
    for s in (own, stock):
        s.set_timesteps(1)
    x_t = own.add_noise(x0, torch.zeros_like(x0), 999)
    v = own.get_velocity(x0, torch.zeros_like(x0), 999)
    got = stock.step(v, 999, x_t).pred_original_sample
    torch.testing.assert_close(got, x0.clamp(-limit, limit), rtol=1e-4, atol=1e-4)
