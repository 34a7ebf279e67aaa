"""How good samples, uint8 (N, C, H, W), are: distances to real images in features, and nearest training images."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from config.checks import FEWEST
from data import to_float
from evaluation import fid
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from logger.images import captioned, image_grid, to_uint8
from models.predict import predict
from sgld import step_protocol
from utils import UserError, pick_dtype

FILTERED = {"buffer, filtered": (0.9, "SADA-JEM's FID"), "buffer, most confident": (0.1, "SADA-JEM's IS")}  # share, use
NEAREST_AMONG = 50_000  # training images at most, which are held as float32


class ImageSet(NamedTuple):
    images: Tensor
    protocol: str  # what they are


def most_confident(logits: Tensor, share: float) -> Tensor:
    """Indices of the ``share`` most confident images of each predicted class; logits: (N, K)."""
    confidence, classes = logits.double().softmax(1).max(1)  # in float32 many are exactly 1
    order = confidence.argsort(descending=True, stable=True)
    members = [order[classes[order] == k] for k in classes.unique()]
    return torch.cat([ordered[: max(1, round(share * len(ordered)))] for ordered in members])


def measure(inputs: EvalInputs, section: Section) -> None:
    """Scores and pictures of the model's samples, fresh ones and those of the replay buffer, beside real images."""
    cfg, feature_model, data = inputs.cfg, inputs.feature_model, inputs.data
    if not len(data.train):
        raise UserError("these data are only test images: there are no training images to compare with")
    n = cfg.n_samples or min(10_000, cfg.max_images or 10_000)
    sets, real = sample_sets(inputs, section, n), reference(inputs)
    protocol = "test images"
    if cfg.fid_reference == "train+test":
        protocol += f", {'some of which may be' if cfg.max_images else 'which are'} part of the reference"
    scored = {"test images": ImageSet(inputs.subset(data.test, n).images, protocol)} | sets
    spaces = {
        "FID, IS, and KID, precision, recall in Inception's features": lambda: fid.InceptionSpace(inputs.device),
        "Fréchet distance in a classifier's features": lambda: fid.ClassifierSpace(feature_model, cfg.feature_ckpt),
    }
    for what, make_space in spaces.items():
        section.attempt(what, lambda make_space=make_space: add_distances(section, make_space(), scored, real))
    if feature_model is not None and inputs.classifies:
        for name, (images, protocol) in scored.items():
            agree = predict(feature_model, images).argmax(1) == predict(inputs.model, images).argmax(1)
            protocol += f"; share of images for which {cfg.feature_ckpt} and the model predict the same class"
            section.add_proportion(fid.ClassifierSpace.table, agree, protocol, (name, "same class"))

    sets = {name: images for name, images in sets.items() if name not in FILTERED}
    for name, (images, protocol) in sets.items():
        section.picture(f"samples_{name}", f"Samples: {protocol}", image_grid(images[:100], 10))
    sets["test images"] = ImageSet(inputs.subset(data.test, min(cfg.max_images or 1000, 1000)).images, "test images")
    searched = inputs.subset(data.train, min(cfg.max_images or NEAREST_AMONG, NEAREST_AMONG)).images
    backbone = (feature_model or inputs.model).f
    section.attempt("nearest training images", lambda: add_nearest(section, sets, searched, backbone))


def reference(inputs: EvalInputs) -> ImageSet:
    """The real images of ``--fid_reference``."""
    data, parts, what = inputs.data, [inputs.data.train, inputs.data.valid], "training and validation"
    if inputs.cfg.fid_reference == "train+test":
        parts, what = [*parts, data.test], "training, validation and test"
    images = inputs.subset(torch.cat([part.images.to(data.train.images.device) for part in parts]))  # perhaps the host
    return ImageSet(images, f"{len(images)} {what} images")


def sample_sets(inputs: EvalInputs, section: Section, n: int) -> dict[str, ImageSet]:
    """The sets of samples by name, of n images where there are so many; those that cannot be are skipped."""
    sets = fresh_samples(inputs, n)
    if not inputs.classifies:
        for name in ("fresh, class-conditional", *FILTERED):
            section.add_absent(name, "the model was trained without labels")
    if inputs.buffer is None:
        reason = "the checkpoint has none, or no finite one: last.pt of --mode energy_train has one, so name the run"
        section.add_absent("samples of the replay buffer", reason)
        return sets
    rng = Generator().manual_seed(inputs.cfg.seed)
    order = torch.randperm(len(inputs.buffer), generator=rng)  # the buffer may be laid out by class
    held = to_uint8(inputs.buffer[order[:n].to(inputs.device)])
    sets["buffer"] = ImageSet(held, "replay buffer, unfiltered")
    for name, (share, used_for) in FILTERED.items() if inputs.classifies else ():
        kept = most_confident(predict(inputs.model, held), share).sort().values
        protocol = f"replay buffer, the {share:.0%} most confident of each predicted class"
        sets[name] = ImageSet(held[kept], f"{protocol} (the protocol of {used_for}; not comparable with unfiltered)")
    return sets


