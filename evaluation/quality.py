"""How good samples are: Inception scores, distances in a classifier's features, nearest training images.

Images are uint8 (N, C, H, W).
"""

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm import tqdm

from data import to_float
from evaluation.distances import BATCH, Features, frechet_distance, inception, inception_scorer, nearest
from evaluation.inputs import Inputs, evaluation_packages
from evaluation.report import Section
from models import JEM, sampling_copy
from models.predict import images_per_batch, predict
from sgld import FRESH_STEPS, SGLD, Start, chain_options
from starts import NAMES, build_start
from storage.pictures import image_grid, to_uint8
from utils import UserError, pick_dtype

INCEPTION_FEATURES = 2048


def fresh_samples(
    sgld: SGLD,
    n: int,
    start: Start,
    n_classes: int,
    steps: int,
    sgld_lr: float,
    sgld_std: float,
    generator: Generator,
    class_cond: bool = False,
) -> tuple[Tensor, Tensor]:
    """The starts of n chains, of each class in turn, and their ends after ``steps`` SGLD steps, uint8 (n, C, H, W)."""
    starts, ends, y = [], [], None
    batch = min(n, images_per_batch(BATCH, start.shape))
    for first in tqdm(range(0, n, batch), desc="fresh samples", unit="batch", leave=False):
        # Always whole batches: a chain's CUDA graph has a fixed shape, and batch normalisation sees them all.
        classes = [i % n_classes for i in range(first, first + batch)]
        if class_cond:
            y = torch.tensor(classes, device=generator.device)
        x = start(classes, generator)
        starts.append(to_uint8(x[: n - first]))
        ends.append(to_uint8(sgld(x, steps, sgld_lr, sgld_std, generator, y).x[: n - first]))
    return torch.cat(starts), torch.cat(ends)


def most_confident(logits: Tensor, share: float = 0.9) -> Tensor:
    """Indices of the ``share`` most confident images of each predicted class; logits: (N, K)."""
    confidence, classes = logits.softmax(1).max(1)
    kept = []
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        order = confidence[members].argsort(descending=True, stable=True)
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return torch.cat(kept)


# ---------------------------------------------------------------------------------------------- the metric


def measure(inputs: Inputs, section: Section) -> None:
    """Scores and pictures of the model's samples, from noise and from the replay buffer."""
    cfg, model = inputs.cfg, inputs.model
    dtype = pick_dtype(cfg.precision, inputs.device)
    sampler = sampling_copy(model, dtype)
    steps = FRESH_STEPS if cfg.n_sample_steps is None else cfg.n_sample_steps
    n = cfg.n_samples or min(10_000, cfg.max_images or 10_000)
    sgld = SGLD(sampler.log_density, **chain_options(cfg))
    start, n_classes = build_start(cfg.start, inputs.data, cfg.start_dir), len(inputs.data.class_names)
    starts, fresh = fresh_samples(
        sgld, n, start, n_classes, steps, cfg.sgld_lr, cfg.sgld_std, inputs.rng(), cfg.class_cond
    )
    clamps = [f"gradient clamped to {cfg.sgld_grad_clamp:g}"] if cfg.sgld_grad_clamp else []
    clamps += ["images clamped to [-1, 1]"] if cfg.sgld_clamp else []
    clamps += ["gradients of length 1"] if cfg.sgld_normalize else []
    sets = {
        "fresh": (
            fresh,
            f"chains of {steps} SGLD steps on {'log p(x|y)' if cfg.class_cond else 'log p(x)'} from "
            f"{NAMES[cfg.start]}, step size {cfg.sgld_lr:g}, noise {cfg.sgld_std:g}, {', '.join([*clamps, ''])}"
            f"network in {str(dtype).removeprefix('torch.')}, unfiltered",
        ),
        "chain starts": (starts, f"what these chains start from: {NAMES[cfg.start]}"),
    }
    if inputs.buffer is None:
        section.skip("samples of the replay buffer", "the checkpoint has none; train with --mode energy_train")
    else:
        held = to_uint8(inputs.buffer[inputs.buffer.isfinite().all(dim=(1, 2, 3))])[:n]
        sets["buffer"] = (held, "replay buffer, unfiltered")
        kept = most_confident(predict(model, held)).sort().values
        sets["buffer, filtered"] = (
            held[kept],
            "replay buffer, the 90 % most confident of each predicted class (the "
            "protocol of SADA-JEM's FID: not comparable with unfiltered numbers)",
        )
    train = inputs.subset(inputs.data.train)

    try:
        with evaluation_packages():
            add_inception_scores(section, sets, train.images)
    except UserError as error:
        section.skip("FID, IS, KID", str(error))
    feature_model, test = inputs.feature_model, inputs.subset(inputs.data.test).images
    try:
        if not feature_model:
            raise UserError("no --feature_ckpt names one")
        with evaluation_packages():
            add_feature_distances(section, sets, train.images, test, model, feature_model, cfg.feature_ckpt)
    except UserError as error:
        section.skip("Fréchet distance in a classifier's features", str(error))

    sets.pop("buffer, filtered", None)
    for name, (images, protocol) in sets.items():
        section.picture(f"samples_{name.replace(' ', '_')}", f"Samples: {protocol}", image_grid(images[:100], 10))
    sets["test images"] = (inputs.subset(inputs.data.test, 1000).images, "test images")
    add_nearest(section, sets, train.images, Features(feature_model or model))


