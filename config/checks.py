"""Which options go together."""

import math
from pathlib import Path

from config.options import TRAINING
from utils import UserError

FEWEST = 20  # images that a distance between sets of images needs


def check_options(cfg) -> None:
    """Raise UserError for the first options of a Config that do not go together."""
    if cfg.gpu != "cpu" and not all(index.isdecimal() for index in cfg.gpu.split(",")):
        raise UserError(f"--gpu takes the index of a CUDA device or cpu, not {cfg.gpu!r}")
    if cfg.image_size is not None and cfg.dataset != "folder":
        raise UserError(f"--image_size is for --dataset folder; {cfg.dataset} keeps its own size")
    if cfg.image_size is not None and cfg.image_size % 4:
        raise UserError(f"--image_size must be a multiple of 4, not {cfg.image_size}")
    if cfg.mode in TRAINING and not cfg.samples and cfg.p_y_x_weight == 0:
        raise UserError("--p_y_x_weight is 0 and no samples are drawn: there is nothing to train")
    if cfg.samples and cfg.buffer_size < cfg.n_chains:
        name = "p_x_batch_size" if cfg.p_x_batch_size else "batch_size"
        raise UserError(
            f"--buffer_size {cfg.buffer_size} is smaller than --{name} {cfg.n_chains}: a step "
            "draws that many different images from the buffer"
        )
    if cfg.mode == "energy_train":
        check_energy_options(cfg)
    if cfg.schedule == "step" and not cfg.decay_at:
        raise UserError("--schedule step needs --decay_epochs, the epochs after which the learning rate falls")
    if cfg.decay_epochs and cfg.schedule != "step":
        raise UserError("--decay_epochs is for --schedule step")
    if (cfg.start == "folder") != bool(cfg.start_dir):
        raise UserError("--start folder and --start_dir, its images, go together: give both or neither")
    if cfg.sync_batch_norm and cfg.norm != "batch":
        raise UserError("--sync_batch_norm needs --norm batch")
    if cfg.quality_every and cfg.mode in TRAINING and not cfg.samples:
        raise UserError("--quality_every measures samples, and this training draws none")
    if cfg.quality_every and (cfg.n_sample_steps == 0 or (cfg.n_samples or FEWEST) < FEWEST):
        raise UserError(f"--quality_every needs --n_sample_steps of 1 and --n_samples of {FEWEST}, or more")
    if cfg.quality_every and cfg.sync_batch_norm:
        raise UserError("--quality_every draws other samples in each process, which --sync_batch_norm would mix")
    if cfg.sam_adaptive and not cfg.sam_rho:
        raise UserError("--sam_adaptive needs --sam_rho, for instance 2")
    if bool(cfg.inpaint) + (cfg.denoise is not None) + cfg.from_buffer + (cfg.counterfactual is not None) > 1:
        raise UserError(
            "--inpaint, --denoise, --counterfactual and --from_buffer start from different images: give one of them"
        )
    if cfg.counterfactual_eps is not None and cfg.counterfactual is None:
        raise UserError("--counterfactual_eps is for --counterfactual, the class to change images to")
    if cfg.counterfactual is not None and cfg.n_sample_steps == 0:
        raise UserError("--n_sample_steps 0 leaves --counterfactual nothing to change: give at least 1")
    if (cfg.mode == "export") != bool(cfg.export):
        raise UserError("--mode export and --export, the file to write, go together: give both or neither")
    if cfg.export and Path(cfg.export).suffix not in (".pt", ".safetensors"):
        raise UserError(f"--export takes a name that ends in .pt or .safetensors, not {cfg.export}")
    _ = cfg.metrics, cfg.chosen_attacks, cfg.decay_at  # these refuse what they cannot read
    if cfg.attacks is not None and (cfg.mode != "test" or "robustness" not in cfg.metrics):
        raise UserError("--attacks is for --mode test with robustness in --eval")
    if cfg.attacks not in ("all", None) and "refined" in cfg.chosen_attacks and not cfg.refine_steps:
        raise UserError("--attacks refined needs --refine_steps above 0: leave out one of them")
    if cfg.mode == "test" and cfg.n_sample_steps == 0:
        raise UserError("--n_sample_steps 0 leaves --mode test nothing but noise to measure: give at least 1")
    if any(c in "/\\" or not c.isprintable() for c in cfg.note):
        raise UserError("--note becomes part of a directory's name and takes no slashes or unprintable characters")


def check_energy_options(cfg) -> None:
    """Those of ``--mode energy_train`` alone."""
    if cfg.sgld_step_max is not None and cfg.sgld_step_max <= cfg.sgld_step:
        raise UserError(f"--sgld_step_max {cfg.sgld_step_max} must be above --sgld_step {cfg.sgld_step}")
    if cfg.p_x_y_weight and not cfg.class_cond:
        raise UserError("--p_x_y_weight needs samples of p(x|y): give --class_cond as well")
    if cfg.samples and cfg.class_cond and not cfg.p_x_y_weight and cfg.p_y_x_weight == 0:
        raise UserError("--class_cond without labels to learn from: give --p_y_x_weight or --p_x_y_weight")


def check_sizes(cfg, n_images: dict[str, int], n_classes: int, n_processes: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where batches or the replay buffer do not suit the images, or cannot be divided among processes.

    ``n_images``: how many training images each batch draws from, by the name of the option that is the batch's size.
    ``shape``: an image's, (C, H, W).
    """
    sizes = {name: cfg.n_chains if name == "p_x_batch_size" else cfg.batch_size for name in n_images}
    for name, n in n_images.items():
        if sizes[name] > n:
            raise UserError(f"--{name} {sizes[name]} is larger than the {n} training images that it draws from")
    check_variance(cfg, shape, min(sizes.values()) // n_processes)
    if cfg.samples:
        sizes["buffer_size"] = cfg.buffer_size
    for name, size in sizes.items():
        if size % n_processes:
            raise UserError(f"--{name} {size} cannot be divided evenly among {n_processes} processes")
    if not (cfg.samples and cfg.class_cond):
        return
    if n_processes > 1 and cfg.buffer_size % (n_processes * n_classes):
        raise UserError(
            f"--buffer_size {cfg.buffer_size} cannot be divided evenly among {n_processes} processes and the "
            f"{n_classes} classes of --class_cond"
        )
    if cfg.buffer_size // n_processes // n_classes < math.ceil(cfg.n_chains / n_processes / n_classes):
        raise UserError(
            f"--buffer_size {cfg.buffer_size} has too few images of each of {n_classes} classes for "
            f"{cfg.n_chains} chains of --class_cond"
        )


def check_variance(cfg, shape: tuple[int, int, int], n: int) -> None:
    """Raise UserError where a batch of n images (C, H, W) leaves batch or instance normalisation no variance."""
    pixels = math.prod(math.ceil(side / 2 ** (cfg.stages - 1)) for side in shape[1:])  # in the last layer
    if cfg.norm in ("batch", "instance") and pixels * (n if cfg.norm == "batch" else 1) <= 1:
        raise UserError(
            f"--norm {cfg.norm} has one value of each channel in the last layer, which has no variance: give "
            "--stages 3 in training, larger images or, for batch, larger batches"
        )
