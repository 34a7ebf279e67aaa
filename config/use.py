"""Which modes read which options; an option that its mode does not read is refused."""

from dataclasses import fields
from typing import Any

from config import Config
from config.options import MODES, TRAINING
from utils import UserError

READ_BY = {  # groups of options, and the modes that read them; all modes take the options of other groups
    "optimisation": TRAINING,
    "objective": TRAINING,
    "dumps": TRAINING,
    "test": ("test",),
    "sample": ("sample",),
} | dict.fromkeys(("SGLD", "speed"), (*TRAINING, "test", "sample"))
READ_BY |= {  # single options
    **dict.fromkeys("labels_per_class sigma no_flip dropout_rate buffer_size reinit_freq".split(), TRAINING),
    **dict.fromkeys(("sgld_step_max", "sgld_step_auroc", "sync_batch_norm"), TRAINING),
    **dict.fromkeys(("batch_size", "sgld_step", "class_cond", "compile"), (*TRAINING, "sample")),
    **dict.fromkeys(("n_samples", "n_sample_steps"), (*TRAINING, "test", "sample")),
    **dict.fromkeys(("feature_ckpt", "no_log"), (*TRAINING, "test")),
    **dict.fromkeys(("n_valid", "data_device"), (*TRAINING, "test", "sample")),
}
# Options of --mode sample that start from images of their own, and those that these leave unread.
UNREAD = {name: ["start", "start_dir"] for name in ("counterfactual", "inpaint", "denoise", "from_buffer")}
UNREAD["counterfactual"] += "sgld_lr sgld_std sgld_grad_clamp sgld_clamp sgld_normalize precision compile seed".split()
NEEDS = {  # in training: an option, and those of which it needs one: without, it does nothing
    "sgld_step_auroc": ["sgld_step_max"],
    "adversarial_steps": ["adversarial_eps"],
    "adversarial_norm": ["adversarial_eps"],
    "adversarial_eps": ["p_y_x_weight"],
    "labels_per_class": ["p_y_x_weight", "p_x_y_weight"],
    "decay_rate": ["decay_epochs"],
    "generative": ["p_x_weight"],
    "feature_ckpt": ["quality_every"],
    "n_samples": ["quality_every"],
    "n_sample_steps": ["quality_every"],
}


def check_use(given: dict[str, Any]) -> None:
    """Raise UserError for an option of a command line that its mode does not read.

    ``baseline_train`` also accepts the options of chains and samples, so that you only have to change --mode in a
    command line; for the same reason ``check_training`` accepts them with ``--p_x_weight 0``.
    """
    mode = given.get("mode", Config.mode)
    if mode not in MODES:  # Config refuses it
        return
    for f in fields(Config):
        modes = READ_BY.get(f.name, READ_BY.get(f.metadata["group"], MODES))
        if f.name in given and mode not in modes:
            raise UserError(f"--{f.name} is for --mode {' or '.join(modes)}")
    for name in (name for name in UNREAD if given.get(name)):
        for unread in (unread for unread in UNREAD[name] if unread in given):
            raise UserError(f"--{name} does not use --{unread}: leave it out")
    if given.get("counterfactual") and given.get("class_cond"):
        raise UserError("--counterfactual names the class itself: leave --class_cond out")
    if mode == "sample" and "sgld_step" in given and (not given.get("denoise") or "n_sample_steps" in given):
        raise UserError("--sgld_step is for training, and for --denoise without --n_sample_steps: leave it out")


def check_training(given: dict[str, Any], cfg: Config) -> None:
    """Raise UserError for a given option that does nothing in a training run, or that cannot be in a new one."""
    for name, needed in NEEDS.items():
        if given.get(name) and not any(getattr(cfg, option) for option in needed):
            raise UserError(f"--{name} does nothing without --{' or --'.join(needed)}")
    if given.keys() & {"p_x_y_weight", "adversarial_eps"} and cfg.p_x_y_weight and cfg.adversarial_eps:
        raise UserError("--p_x_y_weight needs the labelled images as they are: give it with --adversarial_eps 0")
