"""Checkpoints of other JEM programs, converted to those of this program by the names and shapes of their weights.

Read are those of JEM, JEM++, M-JEM, SADA-JEM, VERA, a re-implementation of JEM whose parts are called ``EnergyModel``
and ``resnet``, and of DAT, RATIO and other robust classifiers of the same code.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import CHECKPOINT_FORMAT, find_checkpoint
from config import Config
from config.recipes import RECIPES
from models import build_model
from utils import UserError

StateDict = dict[str, Tensor]
Rules = tuple[tuple[str, str], ...]  # what a name begins with, as a regular expression, and what it then begins with

# Where files keep weights, averaged ones first, and what DataParallel, torch.compile and others put before all names.
HOLDERS = ("ema_state_dict", "model_state_dict", "state_dict", "EnergyModel", "model", "logp_net")
WRAPPERS: Rules = ((r"((module|_orig_mod|ema_model|ema|model|logp_net)\.)+", ""),)
TO_OURS: Rules = (
    (r"(main\.0|resnet)\.", "f."),
    (r"(main\.1|linear|fc)\.", "class_output."),
    (r"f\.layer_one\.", "f.conv1."),
    (r"f\.other_layers\.0\.", "f.layer1."),
    (r"f\.other_layers\.1\.", "f.layer2."),
    (r"f\.other_layers\.2\.", "f.layer3."),
    (r"f\.other_layers\.3\.(?=\d)", "f.layer4."),
    (r"f\.other_layers\.[34]\.", "f.bn1."),
    (r"block(\d)\.layer\.(\d+)\.convShortcut\.", r"f.layer\1.\2.shortcut."),
    (r"block(\d)\.layer\.", r"f.layer\1."),
    (r"(?=(conv1|bn1|layer\d)\.)", "f."),
)
TO_ROBUST: Rules = (
    (r"class_output\.", "fc."),
    (r"f\.layer(\d)\.(\d+)\.shortcut\.", r"block\1.layer.\2.convShortcut."),
    (r"f\.layer(\d)\.", r"block\1.layer."),
    (r"f\.", ""),
)
TO_SECOND: Rules = (  # names that JEM++'s network gives to the same weights once more
    (r"f\.conv1\.", "f.layer_one."),
    (r"f\.layer1\.", "f.other_layers.0."),
    (r"f\.layer2\.", "f.other_layers.1."),
    (r"f\.layer3\.", "f.other_layers.2."),
    (r"f\.bn1\.", "f.other_layers.3."),
)
LAYOUTS = {  # a name that tells which it is, and options that its files do not tell
    "robust classifier": (r"block1\.", {"backbone": "robust", "activation": "relu", "recipe": "dat"}),
    "resnet and linear": (r"(main\.0|resnet)\.", {"dropout_rate": 0.25}),
    "VERA": (r"layer1\.", {"dropout_rate": 0.3}),
    "JEM": (r"f\.", {}),
}
SAME_NAMES = ("layer", "instance", "group")  # norms whose weights have the same names
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def open_checkpoint(place: str, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, of this program or another, that a user names; ``given`` as for ``convert``."""
    return find_checkpoint(place, lambda path, raw: convert(path, raw, given))


