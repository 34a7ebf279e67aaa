"""What belongs to a checkpoint: its network, and the images that the network can classify."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import data
import distributed
import image_folder
from checkpoints.other_programs import open_checkpoint
from config import Config
from config.cli import as_typed
from models import JEM, build_model
from utils import UserError

OF_NETWORK = tuple(f.name for f in fields(Config) if f.metadata["of_network"])  # that make other weights
OF_TRAINING = ("data", "model", "optimisation", "SGLD", "objective")  # groups of options that a checkpoint brings along


class Trained(NamedTuple):
    cfg: Config  # with which the checkpoint is used
    path: Path
    content: dict[str, Any]


def open_trained(given: dict[str, Any]) -> Trained:
    """The checkpoint of ``--load_ckpt``. Where options were not given, its own data, network and chains stand.

    So does the number of chains of one process as the batch size: with batch normalisation an image depends on its
    batch. Raises UserError if it cannot be used with the options that were given.
    """
    if not given.get("load_ckpt"):
        raise UserError(f"--mode {given['mode']} needs --load_ckpt, a checkpoint or a run directory")
    path, content = open_checkpoint(given["load_ckpt"], given)
    trained = Config.from_dict(content["config"], str(path))
    if given.get("recipe", trained.recipe) != trained.recipe:
        raise UserError(f"{path} was trained with --recipe {trained.recipe}: give single options for other chains")
    if trained.separate_energy and not trained.draws_samples:
        print(f"Warning: {path} has a head for log p(x) that was not trained: that log p(x) is noise", file=sys.stderr)
    own = {f.name: getattr(trained, f.name) for f in fields(Config) if f.metadata["group"] in OF_TRAINING}
    n_chains = trained.n_chains // (1 if trained.sync_batch_norm else content.get("processes", 1))
    own |= {"recipe": trained.recipe, "precision": trained.precision}
    own |= {"batch_size": n_chains, "p_x_batch_size": None, "class_cond": False}
    if "start_dir" in given and "folder" not in trained.start_shares:
        own["start"] = "folder"
    if given.get("dataset", trained.dataset) != trained.dataset:  # these belong to the checkpoint's images
        del own["image_size"], own["n_valid"]
        if "folder" in (given["dataset"], trained.dataset):
            del own["data_dir"]
    if {"dataset", "data_dir"} & given.keys():  # chains start from Gaussians of these images, not of the file
        content.pop("starts", None)
    unread = {f.name for f in fields(Config) if given["mode"] not in f.metadata["modes"]}
    return Trained(Config(**own | {k: v for k, v in given.items() if k not in unread}), path, content)


def build_for(cfg: Config, shape: tuple[int, int, int], n_classes: int) -> JEM:
    """The network of these options, freshly initialised. Raises UserError if there is no such network."""
    options = {f.name: getattr(cfg, f.name) for f in fields(Config) if f.metadata["group"] == "model"}
    return build_model(shape, n_classes, **options)


def load_model(trained: Trained, device: torch.device) -> JEM:
    """The checkpoint's network to evaluate, not to train: its averaged weights (``--ema``) where it has them."""
    trained_on = trained.content["data"]
    model = build_for(trained.cfg, tuple(trained_on["shape"]), len(trained_on["class_names"]))
    load_weights(model, *trained)
    return model.to(device).eval().requires_grad_(False)


def load_weights(model: JEM, cfg: Config, path: Path, content: dict[str, Any], new_head: bool = False) -> None:
    """Give ``model``, built with ``cfg``, a checkpoint's weights: the averaged ones where it has them.

    With ``new_head`` its last layer, which tells classes apart, stays as it is. Raises UserError if the checkpoint is
    of another network. Its options are compared, too, because weights of another network can have the same shapes.
    """
    own = {name: content["config"].get(name, getattr(Config, name)) for name in OF_NETWORK}  # older ones lack some
    channels, weights = content["data"]["shape"][0], content["state"].get("ema", content["state"]["model"])
    if options := [as_typed(name, value) for name, value in own.items() if value != getattr(cfg, name)]:
        raise UserError(f"{path} holds another network: give {' '.join(options)}")
    if model.in_channels != channels:
        found = f"{path} is for images of {channels} channels, and these have {model.in_channels}"
        raise UserError(f"{found}: choose another --dataset or --data_dir")
    if new_head:
        weights = weights | {f"class_output.{name}": v for name, v in model.class_output.state_dict().items()}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} holds other weights than its options say: {reason}") from None
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite (NaN): use an earlier checkpoint")


