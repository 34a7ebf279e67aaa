"""The training loop, and what it dumps.

Both modes run the same loop; ``baseline_train`` leaves out everything about samples.
"""

import copy
import math
import sys
import time
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import utils
from config import Config
from models import build_model, copy_weights, log_density, sampling_copy
from models.predict import accuracy
from sgld import SGLD, CompiledOrEager, ReplayBuffer, annealed_chain, uniform_images
from storage.checkpoint import find_checkpoint, load_checkpoint, remove_others, save_checkpoint
from storage.log import Log
from storage.pictures import image_grid, plot_curves, save_gif, save_png, to_uint8
from storage.run_dir import RunDir
from storage.writer import Writer, disk_errors, replace_file
from utils import Signals, TrainingFailed, UserError

matplotlib.use("Agg")

LOG_EVERY = 10  # steps; the only regular moment at which the host waits for the device
SNAPSHOT_EVERY = 200  # steps between states in memory that training can go back to
FINAL_LR = 1e-6
BAR = "{percentage:3.0f}% {n}/{total} [{remaining} left{postfix}]"  # a terminal of 80 columns shows what matters
FRAME_EVERY = 10  # SGLD steps between the frames of a GIF; noise does not compress, 31 frames of 32x32 take 1.4 MB


def joint_loss(
    logits: Tensor, y: Tensor, logits_sampled: Tensor | None, p_y_x_weight: float, p_x_weight: float, energy_l2: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """JEM's loss (section 3, equation 6, with Du & Mordatch's penalty on energies) and its parts, all 0-dim.

    logits: real images' (N, K) with labels y (N,); logits_sampled: negative samples' (M, K), or None for a plain
    classifier. Minimising ``loss/generative`` raises log p(x) of real images against samples.
    """
    classification = F.cross_entropy(logits, y)
    real = log_density(logits)
    parts = {
        "loss/classification": classification,
        "accuracy/train": (logits.argmax(1) == y).float().mean(),
        "log_density/real": real.mean(),
        "log_density/real_std": real.std(correction=0),
    }
    loss = p_y_x_weight * classification
    if logits_sampled is not None:
        sampled = log_density(logits_sampled)
        generative = sampled.mean() - real.mean()
        loss = loss + p_x_weight * generative
        parts |= {
            "loss/generative": generative,
            "log_density/sampled": sampled.mean(),
            "log_density/sampled_std": sampled.std(correction=0),
        }
        real = torch.cat([real, sampled])
    loss = loss + energy_l2 * real.square().mean()
    return loss, {"loss/total": loss, **parts}


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up over ``warmup_steps``, then a cosine to 1e-6 (or a lower ``peak``); ``step`` counts from 1."""
    if step <= warmup_steps:
        return peak * step / warmup_steps
    done, end = (step - warmup_steps) / max(1, total_steps - warmup_steps), min(FINAL_LR, peak)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))


def build_optimizer(cfg: Config, parameters) -> torch.optim.Optimizer:
    shared = {"lr": cfg.lr, "weight_decay": cfg.weight_decay}
    match cfg.optimizer:
        case "adam":
            return torch.optim.Adam(parameters, fused=True, **shared)
        case "sgd":
            return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, fused=True, **shared)
        case "rmsprop":
            return torch.optim.RMSprop(parameters, **shared)


class Trainer:
    """One run: everything that changes from step to step, and the loop that changes it."""

    def __init__(self, cfg: Config, images: data.ImageData, device: torch.device):
        self.cfg, self.data, self.device = cfg, images, device
        self.steps_per_epoch = len(images.train) // cfg.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(f"--batch_size {cfg.batch_size} is larger than the {len(images.train)} training images")
        self.total_steps = min(cfg.epochs * self.steps_per_epoch, cfg.max_steps or math.inf)
        self.dtype = utils.pick_dtype(cfg.precision, device)
        long = device.type == "cuda" and self.total_steps >= 500  # compiling takes a minute or two
        self.compile = cfg.compile == "on" or (cfg.compile == "auto" and long)

        torch.manual_seed(cfg.seed)
        self.data_rng, self.sgld_rng = torch.Generator(device), torch.Generator(device)
        self.seed_generators(cfg.seed)
        self.model = build_model(
            images.shape[0], len(images.class_names), cfg.depth, cfg.width, cfg.norm, cfg.dropout_rate, cfg.activation
        ).to(device)
        self.forward = CompiledOrEager(self.model.logits) if self.compile else self.model.logits
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if cfg.ema else None  # the averaged weights
        self.optimizer = build_optimizer(cfg, self.model.parameters())
        if cfg.samples:
            self.buffer = ReplayBuffer(cfg.buffer_size, images.shape, self.sgld_rng)
            self.sampling_model = sampling_copy(self.model, self.dtype)
            self.sgld = SGLD(self.sampling_model.log_density, self.compile)

        # What divergence has changed (see recover): factors of the options, and the counts that lead to them.
        self.remedies = {"sgld_step_factor": 1, "lr_factor": 1.0, "energy_l2": cfg.energy_l2}
        self.recoveries, self.failures, self.failed_at = 0, 0, -1
        self.good: dict[str, Any] | None = None  # the state to go back to
        self.candidate: dict[str, Any] | None = None  # a later one, good if training goes on well for a while
        self.referenced: list[set[str]] = [set(), set()]  # the snapshots' files that previous.pt and last.pt name

        self.step, self.best = 0, 0.0
        self.order = torch.empty(0, dtype=torch.int64, device=device)  # this epoch's order of the training images
        self.sums: dict[str, Tensor] = {}  # of each measurement, over the steps since the last line of the log
        self.summed = 0  # how many steps those are
        self.classes = torch.zeros(len(images.class_names), dtype=torch.int64, device=device)  # of samples, likewise
        self.alarm = torch.zeros((), dtype=torch.bool, device=device)  # raised by a step that diverged

    # ------------------------------------------------------------------------------------------ the loop

    def train(self, run: RunDir, log_position: int = 0) -> int:
        """Train to the end of the run; returns the exit status: 0, or 130 and 143 when stopped by a signal.

        ``log_position``: where in metrics.jsonl a resumed run goes on, in bytes.
        """
        self.run = run
        log = Log(run.path, not self.cfg.no_log, log_position, self.step)
        with run, closing(log) as self.log, Signals() as signals, Writer() as self.writer:
            self.announce()
            if self.good is None:
                self.take_snapshot()
                if self.step == 0:
                    self.log.hyperparameters(asdict(self.cfg))
                    self.checkpoint("last.pt")
            status = self.loop(signals)
        if status == 0:
            self.summary()
        else:
            print(f"Stopped after step {self.step}; --resume {run.path} goes on from there.")
        return status

    def loop(self, signals: Signals) -> int:
        cfg = self.cfg
        first, self.clock = self.step + 1, None
        patience = 0.1 if sys.stderr.isatty() else 10  # seconds; a cluster's log file wants fewer bars than a terminal
        with tqdm(total=self.total_steps, initial=self.step, bar_format=BAR, mininterval=patience) as self.bar:
            while self.step < self.total_steps:
                self.step += 1
                samples = self.training_step()
                step, last = self.step, self.step == self.total_steps
                epoch_ends = step % self.steps_per_epoch == 0
                log = step % LOG_EVERY == 0 or last
                save = epoch_ends or step % cfg.ckpt_every == 0 or last or signals.received  # a later one: next step
                self.bar.update()

                if (log or save) and self.alarm.item():  # waits for the device
                    self.recover()
                    continue
                values = self.measurements() if log else {}
                if step % SNAPSHOT_EVERY == 0:
                    self.take_snapshot()
                if cfg.samples and (step - 1) % cfg.sample_every == 0:
                    self.dump_samples(samples)
                if cfg.samples and step > 1 and (step - 1) % cfg.gif_every == 0:
                    self.dump_gif()
                if step % (cfg.eval_every * self.steps_per_epoch) == 0 or last:
                    values |= self.evaluate()
                if values:
                    self.log.values(step, values)
                if values.get("accuracy/valid", 0) > self.best:  # test accuracy has no say in this
                    self.best = values["accuracy/valid"]
                    self.checkpoint("best.pt")
                if save:
                    self.checkpoint("last.pt")
                    if signals.status and not last:
                        return signals.status
                    signals.received = False
                if "accuracy/test" in values:
                    self.writer.submit(plot_curves, self.run.path)
                if self.clock is None:  # the first step's time is compilation and warm-up
                    self.clock = (time.perf_counter(), step)
                elif step == first + LOG_EVERY and not last:
                    self.estimate()
        return 0

    def training_step(self) -> Tensor | None:
        """One update; returns the negative samples (N, C, H, W), or None. Never waits for the device."""
        cfg = self.cfg
        place = (self.step - 1) % self.steps_per_epoch
        if place == 0:
            self.order = torch.randperm(len(self.data.train), generator=self.data_rng, device=self.device)
        batch = self.order[place * cfg.batch_size : (place + 1) * cfg.batch_size]
        x = data.augment(self.data.train.images[batch], self.data.flip and not cfg.no_flip, cfg.sigma, self.data_rng)
        y = self.data.train.labels[batch]

        samples = logits_sampled = None
        measured = {}
        if cfg.samples:
            copy_weights(self.model, self.sampling_model)
            start, index = self.buffer.draw(cfg.batch_size, cfg.reinit_freq, self.sgld_rng)
            samples, gradient = self.sgld(
                start, cfg.sgld_step * self.remedies["sgld_step_factor"], cfg.sgld_lr, cfg.sgld_std, self.sgld_rng
            )
            self.buffer.store(index, samples)
            measured = {
                "sgld/gradient_norm": gradient.flatten(1).norm(dim=1).mean(),
                "sgld/distance_moved": (samples - start).flatten(1).norm(dim=1).mean(),
                "sgld/saturated_share": (samples.abs() >= 1).float().mean(),
                "sgld/buffer_age": self.buffer.age.float().mean(),
            }

        self.model.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if samples is None:
                logits = self.forward(x)
            elif cfg.norm == "batch":  # real and sampled images must not share batch statistics
                logits, logits_sampled = self.forward(x), self.forward(samples)
            else:
                logits, logits_sampled = self.forward(torch.cat([x, samples])).chunk(2)
        loss, parts = joint_loss(
            logits, y, logits_sampled, cfg.p_y_x_weight, cfg.p_x_weight, self.remedies["energy_l2"]
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.step()
        if self.ema:
            self.update_average()

        healthy = loss.isfinite() & gradient_norm.isfinite()
        if samples is not None:
            healthy &= parts["loss/generative"].abs() < cfg.diverge_threshold
            classes = torch.arange(len(self.classes), device=self.device)
            self.classes += (logits_sampled.argmax(1) == classes[:, None]).sum(1)  # bincount would wait for the device
        self.alarm |= ~healthy
        for name, value in (parts | {"gradient_norm": gradient_norm} | measured).items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        self.summed += 1
        return samples

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.cfg.ema, (1 + self.step) / (10 + self.step))  # a short memory first: the start is no model yet
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        for mean, now in zip(self.ema.buffers(), self.model.buffers(), strict=True):  # running statistics
            mean.copy_(now)

    @property
    def lr(self) -> float:
        schedule = learning_rate(self.step, self.cfg.lr, self.cfg.warmup_steps, self.total_steps)
        return schedule * self.remedies["lr_factor"]

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    @property
    def averaged_model(self):
        """The weights that evaluation and GIF chains use."""
        return self.ema or self.model

    # ------------------------------------------------------------------------------------------ state

    def seed_generators(self, seed: int) -> None:
        self.data_rng.manual_seed(2 * seed)
        self.sgld_rng.manual_seed(2 * seed + 1)

    def state_dict(self) -> dict[str, Any]:
        """Whatever changes the next step."""
        state = {name: getattr(self, name) for name in self.plain_state}
        state |= {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "data_rng": self.data_rng.get_state(),
            "sgld_rng": self.sgld_rng.get_state(),
            "torch_rng": torch.get_rng_state(),
        }  # dropout's
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        if self.ema:
            state["ema"] = self.ema.state_dict()
        if self.cfg.samples:
            state["buffer"] = self.buffer.state_dict()
        return state

    plain_state = (
        "step",
        "best",
        "order",
        "sums",
        "summed",
        "classes",
        "remedies",
        "recoveries",
        "failures",
        "failed_at",
    )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the moment of a ``state_dict``; ``state`` is left as it is and may be on another device."""
        for name in self.plain_state:
            setattr(self, name, copy_tree(state[name], self.device))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy_tree(state["optimizer"], self.device))  # it would keep the tensors it gets
        try:
            self.data_rng.set_state(state["data_rng"])
            self.sgld_rng.set_state(state["sgld_rng"])
        except RuntimeError:
            print(f"The run goes on with new randomness: it was on another kind of device than {self.device.type}.")
            self.seed_generators(self.cfg.seed + self.step)
        torch.set_rng_state(state["torch_rng"])
        if "cuda_rng" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.cfg.samples:
            self.buffer.load_state_dict(state["buffer"])
        self.alarm.fill_(False)

    def take_snapshot(self) -> None:
        """The candidate has proven good, and a copy of the state is the new one; as a file, too, for a resumed run."""
        state = copy_tree(self.state_dict(), torch.device("cpu"))
        self.good, self.candidate = self.candidate or state, state
        folder = self.run.path / "snapshots"
        self.writer.submit(save_checkpoint, folder, snapshot_name(state), {"state": state})
        self.writer.submit(remove_others, folder, self.needed_snapshots)

    @property
    def snapshots(self) -> list[str]:
        """The file names of the good state and the candidate."""
        return [snapshot_name(self.good), snapshot_name(self.candidate)]

    @property
    def needed_snapshots(self) -> set[str]:
        """The files that this run, or one resumed from a checkpoint of it, may go back to: six at most."""
        return {*self.snapshots, *self.referenced[0], *self.referenced[1]}

    def load_snapshots(self, directory: Path, names: list[str]) -> None:
        """Take up the good state and the candidate of a run that is resumed."""
        self.referenced = [{path.name for path in directory.glob("*.pt")}, set(names)]
        try:
            self.good, self.candidate = (load_checkpoint(directory / name)["state"] for name in names)
        except UserError as error:
            print(f"Warning: {error}; if training diverges, it goes back to step {self.step} at most.", file=sys.stderr)

    def load_weights(self, path: str) -> None:
        """Start from another run's weights and, where it fits, its replay buffer."""
        path, content = find_checkpoint(path)
        state, options, mine = content["state"], content["config"], asdict(self.cfg)
        try:
            if any(options[name] != mine[name] for name in ("norm", "activation")):
                raise RuntimeError("the weights may fit, and be another network")
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            shaping = ("dataset", "depth", "width", "norm", "activation")
            differ = [f"--{k} {options[k]}" for k in shaping if options[k] != mine[k]]
            hint = f"it was trained with {' '.join(differ)}" if differ else str(error).splitlines()[-1].strip()
            raise UserError(f"{path} does not fit this network: {hint}") from None
        if self.ema:
            self.ema.load_state_dict(self.model.state_dict())
        if self.cfg.samples and "buffer" in state:
            if state["buffer"]["images"].shape == self.buffer.images.shape:
                self.buffer.load_state_dict(state["buffer"])
            else:
                print("The checkpoint's replay buffer has another size: starting with a fresh one.")

    def checkpoint(self, name: str) -> None:
        """Have the state written behind training's back, after all that was dumped before."""
        content = {
            "config": asdict(self.cfg),
            "state": copy_tree(self.state_dict(), torch.device("cpu")),
            "log_position": self.log.position(),
            "data": describe(self.data),
            "snapshots": self.snapshots,
        }
        self.writer.submit(self.write_checkpoint, name, content)
        if name == "last.pt":
            self.referenced = [self.referenced[1], set(self.snapshots)]
            self.writer.submit(remove_others, self.run.path / "snapshots", self.needed_snapshots)

    def write_checkpoint(self, name: str, content: dict[str, Any]) -> None:
        self.log.flush()
        save_checkpoint(self.run.path / "ckpt", name, content, "previous.pt" if name == "last.pt" else None)

    # ------------------------------------------------------------------------------------------ divergence

    def recover(self) -> None:
        """Go back to the last good state with new randomness and, soon after another divergence, gentler settings.

        The remedies are those that JEM's authors recommend, in their order: more SGLD steps, a lower learning rate, a
        small penalty on energies. They stay for the rest of the run.
        """
        diverged_at = self.step
        history = self.recoveries + 1, self.failures, self.failed_at, self.remedies, self.best
        place = self.good["step"]
        if self.recoveries >= self.cfg.max_recoveries:
            raise TrainingFailed(
                f"training diverged at step {diverged_at} and {self.recoveries} recoveries are used "
                "up; try more --sgld_step, a lower --lr, or --energy_l2 0.1"
            )
        self.load_state_dict(self.good)
        self.candidate = self.good
        self.recoveries, self.failures, self.failed_at, self.remedies, self.best = history
        soon = diverged_at <= self.failed_at + 5 * SNAPSHOT_EVERY
        self.failures = self.failures + 1 if soon else 1
        self.failed_at = diverged_at
        done = "new randomness"
        if self.failures == 2 and self.cfg.samples:
            self.remedies["sgld_step_factor"] *= 2
            done = f"{self.cfg.sgld_step * self.remedies['sgld_step_factor']} SGLD steps"
        elif self.failures == 4 and self.cfg.samples:
            self.remedies["energy_l2"] = max(0.1, self.remedies["energy_l2"])
            done = f"energy_l2 {self.remedies['energy_l2']:g}"
        elif self.failures >= 2:
            self.remedies["lr_factor"] *= 0.5
            done = f"learning rate x {self.remedies['lr_factor']:g}"
        self.seed_generators(self.cfg.seed + 1_000_003 * self.recoveries)
        torch.manual_seed(self.cfg.seed + 1_000_003 * self.recoveries)
        self.bar.n, self.clock = self.step, (time.perf_counter(), self.step)
        self.bar.refresh()
        message = (
            f"diverged at step {diverged_at}; back to step {place} with {done} "
            f"(recovery {self.recoveries} of {self.cfg.max_recoveries})"
        )
        self.bar.write(message)
        self.log.recovery(diverged_at, place, message)
        self.checkpoint("last.pt")  # the one on disk may be later, and already ill

    # ------------------------------------------------------------------------------------------ what is dumped

    def measurements(self) -> dict[str, float | list[int]]:
        """Means over the steps since the last call, and where training stands."""
        means = torch.stack(list(self.sums.values())).div(self.summed).tolist()  # waits for the device
        values = dict(zip(self.sums, means, strict=True))
        now, self.speed = time.perf_counter(), math.nan
        if self.clock:
            self.speed = (self.step - self.clock[1]) * self.cfg.batch_size / (now - self.clock[0])
            self.clock = (now, self.step)
        values |= {"epoch": self.epoch, "lr": self.lr, "speed/images_per_second": self.speed}
        shown = {"loss": values["loss/total"], "accuracy": values["accuracy/train"]}
        if self.cfg.samples:
            values["sgld/classes"] = self.classes.tolist()
            shown |= {"log p(real)": values["log_density/real"], "log p(sampled)": values["log_density/sampled"]}
        self.bar.set_postfix(
            {"images/s": f"{self.speed:.0f}"} | {k: f"{v:.3g}" for k, v in shown.items()}, refresh=False
        )
        self.sums, self.summed = {}, 0
        self.classes.zero_()
        return values

    def dump_samples(self, samples: Tensor) -> None:
        """The first 64 of this step's chains; a smaller batch is filled up from the replay buffer."""
        shown = to_uint8(torch.cat([samples, self.buffer.images[: max(0, 64 - len(samples))]])[:64]).cpu()
        self.writer.submit(self.write_samples, self.step, image_grid(shown))

    def write_samples(self, step: int, picture: np.ndarray) -> None:
        png = save_png(self.run.path / "samples" / f"sampled_image_{step:08d}.png", picture)
        self.log.encoded_image(step, "samples", png, *picture.shape[:2])

    def dump_gif(self) -> None:
        """A long annealed chain of 16 images from noise; its randomness is its own and leaves training alone."""
        rng = torch.Generator(self.device).manual_seed(self.cfg.seed + self.step)
        copy_weights(self.averaged_model, self.sampling_model)
        x = uniform_images(16, self.data.shape, rng)
        sgld = SGLD(self.sampling_model.log_density)  # for one film, compilation would not pay
        frames = annealed_chain(sgld, x, self.cfg.sgld_lr, self.cfg.sgld_std, rng, every=FRAME_EVERY)
        shown = to_uint8(frames).cpu()
        self.writer.submit(self.write_gif, self.step, [image_grid(images, columns=4) for images in shown])

    def write_gif(self, step: int, pictures: list[np.ndarray]) -> None:
        captions = [f"training step {step}, SGLD step {FRAME_EVERY * i}" for i in range(len(pictures))]
        gif = save_gif(self.run.path / "sgld" / f"SGLD_process_demo_{step:08d}.gif", pictures, captions)
        with disk_errors(self.run.path):
            replace_file(self.run.path / "SGLD_process_demo.gif", gif)
        self.log.encoded_image(step, "SGLD_process_demo", gif, 1, 1)

    def evaluate(self) -> dict[str, float]:
        """Validation and test accuracy."""
        splits = {"accuracy/valid": self.data.valid, "accuracy/test": self.data.test}
        model = self.averaged_model
        values = {name: accuracy(model, split, self.dtype) for name, split in splits.items() if len(split)}
        self.bar.write(
            f"step {self.step}, epoch {self.epoch:.4g}: "
            + ", ".join(f"{name.split('/')[1]} accuracy {100 * v:.2f} %" for name, v in values.items())
        )
        return {"epoch": self.epoch} | values

    def announce(self) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        images = ", ".join(f"{len(getattr(self.data, part))} {part}" for part in ("train", "valid", "test"))
        lines = {
            "run": self.run.path,
            "device": utils.device_name(self.device),
            "precision": f"{str(self.dtype).removeprefix('torch.')}, {'compiled' if self.compile else 'not compiled'}",
            "network": f"WRN-{self.cfg.depth}-{self.cfg.width}, {parameters:,} parameters",
            "data": f"{self.cfg.dataset} {'x'.join(map(str, self.data.shape))}: {images}",
            "steps": f"{self.total_steps}, {self.steps_per_epoch} an epoch",
        }
        if self.step:
            lines["continuing"] = f"after step {self.step}"
        if self.cfg.warmup_steps >= self.total_steps:
            lines["note"] = f"--warmup_steps {self.cfg.warmup_steps} lasts longer than the run"
        for name, text in lines.items():
            print(f"{name:10} {text}", flush=True)

    def estimate(self) -> None:
        """Says how long the rest will take, once the first steps have shown the speed."""
        hours = (self.total_steps - self.step) * self.cfg.batch_size / self.speed / 3600
        duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        hint = "; a smaller --width, --depth, --batch_size or --max_steps is faster" if hours > 48 else ""
        self.bar.write(f"The remaining {self.total_steps - self.step} steps will take about {duration}{hint}.")

    def summary(self) -> None:
        print(f"Done after {self.step} steps. Look at")
        for name in (
            "samples",
            "SGLD_process_demo.gif",
            "test_accuracy.png",
            "loss.png",
            "metrics.jsonl",
            "ckpt/best.pt",
            "ckpt/last.pt",
        ):
            if (self.run.path / name).exists():
                print(f"  {self.run.path / name}")
        if not self.cfg.no_log:
            print(f"or run: tensorboard --logdir {self.run.path.parent}")


def snapshot_name(state: dict[str, Any]) -> str:
    """A file name that no other state of the run has."""
    return f"step_{state['step']:08d}_recoveries_{state['recoveries']}.pt"


def copy_tree(tree: Any, device: torch.device) -> Any:
    """Nested dicts, lists and tuples with every tensor copied to ``device``."""
    match tree:
        case Tensor():
            return tree.detach().to(device, copy=True)
        case dict():
            return {key: copy_tree(value, device) for key, value in tree.items()}
        case list() | tuple():
            return type(tree)(copy_tree(value, device) for value in tree)
    return tree


def describe(images: data.ImageData) -> dict[str, Any]:
    """What a checkpoint remembers of its data, so that a resumed run meets the same."""
    return {
        "shape": list(images.shape),
        "class_names": list(images.class_names),
        "images": [len(images.train), len(images.valid), len(images.test)],
    }
