"""How good samples are: distances to real images in a network's features, and nearest training images.

Images are uint8 (N, C, H, W).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from chain_init import NAMES, build_chain_init
from config import Config
from config.checks import FEWEST, check_variance
from data import Split, to_float
from evaluation import fid
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from generation.chains import StartImages, run_chains
from logger.images import captioned, image_grid, to_uint8
from models import JEM, frozen_sampler_model
from models.predict import predict
from sgld import step_protocol
from utils import UserError, evaluation_packages, pick_dtype


class ImageSet(NamedTuple):
    images: Tensor  # uint8 (N, C, H, W)
    protocol: str  # what they are


def most_confident(logits: Tensor, share: float = 0.9) -> Tensor:
    """Indices of the ``share`` most confident images of each predicted class; logits: (N, K)."""
    confidence, classes = logits.softmax(1).max(1)
    kept = []
    for k in classes.unique():
        members = (classes == k).nonzero().flatten()
        order = confidence[members].argsort(descending=True, stable=True)
        kept.append(members[order[: max(1, round(share * len(members)))]])
    return torch.cat(kept)


def measure(inputs: EvalInputs, section: Section) -> None:
    """Scores and pictures of the model's samples, fresh ones and those of the replay buffer, beside real images."""
    cfg, feature_model = inputs.cfg, inputs.feature_model
    if not len(inputs.data.train):
        raise UserError("these data are test images alone: there are no training images to compare with")
    sets = sample_sets(inputs, section)
    real = reference(inputs)
    protocol = "test images"
    if cfg.fid_reference == "train+test":
        protocol += f", {'some of which may be' if cfg.max_images else 'which are'} part of the reference"
    test = ImageSet(inputs.subset(inputs.data.test, samples_wanted(cfg)).images, protocol)
    scored = {"test images": test} | sets
    try:
        with evaluation_packages():
            add_distances(section, fid.InceptionSpace(inputs.device), scored, real)
    except UserError as error:
        section.add_absent("FID, IS, KID", str(error))
    try:
        if feature_model is None:
            raise UserError("no --feature_ckpt names one")
        with evaluation_packages():
            add_distances(section, fid.ClassifierSpace(feature_model, cfg.feature_ckpt), scored, real)
    except UserError as error:
        section.add_absent("Fréchet distance in a classifier's features", str(error))
    if feature_model is not None and inputs.classifies:
        add_agreement(section, scored, inputs.model, feature_model, cfg.feature_ckpt)

    sets.pop("buffer, filtered", None)
    for name, (images, protocol) in sets.items():
        section.picture(f"samples_{as_file(name)}", f"Samples: {protocol}", image_grid(images[:100], 10))
    sets["test images"] = ImageSet(inputs.subset(inputs.data.test, 1000).images, "test images")
    train = inputs.subset(inputs.data.train)
    add_nearest(section, sets, train.images, (inputs.model if feature_model is None else feature_model).f)


def samples_wanted(cfg: Config) -> int:
    return cfg.n_samples or min(10_000, cfg.max_images or 10_000)


def reference(inputs: EvalInputs) -> ImageSet:
    """The real images of ``--fid_reference``."""
    data, what = inputs.data, "training and validation"
    parts = [data.train, data.valid]
    if inputs.cfg.fid_reference == "train+test":
        parts, what = [*parts, data.test], "training, validation and test"
    where = data.train.images.device  # perhaps the host: only what is chosen goes to the device
    images = torch.cat([part.images.to(where) for part in parts])
    labels = torch.cat([part.labels.to(where) for part in parts])
    chosen = inputs.subset(Split(images, labels)).images
    return ImageSet(chosen, f"{len(chosen)} {what} images")


def sample_sets(inputs: EvalInputs, section: Section) -> dict[str, ImageSet]:
    """The sets of samples by name; those that cannot be are skipped."""
    cfg, n, no_labels = inputs.cfg, samples_wanted(inputs.cfg), "the model was trained without labels"
    sets = fresh_samples(inputs, n)
    if not inputs.classifies:
        section.add_absent("fresh, class-conditional", no_labels)
    if inputs.buffer is None:
        section.add_absent(
            "samples of the replay buffer",
            "the checkpoint has none: only last.pt of --mode energy_train does, so name the run",
        )
        return sets
    order = torch.randperm(len(inputs.buffer), generator=Generator().manual_seed(cfg.seed))  # perhaps laid out by class
    held = to_uint8(inputs.buffer[order[:n].to(inputs.device)])
    sets["buffer"] = ImageSet(held, "replay buffer, unfiltered")
    if not inputs.classifies:
        section.add_absent("buffer, filtered", no_labels)
        return sets
    kept = most_confident(predict(inputs.model, held)).sort().values
    sets["buffer, filtered"] = ImageSet(
        held[kept],
        "replay buffer, the 90 % most confident of each predicted class (the "
        "protocol of SADA-JEM's FID: not comparable with unfiltered numbers)",
    )
    return sets


