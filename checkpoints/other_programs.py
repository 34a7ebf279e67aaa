"""Checkpoints of other JEM programs: their names and shapes read as this program's checkpoints.

Read are those of JEM, JEM++, M-JEM, SADA-JEM, VERA, a re-implementation of JEM whose parts are called ``EnergyModel``
and ``resnet``, and of DAT, RATIO and other robust classifiers of the same code.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from checkpoints.files import CHECKPOINT_FORMAT, find_checkpoint
from config import Config
from config.recipes import RECIPES
from models import build_model
from utils import UserError

StateDict = dict[str, Tensor]

# Where a file keeps its weights, averaged ones first, and what may stand before all names.
HOLDERS = ("ema_state_dict", "model_state_dict", "state_dict", "EnergyModel", "model", "logp_net")
PREFIXES = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.", "logp_net.")
# Names of one program each, and this program's.
SECOND_NAMES = (
    (r"main\.0\.", "resnet."),
    (r"main\.1\.", "linear."),
    (r"f\.layer_one\.", "f.conv1."),
    (r"f\.other_layers\.([0-2])\.", lambda match: f"f.layer{int(match[1]) + 1}."),
    (r"f\.other_layers\.3\.(?=\d)", "f.layer4."),
    (r"f\.other_layers\.[34]\.", "f.bn1."),
)
LAYOUTS = {
    "JEM": (
        {"f.conv1.weight", "f.layer1.0.conv1.weight", "class_output.weight"},
        ((r"f\.linear\..*", None),),
    ),
    "resnet and linear": (
        {"resnet.conv1.weight", "resnet.layer1.0.conv1.weight", "linear.weight"},
        ((r"resnet\.linear\..*", None), (r"linear\.", "class_output."), (r"resnet\.", "f.")),
    ),
    "VERA": (
        {"conv1.weight", "layer1.0.conv1.weight", "linear.weight"},
        ((r"linear\.", "class_output."), (r"(?=(conv1|bn1|layer\d)\.)", "f.")),
    ),
    "robust classifier": (
        {"conv1.weight", "block1.layer.0.conv1.weight", "fc.weight"},
        (
            (r"fc\.", "class_output."),
            (r"block(\d)\.layer\.(\d+)\.convShortcut\.", r"f.layer\1.\2.shortcut."),
            (r"block(\d)\.layer\.", r"f.layer\1."),
            (r"(?=(conv1|bn1)\.)", "f."),
        ),
    ),
}
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


class Network(NamedTuple):
    """StateDict under this program's names, and what builds the network that they are of."""

    weights: StateDict
    channels: int
    n_classes: int
    options: dict[str, Any]  # of Config
    ambiguous: bool  # whether the file does not tell which norm it is