def same_classes(trained_on: dict[str, Any], images: data.ImageData) -> bool:
    """Whether images have the classes that a checkpoint was trained on; another program's file tells only how many."""
    theirs, ours = list(trained_on["class_names"]), list(images.class_names)
    return theirs == ours or (len(theirs) == len(ours) and trained_on.get("assumed", False))


def fits(trained_on: dict[str, Any], images: data.ImageData) -> bool:
    """Whether images have the shape and as many classes as those that a checkpoint was trained on."""
    n_known = 1 if trained_on.get("assumed") else 3  # another program's file does not tell the size
    same_shape = list(images.shape)[:n_known] == list(trained_on["shape"])[:n_known]
    return same_shape and len(images.class_names) == len(trained_on["class_names"])


def load_data(trained: Trained, device: torch.device) -> data.ImageData:
    """The data set of ``trained.cfg``, which the checkpoint's network must be able to classify.

    Images that are only to be measured may be others than those of the training; see ``data.load``.
    """
    cfg, path, content = trained
    where = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device
    trained_on = content["data"] if cfg.mode == "test" else None
    images = distributed.rank0_first(lambda: data.load(*where, trained_on))
    own = trained_on is not None and cfg.data_dir == content["config"].get("data_dir") and "images" in trained_on
    if own and cfg.dataset == "folder" and len(images.test) > trained_on["images"][2]:
        raise UserError(f"{cfg.data_dir} has changed since the training, whose images are now unknown: undo its change")
    (channels, height, width), n_classes = content["data"]["shape"], len(content["data"]["class_names"])
    if {channels, images.shape[0]} == {1, 3}:
        print(f"data: made {'grey' if channels == 1 else 'RGB'}, as the images that {path} was trained on")
        parts = {name: getattr(images, name) for name in ("train", "valid", "test")}
        parts = {name: replace(p, images=image_folder.grey_or_rgb(p.images, channels)) for name, p in parts.items()}
        images = replace(images, **parts)
    if not fits(content["data"], images):
        resized = cfg.dataset == "folder" and n_classes == len(images.class_names)
        advice = f"give --image_size {height}" if resized else "choose a set that has as many classes, of that size"
        theirs = f"images of {channels}x{height}x{width} in {n_classes} classes"
        ours = f"are of {'x'.join(map(str, images.shape))} in {len(images.class_names)}"
        raise UserError(f"{path} was trained on {theirs}, and those of {cfg.dataset} {ours}: {advice}")
    if not same_classes(content["data"], images):
        found = f"the classes of {cfg.dataset} are not those that {path} was trained on"
        print(f"Warning: {found}: what depends on labels means nothing.", file=sys.stderr)
    return images


def load_feature_model(place: str, dataset: str, images: data.ImageData, device: torch.device) -> JEM | None:
    """The classifier that ``--feature_ckpt`` names, if any; it must know the same classes of images of this shape."""
    if not place:
        return None
    path, content = distributed.broadcast_from_rank0(lambda: open_checkpoint(place, {"dataset": dataset}))
    if not (fits(content["data"], images) and same_classes(content["data"], images)):
        raise UserError(f"--feature_ckpt {path} was trained on other images or classes: name one of the same data set")
    cfg = Config.from_dict(content["config"], str(path))
    if not cfg.classifies:
        raise UserError(f"--feature_ckpt {path} was trained without labels: name a classifier")
    return load_model(Trained(cfg, path, content), device)
