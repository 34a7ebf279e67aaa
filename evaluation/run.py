"""``--mode test``: one function a metric, one report. Every number carries its protocol."""

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import distributed
import utils
from checkpoints.load import frozen, load_data, load_feature_model
from config import Config
from config.options import METRICS as METRIC_NAMES
from evaluation import calibration, classification, likelihood, ood, quality, robustness
from evaluation.compare import read_report
from evaluation.inputs import EvalInputs
from evaluation.output import copy_pictures, to_tensorboard, write_files
from evaluation.report import Report, Section
from logger.files import disk_errors
from logger.run_dir import RunDir
from sgld import finite_images
from utils import UserError, evaluation_packages

MEASURES = [m.measure for m in (classification, calibration, ood, robustness, quality, likelihood)]
METRICS: dict[str, Callable[[EvalInputs, Section], None]] = dict(zip(METRIC_NAMES, MEASURES, strict=True))
NEED_LABELS = ("classification", "calibration", "robustness")


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Measure the checkpoint ``content`` of ``path``; returns the exit status. Raises UserError if nothing worked."""
    other = distributed.broadcast_from_rank0(lambda: read_report(cfg.compare)) if cfg.compare else None
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    model = frozen(cfg, path, content, device)
    images, state = load_data(cfg, path, content, device), content["state"]
    buffer = finite_images(state["buffer"]["images"]).to(device) if "buffer" in state else None
    feature_model = load_feature_model(cfg.feature_ckpt, cfg.dataset, images, device)
    class_names = tuple(utils.printable(name, "utf-8") for name in images.class_names)
    trained = Config.from_dict(content["config"], str(path))
    images = replace(images, class_names=class_names)
    inputs = EvalInputs(cfg, model, images, buffer, feature_model, device, trained.classifies)
    ood.check_names(cfg)

    directory, writes = (
        distributed.broadcast_from_rank0(lambda: report_directory(cfg, path)),
        distributed.current_world().rank == 0,
    )
    chosen = " (the last of its run, to which the replay buffer belongs)" if Path(cfg.load_ckpt).is_dir() else ""
    about = {
        "checkpoint": f"{path}{chosen}",
        "training steps": "not in the file" if state["step"] is None else state["step"],
        "weights": "moving average" if "ema" in state else "as trained",
        "arithmetic": "float32" if device.type == "cpu" else "TF32, likelihood in float32",
        "data set": cfg.dataset,
        "network": f"WRN-{cfg.depth}-{cfg.width}",
        "seed": cfg.seed,
    }
    if trained.labels_per_class:
        about["labels in training"] = f"{trained.labels_per_class} of each class"
    if cfg.norm == "batch":
        about["batch normalisation"] = (
            "samples use the statistics of their batch, as in training; everything else (log p(x) of an image, too) "
            "uses the running statistics of real images, so this log p(x) is not the function that the chains climb"
        )
    report = Report(
        directory,
        {
            "about": {k: str(v) for k, v in about.items()},
            "options": vars(cfg),
            "environment": utils.environment(device),
        },
        other,
        writes,
    )
    if other and writes:
        copy_pictures(report, cfg.metrics)
    for name in cfg.metrics:
        print(f"{name} ...", flush=True)
        section = report.section(name)
        torch.manual_seed(cfg.seed)  # for libraries that draw from the global generator
        if name in NEED_LABELS and not trained.classifies:
            section.add_absent(name, "the model was trained without labels")
        else:
            measure(METRICS[name], inputs, section)
        if writes:
            write_files(report)
    if writes and not cfg.no_log:
        to_tensorboard(report, state["step"] or 0)
    print(f"Look at {utils.printable(directory / 'report.html')}, report.md, results.json and the pictures beside it.")
    if not any(section.scalars() for section in report.sections.values()):
        raise UserError(f"nothing could be measured; {directory / 'report.md'} says why")
    return 0


def measure(metric: Callable[[EvalInputs, Section], None], inputs: EvalInputs, section: Section) -> None:
    """Run one metric. If it fails, the others still run, and its section says why it is missing."""
    try:
        with evaluation_packages():
            distributed.raise_on_all_ranks(f"ends {section.name}", lambda: metric(inputs, section))
    except UserError as error:
        section.add_absent(section.name, str(error))
    except Exception as error:
        if distributed.lost_connection(error):
            raise
        traceback.print_exc()
        section.add_absent(section.name, f"{type(error).__name__}: {error}")


def report_directory(cfg: Config, path: Path) -> Path:
    """A new ``eval`` directory in the checkpoint's run; in a new run of ``--logdir`` if there is none to write into."""
    run = path.parent.parent
    if path.parent.name == "ckpt" and (run / "config.json").is_file():
        try:
            if hasattr(os, "geteuid") and run.stat().st_uid != os.geteuid():  # Windows has none
                raise PermissionError(errno.EACCES, "it belongs to another user")
            return new_eval(run)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise UserError(f"cannot write to {run}: {error.strerror}") from None
            reason = f"{run} cannot be written ({error.strerror}): the report goes to a new run in {cfg.logdir}"
            print(utils.printable(reason), flush=True)
    run = RunDir.create(cfg.logdir, cfg.mode, cfg.note).path
    with disk_errors(run):
        return new_eval(run)


def new_eval(run: Path) -> Path:
    """Make the first of ``eval``, ``eval-2``, ... that is not there yet."""
    for end in ("", *(f"-{n}" for n in range(2, 1000))):
        try:
            (run / f"eval{end}").mkdir()
        except FileExistsError:
            continue
        return run / f"eval{end}"
    raise UserError(f"{run} holds 999 evaluations; remove some")