def open_checkpoint(place: str, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, of this program or another, that a user names; ``given`` as for ``convert``."""
    return find_checkpoint(place, lambda path, raw: convert(path, raw, given))


def convert(path: Path, raw: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Convert the file ``raw`` of another program, read from ``path``, to the content of a checkpoint of this program.

    ``given``, options of the command line, say what the file cannot: recipe, data set, norm, separate_energy. What is
    assumed in their place is printed in one line.

    Raises UserError if it is no network that this program has.
    """
    found = find_weights(raw)
    if found is None:
        raise UserError(
            f"{path} is not a checkpoint of this program, nor one of JEM, JEM++, M-JEM, SADA-JEM, VERA or DAT: looked "
            "for f.conv1.weight and class_output.weight, resnet.conv1.weight and linear.weight, conv1.weight with "
            "linear.weight or fc.weight, directly or in " + ", ".join(HOLDERS)
        )
    layout, weights = found
    network = recognise(path, layout, weights, given)
    buffer = raw.get("replay_buffer")
    if not (isinstance(buffer, Tensor) and buffer.ndim == 4 and buffer.shape[1] == network.channels):
        buffer = None
    options, shape = assumptions(layout, network, buffer, given)
    size = f"{shape[2]}x{shape[1]}"
    batch = network.options["norm"] == "batch"
    told = [
        f"{layout} layout, --depth {options['depth']} --width {options['width']} --norm {options['norm']}",
        f"--recipe {options['recipe']}" + ("" if "recipe" in given else " (assumed; give --recipe for another)"),
        f"--dataset {options['dataset']}" + ("" if "dataset" in given else " (assumed)"),
        f"images of {size}" + ("" if buffer is not None or "image_size" in given else " (assumed)"),
    ]
    averaged = find_weights(raw.get("ema_state_dict")) is not None  # the first of HOLDERS
    if averaged:
        told.append("its averaged weights")
    if network.ambiguous:
        told.append("norm assumed, since layer, instance and group have the same names: give --norm for another")
    if "energy_output.weight" in weights and not options["separate_energy"]:
        told.append("log p(x) from the logits; --separate_energy takes it from its energy_output")
    print(f"{path}: {'; '.join(told)}; chains see {'batch statistics' if batch else 'single images'}.", file=sys.stderr)
    state: dict[str, Any] = {"step": None, "model": network.weights}
    if averaged:
        state["ema"] = network.weights
    if buffer is not None:
        state["buffer"] = {"images": buffer.float(), "age": torch.zeros(len(buffer), dtype=torch.int64)}
    known = network.n_classes == len(CIFAR10) and options["dataset"] == "cifar10"
    names = CIFAR10 if known else [str(i) for i in range(network.n_classes)]
    return {
        "format": CHECKPOINT_FORMAT,
        "config": options,
        "data": {"shape": shape, "class_names": names, "assumed": True},
        "state": state,
    }


def authors_weights(weights: StateDict, backbone: str) -> StateDict:
    """StateDict under the names of the JEM authors' programs, or with the backbone robust of robust classifiers.

    The heads that the JEM authors' programs insist on and do not use, ``f.linear`` and ``energy_output``, are zeros.
    """
    weights = {name: value.contiguous() for name, value in weights.items()}
    if backbone == "robust":
        rules = (
            (r"class_output\.", "fc."),
            (r"f\.layer(\d)\.(\d+)\.shortcut\.", r"block\1.layer.\2.convShortcut."),
            (r"f\.layer(\d)\.", r"block\1.layer."),
            (r"f\.", ""),
        )
        return renamed(weights, rules)
    head = weights["class_output.weight"]
    unused = {
        "f.linear.weight": torch.zeros_like(head),
        "f.linear.bias": head.new_zeros(len(head)),
        "energy_output.weight": torch.zeros_like(head[:1]),
        "energy_output.bias": head.new_zeros(1),
    }
    return unused | weights


def find_weights(raw: Any) -> tuple[str, StateDict] | None:
    """The layout's name, and the weights under this program's names."""
    for weights in state_dicts(raw):
        weights = renamed(without_prefixes(weights), SECOND_NAMES)
        for layout, (needed, names) in LAYOUTS.items():
            if needed <= weights.keys():
                return layout, renamed(weights, names)
    return None


def state_dicts(raw: Any) -> Iterator[StateDict]:
    """Every set of tensors in the places where programs keep their weights, innermost first."""
    if not isinstance(raw, dict):
        return
    for name in HOLDERS:
        yield from state_dicts(raw.get(name))
    tensors = {name: value for name, value in raw.items() if isinstance(value, Tensor) and isinstance(name, str)}
    if tensors:
        yield tensors


def without_prefixes(weights: StateDict) -> StateDict:
    """StateDict without what wrappers (DataParallel, averages, torch.compile) put before all their names."""
    weights = {name: value for name, value in weights.items() if name not in ("n_averaged", "replay_buffer")}
    for prefix in PREFIXES * 2:
        inside = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        if inside and (len(inside) == len(weights) or prefix == "logp_net."):  # VERA has a generator beside it
            weights = inside
    return weights


def renamed(weights: StateDict, rules: tuple) -> StateDict:
    """StateDict under new names, the first rule that matches; the rule None leaves them out.

    Raises UserError where two names of one weight hold different values.
    """
    result: StateDict = {}
    for name, value in weights.items():
        new = name
        for pattern, replacement in rules:
            if re.match(pattern, name):
                new = None if replacement is None else re.sub("^" + pattern, replacement, name, count=1)
                break
        if new is None:
            continue
        if new in result and not torch.equal(result[new], value):
            raise UserError(f"the checkpoint has two different values of {new}, the second as {name}")
        result[new] = value
    return result


def recognise(path: Path, layout: str, weights: StateDict, given: dict[str, Any]) -> Network:
    """Read depth, width, norm and heads off names and shapes, and check that every weight fits."""
    robust = layout == "robust classifier"
    if not robust and "f.layer1.1.bn1.weight" not in weights:
        # an unused one of the first block alone (VERA); where a layer has one block only, that of the stage after
        if not any(re.match(r"f\.layer[2-9]\.0\.bn1\.", name) for name in weights):
            weights = {name: v for name, v in weights.items() if not name.startswith("f.layer1.0.bn1.")}
    stem, head = weights["f.conv1.weight"], weights["class_output.weight"]
    conv = weights.get("f.layer1.0.conv2.weight")
    if stem.ndim != 4 or head.ndim != 2 or conv is None or conv.ndim != 4 or conv.shape[0] % 16:
        raise UserError(f"{path} has {layout} names, but not the shapes of a Wide-ResNet's convolutions")
    places = [place for name in weights if (place := re.match(r"f\.layer(\d+)\.(\d+)\.", name))]
    norm, ambiguous = norm_of(weights, given)
    separate = bool(given.get("separate_energy"))
    if separate and "energy_output.weight" not in weights:
        raise UserError(f"{path} has no energy_output: leave --separate_energy out")
    if not separate:
        weights = {name: value for name, value in weights.items() if not name.startswith("energy_output.")}
    options = {
        "depth": 10 + 6 * max(int(place[2]) for place in places),
        "width": conv.shape[0] // 16,
        "stages": max(int(place[1]) for place in places),
        "backbone": "robust" if robust else "jem",
        "norm": norm,
        "activation": "relu" if robust else "leaky_relu",
        "separate_energy": separate,
    }
    with torch.device("meta"):
        expected = build_model(stem.shape[1], head.shape[0], **options).state_dict()
    size = f"depth {options['depth']}, width {options['width']}, {options['stages']} stages, norm {norm}"
    weights = fitted(weights, expected, path, f"a Wide-ResNet ({layout} layout, {size})")
    return Network(weights, stem.shape[1], head.shape[0], options, ambiguous)


def fitted(weights: StateDict, expected: StateDict, path: Path, what: str) -> StateDict:
    """The weights in the types of a network's own, ``expected``. Raises UserError if they do not fit into it."""
    weights = dict(weights)
    for name in expected.keys() - weights.keys():
        if name.endswith("num_batches_tracked"):  # files of the first PyTorch versions lack it
            weights[name] = torch.zeros((), dtype=torch.int64)
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        but = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is no part of one"
        raise UserError(f"{path} looks like {what}, but {but}")
    for name, value in expected.items():
        if ".bn" in name and weights[name].numel() == value.numel():  # act norm's have other shapes elsewhere
            weights[name] = weights[name].reshape(value.shape)
        if weights[name].shape != value.shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(value.shape)}"
            raise UserError(f"{path} has {name} of the shape {shapes}")
    return {name: weights[name].to(value.dtype).clone() for name, value in expected.items()}


