"""Training recipes, one a paper: named sets of options. Options that are also given replace the recipe's."""

from typing import Any, NamedTuple


class Recipe(NamedTuple):
    paper: str
    summary: str
    options: dict[str, Any]


CHAINS = {"norm": "batch", "sgld_std": 0.0, "sgld_grad_clamp": 1.0, "sgld_clamp": True}
SGD = {"optimizer": "sgd", "lr": 0.1, "schedule": "step", "decay_rate": 0.2, "weight_decay": 5e-4}
CLEAN = {"batch_size": 128, "sigma": 0.0, "p_x_batch_size": 64, "p_x_no_augment": True}
EPOCHS = {"epochs": 200, "decay_epochs": "60,120,180"}

RECIPES = {
    "jem": Recipe(
        "Grathwohl et al., ICLR 2020, arXiv 1912.03263",
        "no normalisation, chains of 20 noisy steps from noise, Adam; the program's defaults",
        {},
    ),
    "jem++": Recipe(
        "Yang and Ji, ICCV 2021, arXiv 2109.09032",
        "batch normalisation, chains of 10 clamped steps from a Gaussian of each class, SGD",
        dict(CHAINS | SGD, sgld_step=10, start="class_gaussian", batch_size=64, p_x_batch_size=64, weight_decay=4e-4)
        | {"epochs": 150, "decay_epochs": "50,100,125"},
    ),
    "m-jem": Recipe(
        "Yang et al., PAKDD 2023, arXiv 2303.04343",
        "as jem++, but 5 steps from one Gaussian, clean images for p(x), a head of its own for log p(x), and a penalty",
        dict(CHAINS | SGD | CLEAN | EPOCHS, sgld_step=5, start="gaussian", separate_energy=True, mean_energy_l2=0.5)
        | {"mean_energy_form": "real_squares"},
    ),
    "dat": Recipe(
        "DAT, ICLR 2026, arXiv 2510.13872",
        "adversarial images for the classifier; longer and longer chains of log p(x|y), of steps of fixed length, from "
        "other images (--start_dir) or a Gaussian of each class; a logistic loss; running statistics",
        dict(SGD | EPOCHS, backbone="robust", activation="relu", depth=34, norm="batch", norm_statistics="running")
        | {"batch_size": 128, "p_x_batch_size": 128, "augment": "auto", "sigma": 0.0, "class_cond": True}
        | {"sgld_normalize": True, "sgld_lr": 0.2, "sgld_std": 0.0, "sgld_clamp": True, "reinit_freq": 1.0}
        | {"sgld_step": 0, "sgld_step_max": 50, "sgld_step_auroc": 0.8, "start": "class_gaussian"}
        | {"adversarial_eps": 0.5, "adversarial_norm": "L2", "adversarial_steps": 10, "adversarial_step_size": 0.1}
        | {"generative": "logistic", "ema": 0.999},
    ),
    "sada-jem": Recipe(
        "Yang et al., CVPR 2023, arXiv 2209.07959",
        "as m-jem without head and penalty, with a Gaussian of each class and adaptive sharpness-aware minimisation",
        dict(CHAINS | SGD | CLEAN | EPOCHS, sgld_step=5, start="class_gaussian", sam_rho=2.0, sam_adaptive=True),
    ),
    "oe-jem": Recipe(
        "this program's own; outlier exposure: Liu et al., NeurIPS 2020, arXiv 2010.03759",
        "a short second phase after m-jem or sada-jem, with --load_ckpt: batch normalisation stays as it is, and log "
        "p(x) of noise, shapes and mixed images falls below that of images",
        dict(CHAINS | CLEAN, optimizer="sgd", lr=0.003, weight_decay=5e-4, warmup_steps=50, ema=0.995, grad_clip=5.0)
        | {"schedule": "step", "decay_epochs": "1", "decay_rate": 0.3, "epochs": 2, "norm_statistics": "frozen"}
        | {"sgld_step": 5, "start": "class_gaussian", "reinit_freq": 0.1, "p_x_batch_size": 32, "mean_energy_l2": 0.1}
        | {"generative": "logistic", "outlier_weight": 1.0, "outlier_batch_size": 32, "n_sample_steps": 50}
        | {"outlier_images": "smooth:0.4,shapes:0.5,mixed:0.1"},
    ),
}