def convert(path: Path, raw: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint of this program would hold, from the content ``raw`` of another program's file.

    ``given``, options of the command line, say what the file cannot: recipe, data set, norm, separate_energy. What is
    assumed in their place is printed in one line. Raises UserError if it is no network that this program has.
    """
    found = find_weights(raw)
    if found is None:
        raise UserError(
            f"{path} is not a checkpoint of this program, nor one of JEM, JEM++, M-JEM, SADA-JEM, VERA or DAT: looked "
            "for f.conv1.weight and class_output.weight, or conv1.weight (resnet.conv1.weight) with linear.weight or "
            f"fc.weight, directly or in {', '.join(HOLDERS)}"
        )
    layout, weights = found
    options = read_options(path, layout, weights, given)
    channels, n_classes = weights["f.conv1.weight"].shape[1], len(weights["class_output.weight"])
    state: dict[str, Any] = {"step": None, "model": fitted(path, layout, weights, options)}
    if find_weights(raw.get("ema_state_dict")) is not None:
        state["ema"] = state["model"]
    side = given.get("image_size") or {"digits": 8, "mnist": 28, "fashion_mnist": 28}.get(options["dataset"])
    side = side or (32 if options["stages"] == 3 else 64)
    buffer = raw.get("replay_buffer")
    if isinstance(buffer, Tensor) and buffer.ndim == 4 and buffer.shape[1] == channels:
        state["buffer"] = {"images": buffer.float(), "age": torch.zeros(len(buffer), dtype=torch.int64)}
        side = buffer.shape[-1]
    print(f"{path}: {description(layout, weights, options, state, side, given)}.", file=sys.stderr)
    is_cifar10 = n_classes == len(CIFAR10) and options["dataset"] == "cifar10"
    names = CIFAR10 if is_cifar10 else [str(i) for i in range(n_classes)]
    recipe = RECIPES[options["recipe"]].options if options["recipe"] in RECIPES else {}  # Config refuses other names
    return {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(Config(**recipe | options)),
        "data": {"shape": [channels, side, side], "class_names": names, "assumed": True},
        "state": state,
    }


def find_weights(raw: Any) -> tuple[str, StateDict] | None:
    """The name of the layout, and the weights under this program's names."""
    for theirs in state_dicts(raw):
        theirs = renamed(theirs, WRAPPERS)
        weights = renamed(theirs, TO_OURS)
        if {"f.conv1.weight", "f.layer1.0.conv1.weight", "class_output.weight"} <= weights.keys():
            for layout, (sign, _) in LAYOUTS.items():
                if any(re.match(sign, name) for name in theirs):
                    return layout, weights
    return None


def state_dicts(raw: Any) -> Iterator[StateDict]:
    """Every set of tensors in the places where programs keep their weights, innermost first."""
    if isinstance(raw, dict):
        for holder in HOLDERS:
            yield from state_dicts(raw.get(holder))
        tensors = {name: value for name, value in raw.items() if isinstance(value, Tensor) and isinstance(name, str)}
        yield {name: value for name, value in tensors.items() if "logp_net." in name}  # VERA has a generator beside it
        yield tensors


def renamed(weights: StateDict, rules: Rules) -> StateDict:
    """Weights renamed by the first rule that fits a name. Raises UserError if two that differ get the same name."""
    result: StateDict = {}
    for old, value in weights.items():
        new = old
        for pattern, beginning in rules:
            if re.match(pattern, old):
                new = re.sub(pattern, beginning, old, count=1)
                break
        if new in result and not torch.equal(result[new], value):
            raise UserError(f"the checkpoint has two different values of {new}, the second as {old}")
        result[new] = value
    return result


def read_options(path: Path, layout: str, weights: StateDict, given: dict[str, Any]) -> dict[str, Any]:
    """The network's options, read off names and shapes; recipe and data set, if not given, as they mostly are."""
    stem, head, conv = (weights.get(f"{name}.weight") for name in ("f.conv1", "class_output", "f.layer1.0.conv2"))
    if stem.ndim != 4 or head.ndim != 2 or conv is None or conv.ndim != 4 or conv.shape[0] % 16:
        raise UserError(f"{path} has {layout} names, but not the shapes of a Wide-ResNet's convolutions")
    separate = bool(given.get("separate_energy"))
    if separate and "energy_output.weight" not in weights:
        raise UserError(f"{path} has no energy_output: leave --separate_energy out")
    places = re.findall(r"f\.layer(\d+)\.(\d+)\.", " ".join(weights))
    stages, last_block = max(int(stage) for stage, _ in places), max(int(block) for _, block in places)
    norm = read_norm(weights, given)
    dataset = {10: "cifar10", 100: "cifar100"}.get(len(head), "folder") if stages == 3 else "folder"
    options = {
        "depth": 10 + 6 * last_block,
        "width": conv.shape[0] // 16,
        "stages": stages,
        "norm": norm,
        "separate_energy": separate,
        "recipe": "jem++" if norm == "batch" else "jem",
        "dataset": "mnist" if stem.shape[1] == 1 else dataset,
    }
    return options | LAYOUTS[layout][1] | {name: given[name] for name in ("recipe", "dataset") if name in given}


def read_norm(weights: StateDict, given: dict[str, Any]) -> str:
    if "f.bn1.running_mean" in weights:
        return "batch"
    if "f.bn1.loc" in weights:
        return "act"
    if "f.bn1.weight" not in weights:
        return "none"
    return given["norm"] if given.get("norm") in SAME_NAMES else SAME_NAMES[0]


def fitted(path: Path, layout: str, weights: StateDict, options: dict[str, Any]) -> StateDict:
    """Weights that the network of these options loads. Raises UserError if they are not those of such a network."""
    network = {name: value for name, value in options.items() if name not in ("recipe", "dataset")}
    channels, n_classes = weights["f.conv1.weight"].shape[1], len(weights["class_output.weight"])
    with torch.device("meta"):
        expected = build_model(channels, n_classes, **network).state_dict()
    unused = ["f.linear.", "n_averaged", "replay_buffer"]
    unused += [] if options["separate_energy"] else ["energy_output."]
    unused += ["f.layer1.0.bn1."] if options["norm"] == "none" else []  # VERA has one in its first block
    weights = {name: value for name, value in weights.items() if not name.startswith(tuple(unused))}
    weights = {name: value for name, value in weights.items() if not name.endswith(".initialized")}  # of act norm
    counts = [name for name in expected if name.endswith("num_batches_tracked")]  # the first PyTorch versions had none
    weights = dict.fromkeys(counts, torch.zeros((), dtype=torch.int64)) | weights
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        size = "depth {depth}, width {width}, {stages} stages, norm {norm}".format(**options)
        but = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which is no part of one"
        raise UserError(f"{path} looks like a Wide-ResNet ({layout} layout, {size}), but {but}")
    for name, value in expected.items():
        if ".bn" in name and weights[name].numel() == value.numel():  # act norm's have other shapes elsewhere
            weights[name] = weights[name].reshape(value.shape)
        if weights[name].shape != value.shape:
            raise UserError(f"{path} has {name} of the shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
    return {name: weights[name].to(value.dtype).clone() for name, value in expected.items()}


def description(
    layout: str, weights: StateDict, options: dict[str, Any], state: dict[str, Any], side: int, given: dict[str, Any]
) -> str:
    """What the line says that is printed: what was read, and what is assumed."""
    told = [f"{layout} layout, --depth {options['depth']} --width {options['width']} --norm {options['norm']}"]
    told += [f"--recipe {options['recipe']}{'' if 'recipe' in given else ' (assumed; give --recipe for another)'}"]
    told += [f"--dataset {options['dataset']}{'' if 'dataset' in given else ' (assumed)'}"]
    told += [f"images of {side}x{side}{'' if 'buffer' in state or 'image_size' in given else ' (assumed)'}"]
    told += ["its averaged weights"] if "ema" in state else []
    if options["norm"] in SAME_NAMES and given.get("norm") not in SAME_NAMES:
        told += ["norm assumed, since layer, instance and group have the same names: give --norm for another"]
    if "energy_output.weight" in weights and not options["separate_energy"]:
        told += ["log p(x) from the logits; --separate_energy takes it from its energy_output"]
    return "; ".join([*told, f"chains see {'batch statistics' if options['norm'] == 'batch' else 'single images'}"])


def authors_weights(weights: StateDict, program: str) -> StateDict:
    """Weights under the names of a program of ``--export_for``, with all that its network has besides; see the docs."""
    weights = {name: value.contiguous() for name, value in weights.items()}
    if program == "robust":
        return renamed(weights, TO_ROBUST)
    head = weights["class_output.weight"]
    heads = {"energy_output": 1, "f.linear": 10} if program == "jem" else {"energy_output": 1}
    for name, rows in heads.items():  # they want them and do not use them; f.linear has 10 rows for any classes
        unused = {f"{name}.weight": head.new_zeros(rows, head.shape[1]), f"{name}.bias": head.new_zeros(rows)}
        weights = unused | weights
    act_norms = [name.removesuffix("loc") for name in weights if name.endswith(".loc")]
    started = torch.tensor(1, dtype=torch.uint8)  # without, these layers start anew from the first batch
    weights |= {f"{layer}initialized": started for layer in act_norms}
    if program == "jem++":
        weights |= renamed({name: value for name, value in weights.items() if name.startswith("f.")}, TO_SECOND)
    return weights