def norm_of(weights: StateDict, given: dict[str, Any]) -> tuple[str, bool]:
    """Which norm the weights have, and whether that is a guess between norms with the same names."""
    if "f.bn1.running_mean" in weights:
        return "batch", False
    if "f.bn1.loc" in weights:
        return "act", False
    if "f.bn1.weight" not in weights:
        return "none", False
    named = given.get("norm")
    return (named, False) if named in ("layer", "instance", "group") else ("layer", True)


def assumptions(layout: str, network: Network, buffer: Tensor | None, given: dict[str, Any]) -> tuple[dict, list[int]]:
    """All options of the run that would have made the file, and the shape of its images."""
    recipe = given.get("recipe")
    if recipe is None:
        recipe = "dat" if layout == "robust classifier" else "jem++" if network.options["norm"] == "batch" else "jem"
    dropout = {"VERA": 0.3, "resnet and linear": 0.25}.get(layout, 0.0)
    dataset = given.get("dataset")
    if dataset is None:
        cifar = {10: "cifar10", 100: "cifar100"}.get(network.n_classes, "folder")
        dataset = "mnist" if network.channels == 1 else cifar if network.options["stages"] == 3 else "folder"
    own = RECIPES[recipe].options if recipe in RECIPES else {}
    options = asdict(Config(**own | network.options | {"recipe": recipe, "dropout_rate": dropout, "dataset": dataset}))
    side = given.get("image_size") or {"digits": 8, "mnist": 28, "fashion_mnist": 28}.get(dataset)
    if buffer is not None:
        side = buffer.shape[-1]
    return options, [network.channels, *[side or (32 if network.options["stages"] == 3 else 64)] * 2]
