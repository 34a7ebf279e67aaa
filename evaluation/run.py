"""``--mode test``: every metric that is asked for, and one report. Every number carries its protocol."""

import importlib
import os
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import distributed
import utils
from checkpoints.load import Trained, load_feature_model, same_classes
from config import Config
from evaluation.inputs import EvalInputs
from evaluation.report import Report, Section, read_report
from generation import TrainedRun
from logger.files import disk_errors, first_free
from logger.run_dir import RunDir
from models.batch_norm import batch_norms
from sgld import finite_images
from utils import UserError, printable


def run(checkpoint: Trained) -> int:
    """Measure a checkpoint; returns the exit status. Raises UserError if nothing worked."""
    cfg, path, content = checkpoint
    other = distributed.broadcast_from_rank0(lambda: read_report(cfg.compare)) if cfg.compare else None
    if "ood" in cfg.metrics:
        importlib.import_module("evaluation.ood").set_names(cfg)  # what it refuses, before all else is measured
    tested, state = TrainedRun(checkpoint), content["state"]
    device, images, trained = tested.device, tested.images, tested.trained_with
    held = finite_images(state["buffer"]["images"]) if "buffer" in state else ()
    buffer = held.to(device) if len(held) else None
    features = load_feature_model(cfg.feature_ckpt, cfg.dataset, images, device) if "quality" in cfg.metrics else None
    shown = replace(images, class_names=tuple(printable(name, "utf-8") for name in images.class_names))
    inputs = EvalInputs(cfg, tested.model, shown, buffer, features, device, tested.classifies, tested.chains)

    directory = distributed.broadcast_from_rank0(lambda: report_directory(cfg, path))
    about = facts(inputs, trained, path, state, same_classes(content["data"], images))
    options = vars(trained) | {f.name: getattr(cfg, f.name) for f in fields(cfg) if "test" in f.metadata["modes"]}
    report = Report(directory, {"about": about, "options": options, "environment": utils.environment(device)}, other)
    for i, name in enumerate(cfg.metrics, 1):
        print(f"{name} ({i} of {len(cfg.metrics)}) ...", flush=True)
        start, section = time.perf_counter(), Section(name, directory)
        report.sections[name] = section
        try:
            section.attempt(name, partial(measure, inputs, section))
            print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
        except KeyboardInterrupt:
            section.add_absent("the rest", "stopped by Ctrl-C")
            print(f"\nStopped: what is measured so far will be in {printable(directory / 'report.html')}.")
            raise
        finally:  # Ctrl-C, too, leaves what is measured
            if distributed.current_world().rank == 0:
                report.write_files()
    print(f"Look at {printable(directory / 'report.html')}, report.md, results.json and the pictures beside it.")
    if not any(section.results for section in report.sections.values()):
        raise UserError(f"nothing could be measured; {directory / 'report.md'} says why")
    return 0


def measure(inputs: EvalInputs, section: Section) -> None:
    """Run the metric of a section. UserError if it ``needs_labels``, and the model was trained without."""
    torch.manual_seed(inputs.cfg.seed)  # for libraries that draw from the global generator
    metric = importlib.import_module(f"evaluation.{section.name}")
    if getattr(metric, "needs_labels", False) and not inputs.classifies:
        raise UserError("the model was trained without labels")
    metric.measure(inputs, section)


def facts(inputs: EvalInputs, trained: Config, path: Path, state: dict[str, Any], same: bool) -> dict[str, str]:
    """What is measured, for the top of the report; ``same``: whether classes are those of the training."""
    cfg, (_, height, width), test = inputs.cfg, inputs.data.shape, inputs.data.test
    others = "" if len(inputs.data.train) else "; other images than those of the training, or a changed set"
    others += "" if same else "; other classes, so that what depends on labels means nothing"
    last, step = path.name == "last.pt" and "buffer" in state, state["step"]  # None: another program's file
    head = ", its head for log p(x) untrained" if trained.separate_energy and not trained.draws_samples else ""
    about = {
        "checkpoint": f"{path}{' (the last of its run, to which the replay buffer belongs)' if last else ''}",
        "training steps": "not in the file" if step is None else str(step),
        "weights": "moving average" if "ema" in state else "as trained",
        "arithmetic": "float32" if inputs.device.type == "cpu" else "TF32, likelihood in float32",
        "data set": (f"{cfg.data_dir}, {width}x{height}" if cfg.dataset == "folder" else cfg.dataset) + others,
        "images": f"{len(test)}, digest {replace(inputs.data, train=test[:0], valid=test[:0]).description['digest']}",
        "network": f"{inputs.model.name}{head}",
        "seed": f"{'unknown' if step is None else trained.seed} in training, {cfg.seed} for measuring",
    }
    if (recovery := state.get("recovery", {})).get("recoveries"):
        remedies, usual = recovery["remedies"].items(), {"energy_l2": trained.energy_l2}
        changed = ", ".join(f"{k.replace('_factor', ' x')} {v:g}" for k, v in remedies if v != usual.get(k, 1))
        about["divergences"] = f"{recovery['recoveries']}; training went on with {changed or 'new randomness'}"
    if trained.labels_per_class:
        about["labels in training"] = f"{trained.labels_per_class} of each class"
    if batch_norms(inputs.model):
        own = cfg.norm_statistics == "batch"
        chains = "those of their batch, so this log p(x) is not what they climb" if own else "them, too"
        about["batch normalisation"] = f"running statistics; chains that draw samples use {chains}"
    return about


def report_directory(cfg: Config, path: Path) -> Path:
    """A new ``eval`` folder in the checkpoint's run; in a new run if that cannot be, or if --logdir or --note ask."""
    run = path.parent.parent
    own = path.parent.name == "ckpt" and (run / "config.json").is_file()
    if own and not (run.stat().st_uid == os.geteuid() and os.access(run, os.W_OK)):
        reason = f"{run} cannot be written or belongs to another user"
        print(printable(f"{reason}: the report goes to a new run in {cfg.logdir}"), flush=True)
        own = False
    usual = {os.path.realpath(place) for place in (run.parent, run / "..", Config.logdir)}
    if not own or cfg.note or os.path.realpath(cfg.logdir) not in usual:
        run = RunDir.create(cfg.logdir, cfg.mode, cfg.note).path
    with disk_errors(run):
        return first_free(run / "eval", Path.mkdir)
