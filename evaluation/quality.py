"""How good samples are: distances to real images in a network's features, and nearest training images.

Images are uint8 (N, C, H, W).
"""

from collections.abc import Callable

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

import distributed
from chain_init import NAMES, build_chain_init
from config import Config
from config.checks import FEWEST
from data import Split, to_float
from evaluation.fid import (
    KID_SUBSETS,
    NEIGHBOURS,
    Features,
    distances_to,
    inception,
    inception_outputs,
    inception_score,
    nearest,
)
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from evaluation.training_fid import fresh_samples
from logger.images import image_grid, to_uint8
from models import JEM, frozen_sampler_model
from models.predict import predict
from sgld import SGLD, chain_options, step_protocol
from utils import UserError, evaluation_packages, pick_dtype


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


def measure(inputs: EvalInputs, section: Section) -> None:
    """Scores and pictures of the model's samples, fresh ones and those of the replay buffer, beside real images."""
    cfg, model, feature_model = inputs.cfg, inputs.model, inputs.feature_model
    if not len(inputs.data.train):
        raise UserError("these data are test images alone: there are no training images to compare with")
    sets = compared(inputs, section)
    real = reference(inputs)
    test = inputs.subset(inputs.data.test, samples_wanted(cfg)).images
    parts = "some of which may be" if cfg.max_images else "which are"
    floor = "test images" + (f", {parts} part of the reference" if cfg.fid_reference == "train+test" else "")
    scored = {"test images": (test, floor)} | sets
    try:
        with evaluation_packages():
            add_inception_scores(section, scored, real, cfg.seed)
    except UserError as error:
        section.skip("FID, IS, KID", str(error))
    try:
        if not feature_model:
            raise UserError("no --feature_ckpt names one")
        with evaluation_packages():
            add_feature_distances(section, scored, real, feature_model, cfg)
    except UserError as error:
        section.skip("Fréchet distance in a classifier's features", str(error))
    if feature_model and inputs.classifies:
        add_agreement(section, scored, model, feature_model, cfg.feature_ckpt)

    sets.pop("buffer, filtered", None)
    for name, (images, protocol) in sets.items():
        section.picture(f"samples_{as_file(name)}", f"Samples: {protocol}", image_grid(images[:100], 10))
    sets["test images"] = (inputs.subset(inputs.data.test, 1000).images, "test images")
    train = inputs.subset(inputs.data.train)
    add_nearest(section, sets, train.images, Features(feature_model or model))


def samples_wanted(cfg: Config) -> int:
    return cfg.n_samples or min(10_000, cfg.max_images or 10_000)


def reference(inputs: EvalInputs) -> tuple[Tensor, str]:
    """The real images of ``--fid_reference``, uint8 (N, C, H, W), and what they are."""
    data, with_test = inputs.data, inputs.cfg.fid_reference == "train+test"
    parts = [data.train, data.valid, *([data.test] if with_test else [])]
    where = data.train.images.device  # perhaps the host: only what is chosen goes to the device
    together = Split(*(torch.cat([getattr(part, name).to(where) for part in parts]) for name in ("images", "labels")))
    images = inputs.subset(together).images
    return images, f"{len(images)} {'training, validation and test' if with_test else 'training and validation'} images"


def compared(inputs: EvalInputs, section: Section) -> dict[str, tuple[Tensor, str]]:
    """The sets of samples, uint8 (N, C, H, W), by name, each with its protocol; those that cannot be are skipped."""
    cfg, n, no_labels = inputs.cfg, samples_wanted(inputs.cfg), "the model was trained without labels"
    sets = chains(inputs, n)
    if not inputs.classifies:
        section.skip("fresh, class-conditional", no_labels)
    if inputs.buffer is None:
        section.skip(
            "samples of the replay buffer",
            "the checkpoint has none: only last.pt of --mode energy_train does, so name the run",
        )
        return sets
    order = torch.randperm(len(inputs.buffer), generator=Generator().manual_seed(cfg.seed))  # perhaps laid out by class
    held = to_uint8(inputs.buffer[order[:n].to(inputs.device)])
    sets["buffer"] = (held, "replay buffer, unfiltered")
    if not inputs.classifies:
        section.skip("buffer, filtered", no_labels)
        return sets
    kept = most_confident(predict(inputs.model, held)).sort().values
    sets["buffer, filtered"] = (
        held[kept],
        "replay buffer, the 90 % most confident of each predicted class (the "
        "protocol of SADA-JEM's FID: not comparable with unfiltered numbers)",
    )
    return sets


