"""Checkpoints of other programs (docs/checkpoints.md lists them), converted by their weights' names and shapes."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.files import CHECKPOINT_FORMAT, find_checkpoint, is_ours
from config import Config
from data import to_float
from models import build_model
from utils import UserError

StateDict = dict[str, Tensor]
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
Rules = tuple[tuple[str, str], ...]  # what a name begins with, as a regular expression, and what it then begins with

# Where files keep weights, averaged ones first, and what DataParallel, torch.compile and others put before all names.
HOLDERS = ("ema_state_dict", "model_state_dict", "state_dict", "EnergyModel", "model", "logp_net")
WRAPPERS: Rules = ((r"((module|_orig_mod|ema_model|ema|model|logp_net)\.)+", ""),)
TO_OURS: Rules = (
    (r"(main\.0|resnet)\.", "f."),
    (r"(main\.1|linear|fc)\.", "class_output."),
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
    *((rf"f\.layer{i + 1}\.", f"f.other_layers.{i}.") for i in range(3)),
    (r"f\.bn1\.", "f.other_layers.3."),
)
ROBUST = {"backbone": "robust", "activation": "relu", "recipe": "dat", "norm_statistics": "running"}
LAYOUTS = (  # how names begin in the files of a program, and options that these do not tell
    (r"block1\.", ROBUST),  # robust classifiers
    (r"(main\.0|resnet)\.", {"dropout_rate": 0.25}),  # the re-implementation
    (r"bn1\.running_mean", {"dropout_rate": 0.3, "activation": "relu"}),  # plain classifiers
    (r"layer1\.", {"dropout_rate": 0.3}),  # VERA
    (r"f\.", {}),  # JEM
)
UNUSED = ("f.linear.", "f.layer_one.", "f.other_layers.", "n_averaged", "replay_buffer")  # heads, second names, data
SAME_NAMES = ("layer", "instance", "group")  # norms whose weights have the same names


def open_checkpoint(place: str, given: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The checkpoint, of this program or another, that a user names; ``given`` as for ``convert``."""
    path, content = find_checkpoint(place)
    return path, content if is_ours(content) else convert(path, content, given)