def add_inception_scores(section: Section, sets: dict[str, tuple[Tensor, str]], real: Tensor) -> None:
    scorer = inception_scorer(inception(real.device), real)
    for name, (images, protocol) in sets.items():
        if len(images) < 20:
            section.skip(f"FID, IS, KID of {name}", f"they need at least 20 images, not {len(images)}")
            continue
        warn_of_few(section, f"FID of {name}", images, real, INCEPTION_FEATURES)
        scores, n = scorer(images), len(images)
        against = f"{protocol}; Inception-v3 of torch-fidelity, against {len(real)} training images"
        table = "Inception scores"
        section.add(table, scores.fid, n, against, at=(name, "FID"))
        for key, (mean, std) in {"IS": scores.inception_score, "KID": scores.kid}.items():
            section.add(table, mean, n, against, at=(name, key))
            section.add(table, std, n, against, at=(name, f"{key}, standard deviation"))


def warn_of_few(section: Section, what: str, images: Tensor, real: Tensor, n_features: int) -> None:
    """Note that a Fréchet distance means little if it rests on fewer images than features."""
    n = min(len(images), len(real))
    if n < n_features:
        section.note(
            f"**{what} means little:** it rests on {n} images but {n_features} features, whose covariance that many "
            "images do not determine. Distances are comparable only between equal numbers of images."
        )


def add_feature_distances(
    section: Section,
    sets: dict[str, tuple[Tensor, str]],
    real: Tensor,
    test: Tensor,
    model: JEM,
    feature_model: JEM,
    feature_ckpt: str,
) -> None:
    """Fréchet distances in a classifier's features, with that of test images as the best to hope for, and agreement."""
    table = "in a classifier's features"
    distance, features = (
        frechet_distance(Features(feature_model), real),
        f"features of {feature_ckpt}, {len(real)} training images",
    )
    warn_of_few(section, "Fréchet distance of test images", test, real, feature_model.f.n_features)
    section.add(table, distance(test), len(test), f"test images; {features}", at=("test images", "Fréchet distance"))
    for name, (images, protocol) in sets.items():
        if len(images) < 2:
            section.skip(f"Fréchet distance of {name}", f"{len(images)} image has no covariance")
        else:
            warn_of_few(section, f"Fréchet distance of {name}", images, real, feature_model.f.n_features)
            section.add(table, distance(images), len(images), f"{protocol}; {features}", at=(name, "Fréchet distance"))
        agree = predict(feature_model, images).argmax(1) == predict(model, images).argmax(1)
        section.share(
            table,
            agree,
            f"{protocol}; share of the samples that {feature_ckpt} puts into the class that the model itself does",
            (name, "accuracy"),
        )


def add_nearest(section: Section, sets: dict[str, tuple[Tensor, str]], train: Tensor, features: Features) -> None:
    """How far images lie from the nearest training image, and ten of each set beside it in a picture."""
    in_pixels, in_features = to_float(train), predict(features, train)
    for name, (images, protocol) in sets.items():
        distance, like = nearest(to_float(images[:1000]), in_pixels)
        section.mean(
            "L2 distance to the nearest training image",
            distance,
            f"{protocol}, at most 1,000; pixels in [-1, 1], {len(train)} training images",
            (name, "mean"),
        )
        shown = images[:10]
        by_features, alike = nearest(predict(features, shown), in_features)
        rows = {
            "image": (shown, None),
            "nearest in pixels": (train[like[:10]], distance),
            "nearest in features": (train[alike], by_features),
        }
        section.picture(
            f"nearest_{name.replace(' ', '_')}",
            f"Images ({name}) and the training image nearest to each, with its L2 distance",
            nearest_figure(rows),
        )


def nearest_figure(rows: dict[str, tuple[Tensor, Tensor | None]]) -> Figure:
    """A titled row of images, uint8 (N, C, H, W), with a number (N,) below each where there is one."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    columns = max(len(images) for images, _ in rows.values())
    panels = figure.subplots(len(rows), columns, squeeze=False)
    for (title, (images, numbers)), line in zip(rows.items(), panels, strict=True):
        line[0].set_ylabel(title.replace(" in ", "\nin "), rotation=0, ha="right", va="center")
        for i, axes in enumerate(line):
            axes.set(xticks=[], yticks=[], frame_on=False)
            if i < len(images):
                axes.imshow(image_grid(images[i : i + 1], padding=0))
                axes.set_xlabel("" if numbers is None else f"{numbers[i].item():.3g}", fontsize=8)
    return figure