def chains(inputs: EvalInputs, n: int) -> dict[str, tuple[Tensor, str]]:
    """n fresh samples of log p(x) and, of a model that classifies, as many of log p(x|y), and what both start from."""
    cfg, dtype = inputs.cfg, pick_dtype(inputs.cfg.precision, inputs.device)
    steps = cfg.fresh_steps
    n_classes = len(inputs.data.class_names)
    sgld = SGLD(frozen_sampler_model(inputs.model, dtype).log_density, **chain_options(cfg))
    start = build_chain_init(cfg, inputs.data)
    targets = {"fresh": "log p(x)"}
    if inputs.classifies:
        targets["fresh, class-conditional"] = "log p(x|y), as many of each class as can be,"
    print(f"  samples: {len(targets)} times {n} chains of {steps} SGLD steps", flush=True)
    sets = {}
    for name, target in targets.items():
        starts, ends = fresh_samples(  # both from the same starts
            sgld,
            n,
            start,
            n_classes,
            steps,
            cfg.sgld_lr,
            cfg.sgld_std,
            inputs.rng(),
            class_cond=name != "fresh",
        )
        sets["chain starts"] = (starts, f"what these chains start from: {NAMES[cfg.start]}")
        sets[name] = (
            ends,
            f"chains of {steps} SGLD steps on {target} from {NAMES[cfg.start]}, {step_protocol(cfg)}, "
            f"network in {str(dtype).removeprefix('torch.')}, unfiltered",
        )
    return sets


def add_inception_scores(
    section: Section, sets: dict[str, tuple[Tensor, str]], real: tuple[Tensor, str], seed: int
) -> None:
    """The table of FID, KID, precision, recall and IS."""
    network = distributed.rank0_first(lambda: inception(real[0].device))

    def outputs(images: Tensor) -> tuple[Tensor, Tensor]:
        return inception_outputs(network, images, "Inception's features")

    add_distances(section, "Inception scores", "FID", sets, real, outputs, "Inception-v3 of torch-fidelity", seed)


def add_feature_distances(
    section: Section, sets: dict[str, tuple[Tensor, str]], real: tuple[Tensor, str], feature_model: JEM, cfg: Config
) -> None:
    """The same table without IS, in a classifier's features."""
    features = Features(feature_model)

    def outputs(images: Tensor) -> tuple[Tensor, None]:
        return predict(features, images), None

    table = "in a classifier's features"
    add_distances(section, table, "Fréchet distance", sets, real, outputs, f"features of {cfg.feature_ckpt}", cfg.seed)


def add_distances(
    section: Section,
    table: str,
    frechet: str,
    sets: dict[str, tuple[Tensor, str]],
    real: tuple[Tensor, str],
    network: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    space: str,
    seed: int,
) -> None:
    """A row for each set: its distances to the real images in the ``space`` of a network's features.

    ``network``: from uint8 images to features (N, D) and logits (N, K), from which IS is computed, or None. ``frechet``
    is the name of the Fréchet distance.
    """
    real_images, what = real
    real_features, _ = network(real_images)
    distances, few = None, []
    for name, (images, protocol) in sets.items():
        n = min(len(images), len(real_features))
        if n < FEWEST:
            section.skip(f"{table}, {name}", f"needs at least {FEWEST} samples and real images, not {n}")
            continue
        distances = distances or distances_to(real_features)
        features, logits = network(images)
        torch.manual_seed(seed)  # so that a row is the same whichever others there are
        score = {}
        if logits is not None:
            score["IS"], score["IS, standard deviation"] = inception_score(logits)
        found = distances(features)
        columns = {
            frechet: found.frechet,
            "KID": found.kid[0],
            "KID, standard deviation": found.kid[1],
            "precision": found.precision,
            "recall": found.recall,
        } | score
        against = (
            f"{protocol}; {space}, against {what}; KID of {KID_SUBSETS} subsets of {found.subset_size} images, "
            f"precision and recall with {NEIGHBOURS} nearest neighbours"
        )
        for column, value in columns.items():
            section.add(table, value, len(images), against, at=(name, column))
        if n < features.shape[1]:
            few.append(name)
    if few:
        warn_of_few(section, frechet, few, real_features.shape[1])


def warn_of_few(section: Section, frechet: str, names: list[str], n_features: int) -> None:
    """Note that a Fréchet distance means little if it rests on fewer images than features."""
    section.note(
        f"**{frechet} means little here** ({', '.join(names)}): there are fewer images than the {n_features} "
        "features, too few to estimate their covariance. Compare it only between equal numbers of images."
    )


def add_agreement(
    section: Section, sets: dict[str, tuple[Tensor, str]], model: JEM, feature_model: JEM, feature_ckpt: str
) -> None:
    """How often another classifier and the model itself predict the same class."""
    for name, (images, protocol) in sets.items():
        agree = predict(feature_model, images).argmax(1) == predict(model, images).argmax(1)
        section.share(
            "in a classifier's features",
            agree,
            f"{protocol}; share of images for which {feature_ckpt} and the model predict the same class",
            (name, "same class"),
        )


def as_file(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")


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
            f"nearest_{as_file(name)}",
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