def fresh_samples(inputs: EvalInputs, n: int) -> dict[str, ImageSet]:
    """n samples of log p(x) and, of a model that classifies, as many of log p(x|y), and what both start from.

    They are those of ``--mode sample`` with the same seed.
    """
    cfg, dtype, device = inputs.cfg, pick_dtype(inputs.cfg.precision, inputs.device), inputs.device
    check_variance(cfg, inputs.data.shape, cfg.n_chains)
    model, chain_init = frozen_sampler_model(inputs.model, dtype), build_chain_init(cfg, inputs.data)
    n_classes, targets = len(inputs.data.class_names), {"fresh": "log p(x)"}
    if inputs.classifies:
        targets["fresh, class-conditional"] = "log p(x|y), as many of each class as can be,"
    print(f"  samples: {len(targets)} times {n} chains of {cfg.fresh_steps} SGLD steps", flush=True)
    sets = {}
    for name, target in targets.items():
        start = StartImages(cfg.start, n, chain_init, range(n_classes), class_cond=name != "fresh")
        chains = run_chains(model, start, cfg.fresh_steps, cfg, inputs.rng())  # both from the same starts
        sets["chain starts"] = ImageSet(
            to_uint8(chains.start).to(device), f"what these chains start from: {NAMES[cfg.start]}"
        )
        sets[name] = ImageSet(
            to_uint8(chains.x).to(device),
            f"chains of {cfg.fresh_steps} SGLD steps on {target} from {NAMES[cfg.start]}, {step_protocol(cfg)}, "
            f"{cfg.n_chains} at once, network in {str(dtype).removeprefix('torch.')}, unfiltered",
        )
    return sets


def add_distances(
    section: Section, space: fid.InceptionSpace | fid.ClassifierSpace, sets: dict[str, ImageSet], real: ImageSet
) -> None:
    """A row for each set: its distances to the real images and, where there are logits, IS."""
    real_features = space.outputs(real.images).features
    distances = fid.FeatureDistances(real_features) if len(real_features) >= FEWEST else None
    few = []
    for name, (images, protocol) in sets.items():
        n = min(len(images), len(real_features))
        if n < FEWEST:
            section.add_absent(f"{space.table}, {name}", f"needs at least {FEWEST} samples and real images, not {n}")
            continue
        features, logits = space.outputs(images)
        subset_size = min(fid.KID_SUBSET_SIZE, n - 1)
        columns = distances(features, subset_size, space.frechet_name)
        if logits is not None:
            columns |= fid.inception_score(logits)
        full_protocol = (
            f"{protocol}; {space.network_name}, against {real.protocol}; KID of {fid.KID_SUBSETS} subsets of "
            f"{subset_size} images, precision and recall with {fid.NEIGHBOURS} nearest neighbours"
        )
        for column, value in columns.items():
            section.add(space.table, value, len(images), full_protocol, at=(name, column))
        if n < features.shape[1]:
            few.append(name)
    if few:
        section.note(
            f"**{space.frechet_name} means little here** ({', '.join(few)}): there are fewer images than the "
            f"{real_features.shape[1]} features, too few to estimate their covariance. Compare it only between equal "
            "numbers of images."
        )


def add_agreement(section: Section, sets: dict[str, ImageSet], model: JEM, other: JEM, other_name: str) -> None:
    """How often another classifier and the model itself predict the same class."""
    for name, (images, protocol) in sets.items():
        agree = predict(other, images).argmax(1) == predict(model, images).argmax(1)
        protocol += f"; share of images for which {other_name} and the model predict the same class"
        section.add_proportion(fid.ClassifierSpace.table, agree, protocol, (name, "same class"))


def add_nearest(section: Section, sets: dict[str, ImageSet], train: Tensor, backbone: nn.Module) -> None:
    """How far images lie from the nearest training image, and ten of each set beside it in a picture."""
    in_pixels, in_features = to_float(train), predict(backbone, train)
    for name, (images, protocol) in sets.items():
        distance, like = fid.nearest(to_float(images[:1000]), in_pixels)
        section.add_mean(
            "L2 distance to the nearest training image",
            distance,
            f"{protocol}, at most 1,000; pixels in [-1, 1], {len(train)} training images",
            (name, "mean"),
        )
        shown = images[:10]
        distance_in_features, like_in_features = fid.nearest(predict(backbone, shown), in_features)
        rows = {
            "image": (shown, [""] * len(shown)),
            "nearest in pixels": (train[like[:10]], [f"{d:.3g}" for d in distance[:10]]),
            "nearest in features": (train[like_in_features], [f"{d:.3g}" for d in distance_in_features]),
        }
        strips = [captioned(image_grid(row, len(row), tile=96), columns=captions) for row, captions in rows.values()]
        section.picture(
            f"nearest_{as_file(name)}",
            f"Images ({name}) and the training image nearest to each, with its L2 distance above it",
            captioned(np.concatenate(strips), rows=list(rows)),
        )


def as_file(name: str) -> str:
    return name.replace(",", "").replace(" ", "_")