def convert(path: Path, raw: Any, given: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint as of this program, from the content ``raw`` of another program's file.

    ``given``, options of the command line, say what the file cannot: recipe, data set, norm, separate_energy. What is
    assumed in their place is printed in one line. Raises UserError if it is no network that this program has.
    """
    found = find_weights(raw)
    if found is None:
        programs, places = "JEM, JEM++, M-JEM, SADA-JEM, VERA or DAT", f"directly or in {', '.join(HOLDERS)}"
        sought = f"looked for f.conv1.weight and class_output.weight, or their names elsewhere, {places}"
        raise UserError(f"{path} is not a checkpoint of this program, nor one of {programs}: {sought}")
    weights, untold = found
    options = read_options(path, weights, untold, given)
    channels, n_classes = weights["f.conv1.weight"].shape[1], len(weights["class_output.weight"])
    state: dict[str, Any] = {"step": None, "model": fitted(path, weights, options)}
    if find_weights(raw.get("ema_state_dict")):
        state["ema"] = state["model"]
    sides = {"mnist": 28, "fashion_mnist": 28, "digits": 8}
    side = given.get("image_size") or sides.get(options["dataset"], 32 if options["stages"] == 3 else 64)
    buffer = raw.get("replay_buffer")
    if isinstance(buffer, Tensor) and buffer.ndim == 4 and buffer.shape[1] == channels:
        state["buffer"] = {"images": to_float(buffer).float(), "age": torch.zeros(len(buffer), dtype=torch.int64)}
        side = buffer.shape[-1]
    told = ["--depth {depth} --width {width} --norm {norm} --recipe {recipe} --dataset {dataset}".format(**options)]
    told += ["its averaged weights"] if "ema" in state else []
    if "energy_output.weight" in weights and not options["separate_energy"]:
        told += ["log p(x) from the logits; --separate_energy takes it from its energy_output"]
    unsure = ["recipe", "dataset"] + ([] if "buffer" in state else ["image_size"])
    unsure += ["norm"] if options["norm"] in SAME_NAMES else []  # told apart by nothing in the file
    unsure += ["activation"] if "activation" in options else []
    assumed = ", ".join(f"--{name}" for name in unsure if name not in given)
    told += [f"{assumed} assumed: give others if these are wrong"] if assumed else []
    print(f"{path}: {'; '.join(told)}.", file=sys.stderr)
    class_names = CIFAR10 if (options["dataset"], n_classes) == ("cifar10", 10) else [str(i) for i in range(n_classes)]
    about = {"shape": [channels, side, side], "class_names": class_names, "assumed": True}
    network = {"backbone": Config.backbone, "activation": Config.activation}  # not those of a recipe that was given
    config = asdict(Config(**network | options, load_ckpt=str(path))) | {"load_ckpt": ""}
    return {"format": CHECKPOINT_FORMAT, "config": config, "data": about, "state": state}


def find_weights(raw: Any) -> tuple[StateDict, dict[str, Any]] | None:
    """The weights under this program's names, and what LAYOUTS says of such files."""
    for theirs in state_dicts(raw):
        theirs = renamed(theirs, WRAPPERS)
        weights = renamed(theirs, TO_OURS)
        if {"f.conv1.weight", "f.layer1.0.conv2.weight", "class_output.weight"} <= weights.keys():
            for beginning, options in LAYOUTS:
                if any(re.match(beginning, name) for name in theirs):
                    return weights, options
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


def read_options(path: Path, weights: StateDict, untold: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The network's options, read off names and shapes; recipe and data set, if not given, as they mostly are."""
    stem, head, conv = (weights[f"{name}.weight"] for name in ("f.conv1", "class_output", "f.layer1.0.conv2"))
    if (stem.ndim, head.ndim, conv.ndim) != (4, 2, 4) or conv.shape[0] % 16:
        raise UserError(f"{path} has the names of a Wide-ResNet, but not the shapes")
    places = re.findall(r"f\.layer(\d+)\.(\d+)\.", " ".join(weights))
    stages, last_block = max(int(stage) for stage, _ in places), max(int(block) for _, block in places)
    dataset = {10: "cifar10", 100: "cifar100"}.get(len(head), "folder") if stages == 3 else "folder"
    same_names = given["norm"] if given.get("norm") in SAME_NAMES else SAME_NAMES[0]
    signs = {"f.bn1.running_mean": "batch", "f.bn1.loc": "act", "f.bn1.weight": same_names}
    options = {
        "depth": 10 + 6 * last_block,
        "width": conv.shape[0] // 16,
        "stages": stages,
        "norm": next((norm for sign, norm in signs.items() if sign in weights), "none"),
        "separate_energy": given.get("separate_energy", False),
        "dataset": "mnist" if stem.shape[1] == 1 else dataset,
    }
    options["recipe"] = "jem++" if options["norm"] == "batch" else "jem"
    if "activation" in untold and given.get("activation") == "silu":
        untold = untold | {"activation": "silu"}
    return options | untold | {name: given[name] for name in ("recipe", "dataset") if name in given}


def fitted(path: Path, weights: StateDict, options: dict[str, Any]) -> StateDict:
    """Weights that the network of these options loads. Raises UserError if they are not those of such a network."""
    network = {name: value for name, value in options.items() if name not in ("recipe", "dataset", "norm_statistics")}
    shape, n_classes = (weights["f.conv1.weight"].shape[1], 32, 32), len(weights["class_output.weight"])
    with torch.device("meta"):
        expected = build_model(shape, n_classes, **network).state_dict()
    unused = UNUSED if options["separate_energy"] else (*UNUSED, "energy_output.")
    if options["norm"] == "none":
        unused += ("f.layer1.0.bn1.",)  # VERA has one in its first block
    weights = {k: v for k, v in weights.items() if not (k.startswith(unused) or k.endswith(".initialized"))}  # act norm
    counts = [name for name in expected if name.endswith("num_batches_tracked")]  # the first PyTorch versions had none
    weights = dict.fromkeys(counts, torch.zeros((), dtype=torch.int64)) | weights
    if odd := sorted(expected.keys() ^ weights.keys()):
        size = "depth {depth}, width {width}, {stages} stages, norm {norm}".format(**options)
        but = "lacks" if odd[0] in expected else "has"
        raise UserError(f"{path} looks like a Wide-ResNet ({size}), but {but} {odd[0]}")
    for name, value in expected.items():
        if ".bn" in name and weights[name].numel() == value.numel():  # act norm's have other shapes elsewhere
            weights[name] = weights[name].reshape(value.shape)
        if weights[name].shape != value.shape:
            raise UserError(f"{path} has {name} of the shape {tuple(weights[name].shape)}, not {tuple(value.shape)}")
    return {name: weights[name].to(value.dtype).clone() for name, value in expected.items()}


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
    started = torch.tensor(1, dtype=torch.uint8)  # without, layers of act norm start anew from the first batch
    weights |= {name.removesuffix("loc") + "initialized": started for name in weights if name.endswith(".loc")}
    if program == "jem++":
        weights |= renamed({name: value for name, value in weights.items() if name.startswith("f.")}, TO_SECOND)
    return weights