def fresh_samples(inputs: EvalInputs, n: int) -> dict[str, ImageSet]:
    """n samples of log p(x) and, of a model that classifies, as many of log p(x|y), and what both start from.

    They are those of ``--mode sample`` with the same seed.
    """
    cfg, dtype = inputs.cfg, pick_dtype(inputs.cfg.precision, inputs.device)
    targets = {"fresh": (None, "log p(x)")}
    if inputs.classifies:
        classes = range(len(inputs.data.class_names))
        targets["fresh, class-conditional"] = classes, "log p(x|y), as many of each class as can be,"
    print(f"  samples: {len(targets)} times {n} chains of {cfg.fresh_steps} SGLD steps", flush=True)
    norm = f", {cfg.norm_statistics} statistics" if cfg.norm == "batch" else ""
    network, sets = f"network in {str(dtype).removeprefix('torch.')}{norm}", {}
    for name, (y, target) in targets.items():
        chains = inputs.chains(n, y)  # both from the same starts
        starts, ends = (to_uint8(x).to(inputs.device) for x in (chains.start, chains.x))
        protocol = f"chains of {cfg.fresh_steps} SGLD steps on {target} from {cfg.start_name}, {step_protocol(cfg)}"
        sets["chain starts"] = ImageSet(starts, f"what these chains start from: {cfg.start_name}")
        sets[name] = ImageSet(ends, f"{protocol}, {cfg.n_chains} at once, {network}, unfiltered")
    return sets


def add_distances(
    section: Section, space: fid.InceptionSpace | fid.ClassifierSpace, sets: dict[str, ImageSet], real: ImageSet
) -> None:
    """A row for each set: its distances to the real images and, where there are logits, IS."""
    real_features, few = space.outputs(real.images)["features"], []
    statistics = fid.feature_statistics(real_features) if len(real_features) >= FEWEST else {}
    for name, (images, protocol) in sets.items():
        n = min(len(images), len(real_features))
        if n < FEWEST:
            section.add_absent(f"{space.table}, {name}", f"needs at least {FEWEST} samples and real images, not {n}")
            continue
        outputs = space.outputs(images)
        subset_size = min(fid.KID_SUBSET_SIZE, n - 1)
        columns = {space.frechet_name: fid.frechet_distance(fid.feature_statistics(outputs["features"]), statistics)}
        columns |= fid.kid_precision_recall(outputs["features"], real_features, subset_size)
        if "logits" in outputs:
            columns |= fid.inception_score(outputs["logits"])
        protocol += f"; {space.network_name}, against {real.protocol}; KID of {fid.KID_SUBSETS} subsets of "
        protocol += f"{subset_size} images, precision and recall with {fid.NEIGHBOURS} nearest neighbours"
        for column, value in columns.items():
            section.add(space.table, value, len(images), protocol, at=(name, column))
        if n < real_features.shape[1]:
            few.append(name)
    if few:
        advice = f"fewer images than the {real_features.shape[1]} features. Compare these only between sets of as many"
        section.note(f"**{space.frechet_name} means little here** ({', '.join(few)}): there are {advice}.")


def add_nearest(section: Section, sets: dict[str, ImageSet], train: Tensor, backbone: nn.Module) -> None:
    """How far images lie from the nearest training image, and ten of each set beside it in a picture."""
    in_pixels, in_features = to_float(train), predict(backbone, train)
    for name, (images, protocol) in sets.items():
        distance, like = fid.nearest(to_float(images[:1000]), in_pixels)
        protocol += f", at most 1,000; pixels in [-1, 1], {len(train)} training images"
        section.add_mean("L2 distance to the nearest training image", distance, protocol, (name, "mean"))
        shown = images[:10]
        feature_distance, feature_like = fid.nearest(predict(backbone, shown), in_features)
        strips = [captioned(image_grid(shown, len(shown), tile=96), columns=[""] * len(shown))]
        for indices, distances in ((like[:10], distance[:10]), (feature_like, feature_distance)):
            grid = image_grid(train[indices], len(shown), tile=96)
            strips.append(captioned(grid, columns=[f"{d:.3g}" for d in distances]))
        picture = captioned(np.concatenate(strips), rows=["image", "nearest in pixels", "nearest in features"])
        caption = f"Images ({name}) and the training image nearest to each, with its L2 distance above it"
        section.picture(f"nearest_{name}", caption, picture)
