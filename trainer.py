"""The training loop, and what it dumps; ``baseline_train`` leaves out everything about samples."""

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import data
import distributed
import divergence
import utils
from acceleration import CompiledOrEager, CUDAGraphBackward, compiles
from chain_init import build_chain_init
from checkpoints.load import build_for, load_weights
from config import Config
from config.checks import check_sizes
from distributed import World, gather_state, shard_buffer, shard_state
from divergence import Recovery, state_device
from evaluation.training_fid import SampleQuality
from logger.meter import Meter
from logger.progress import announce, compiled
from logger.run_dir import RunDir
from logger.run_logger import NoRunLogger, RunLogger
from losses import Weights, joint_loss
from models import JointForward, copy_weights, frozen_sampler_model
from models.batch_norm import average_running_stats, convert_sync_batchnorm, tracks_running_stats
from models.predict import accuracy, evaluation_mode
from optim import build_optimizer, recalibrate_batch_norm, scheduled_rate, update_ema
from pgd import adversarial_images
from sgld import SGLD, ReplayBuffer, Sampler, annealed_chain, chain_options
from utils import Signals, tree_to

MIN_EPOCH = 50  # steps; of shorter epochs, not each ends with an evaluation and a checkpoint
LOG_EVERY = 10  # steps; the only regular moment at which the host waits for the device
FRAME_EVERY = 10  # SGLD steps between the frames of a GIF; noise does not compress, 31 frames of 32x32 take 1.4 MB
SHOWN = 64  # samples in a grid
BEST = {"best.pt": ("accuracy/valid", 1), "best_quality.pt": ("quality/fresh_samples", -1)}  # not by test accuracy
FAR = 2**18  # between the seeds of two processes; a generator on the CPU uses only the last 32 bits of a seed


class StepBatch(NamedTuple):
    """The images of a step, float32 (N, C, H, W): labelled ones, real ones for log p(x) if others, samples if any."""

    x: Tensor
    y: Tensor
    x_real: Tensor | None
    samples: Tensor | None
    y_sampled: Tensor | None  # the class of each sample with --class_cond


class Trainer:
    """One run: everything that changes from step to step, and the loop that changes it.

    Of several processes, each has a part of every batch and of the replay buffer, and chains of its own. Weights,
    optimizer, averaged weights and the order of the images are the same in all of them.
    """

    def __init__(self, cfg: Config, images: data.ImageData, device: torch.device, world: World = data.ALONE):
        self.cfg, self.data, self.device, self.world = cfg, images, device, world
        n_classes = len(images.class_names)
        labelled = data.some_of_each_class(images.train, cfg.labels_per_class, n_classes)
        sizes = {"batch_size": (cfg.batch_size, labelled)}
        if cfg.separate_p_x:
            sizes["p_x_batch_size"] = (cfg.n_chains, images.train)
        check_sizes(cfg, {name: len(split) for name, (_, split) in sizes.items()}, n_classes, world.size, images.shape)
        # An epoch is a pass over the labelled images; with few labels, over all images.
        size, split = sizes["p_x_batch_size" if cfg.labels_per_class and cfg.separate_p_x else "batch_size"]
        self.steps_per_epoch = len(split) // size
        self.total_steps = min(cfg.epochs * self.steps_per_epoch, cfg.max_steps or math.inf)
        self.cycle_ends = [self.total_steps]  # see optim.learning_rate
        self.dtype = utils.pick_dtype(cfg.precision, device)
        exchanges = cfg.sync_batch_norm and world.size > 1  # numbers within the network
        compile = compiles(cfg.compile, device, self.total_steps) and not exchanges

        self.sampler, self.start = None, build_chain_init(cfg, images) if cfg.samples else None
        self.quality = SampleQuality(cfg, images, self.start, device) if cfg.quality_every and cfg.samples else None
        torch.manual_seed(cfg.seed)
        self.rng = {name: torch.Generator(device) for name in ("data", "sgld", "p_x")}
        self.model = build_for(cfg, images.shape[0], n_classes).to(device)
        if exchanges:
            convert_sync_batchnorm(self.model)
        self.seed_generators(cfg.seed)  # weights are the same in all processes; what is drawn from now on is not
        self.forward = CompiledOrEager(self.model.logits) if compile else self.model.logits
        self.joint_forward = distributed.averaging_gradients(JointForward(self.model, self.forward), device)
        captures = device.type == "cuda" and not distributed.is_distributed()
        self.captured = CUDAGraphBackward(self.model) if captures else None
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False) if cfg.ema else None
        self.optimizer = build_optimizer(cfg, self.model)
        flip = images.flip and not cfg.no_flip
        self.batches = data.Batches(labelled, cfg.batch_size, flip, cfg.sigma, self.rng["data"], world=world)
        self.real_batches = None  # of log p(x), where these are not the labelled images
        if cfg.separate_p_x:
            rng, augmented = self.rng["p_x"], not cfg.p_x_no_augment
            self.real_batches = data.Batches(images.train, cfg.n_chains, flip, cfg.sigma, rng, augmented, world)
        if cfg.samples:
            rng = self.rng["sgld"]
            self.sampler_model = frozen_sampler_model(self.model, self.dtype)
            options = chain_options(cfg) | {"capture": not exchanges}
            engine = SGLD(self.sampler_model.log_density, **options, compile=compile)
            buffer = ReplayBuffer(cfg.buffer_size // world.size, n_classes, self.start, rng)
            self.sampler = Sampler(engine, buffer, self.start, cfg.reinit_freq, cfg.sgld_lr, cfg.sgld_std, rng)
            # Its own engine, not compiled, for one long chain in 500 steps.
            self.film = SGLD(self.sampler_model.log_density, **options)
        self.recovery, self.meter = Recovery(cfg), Meter()
        self.step, self.best, self.sgld_step, self.host_copy = 0, {}, cfg.sgld_step, None
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)  # raised by a step that diverged

    def train(self, run: RunDir, log_position: int = 0) -> int:
        """Train to the end of the run; returns the exit status: 0, or 128 + its number when a signal stopped it.

        ``log_position``: where in metrics.jsonl a resumed run goes on, in bytes. The process of rank 0 writes.
        """
        self.warm_up()
        ran = {"precision": str(self.dtype).removeprefix("torch."), "compiled": compiled(self.forward, self.sampler)}
        ran |= {"processes": self.world.size}
        announce(self, run.path, ran)
        self.record = NoRunLogger()
        if self.world.rank == 0:
            run.write_config(asdict(self.cfg), utils.environment(self.device) | ran, data=self.data.description)
            self.record = RunLogger(run, self.cfg, self.step, self.total_steps, log_position)
        with Signals() as signals:
            with self.record:
                self.keep_state()
                if self.step == 0:
                    self.record.hyperparameters(asdict(self.cfg))
                    self.checkpoint("last.pt")
                status = self.loop(signals)
            distributed.barrier()  # when one process ends, torchrun stops the others
        self.record.end(self.step, status)
        return status

    def warm_up(self) -> None:
        """A step that leaves no trace, before training begins: to compile what it computes, or fall back.

        DistributedDataParallel adds gradients up in one order in its first step and in another from then on.
        """
        if not (compiling := isinstance(self.forward, CompiledOrEager)) and not distributed.is_distributed():
            return
        state, inputs = tree_to(self.state_dict()), self.next_inputs(sgld_steps=1)[0]
        if compiling:
            averaging, self.joint_forward = self.joint_forward, JointForward(self.model, self.forward)
            with distributed.working_alone():  # it may fail in one process alone
                self.forward.prove(lambda _: self.backward(inputs))
            self.joint_forward = averaging
            if distributed.all_reduce_max(not self.forward.works)[0]:
                self.forward.give_up()
        if distributed.is_distributed():
            self.backward(inputs)
        self.load_state_dict(state)

    def loop(self, signals: Signals) -> int:
        cfg = self.cfg
        save_every = self.steps_per_epoch * math.ceil(MIN_EPOCH / self.steps_per_epoch)
        eval_every, quality_every = (
            max(save_every, n_epochs * self.steps_per_epoch) for n_epochs in (cfg.eval_every, cfg.quality_every)
        )
        while self.step < self.total_steps:
            self.step += 1
            self.host_copy = None
            samples = self.training_step()
            step, last = self.step, self.step == self.total_steps
            log = step % LOG_EVERY == 0 or last
            asked, status = distributed.all_reduce_max(
                *signals.take()
            )  # a signal that comes later is for the next step
            save = asked or step % save_every == 0 or step % cfg.ckpt_every == 0 or last
            self.record.advance()

            evaluates = step % eval_every == 0 or last
            measures = self.quality and (step % quality_every == 0 or last)
            if (log or save or evaluates or measures) and distributed.all_reduce_sum(
                self.diverged.int()
            ).item():  # waits for it
                self.recover()
                if status:
                    return status
                continue
            if evaluates or measures or save:
                self.recalibrate_ema()
            values = self.measurements() if log else {}
            if step % divergence.STATE_EVERY == 0:
                self.keep_state()
            if self.sampler and (step - 1) % cfg.sample_every == 0:
                self.dump_samples(samples)
            if self.sampler and step > 1 and (step - 1) % cfg.gif_every == 0:
                self.dump_gif()
            found = (self.evaluate() if evaluates else {}) | (self.measure_quality() if measures else {})
            if found:
                self.record.evaluated(step, self.epoch, found)
                values |= {"epoch": self.epoch} | found
            if values:
                self.record.values(step, values)
            for name, (measured, sign) in BEST.items():
                value = sign * values.get(measured, -sign * math.inf)
                if value > self.best.get(name, -math.inf):
                    self.best[name] = value
                    self.checkpoint(name)
            if save:
                self.checkpoint("last.pt")
                if status and not last:
                    return status
            if evaluates:
                self.record.curves()
            self.record.start_clock(step)
        return 0

    def training_step(self) -> Tensor | None:
        """One update; returns the negative samples (N, C, H, W), or None. Never waits for the device."""
        cfg = self.cfg
        inputs, measured = self.next_inputs(self.sgld_step * self.recovery.remedies["sgld_step_factor"])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        parts = self.optimizer.step(lambda: self.gradient(inputs))
        if self.ema:
            update_ema(self.ema, self.model, cfg.ema, self.step)

        healthy = parts["loss/total"].isfinite() & parts["gradient_norm"].isfinite()
        if self.sampler:
            healthy &= parts["loss/generative"].abs() < cfg.diverge_threshold
        self.diverged |= ~healthy
        self.meter.add(parts | measured)
        return inputs.samples

    def next_inputs(self, sgld_steps: int) -> tuple[StepBatch, dict[str, Tensor]]:
        """The images of a step, and what the log says of the chains."""
        cfg = self.cfg
        x, y = self.batches.next()
        x_real = self.real_batches.next()[0] if self.real_batches else None
        if cfg.adversarial_eps:  # in evaluation mode: neither dropout nor the batch hides a direction
            if self.sampler and x_real is None:
                x_real = x  # log p(x) learns from the images themselves
            radius = 2 * cfg.adversarial_eps  # pixels in [-1, 1]
            with evaluation_mode(self.model), utils.autocast(self.device, self.dtype):
                x = adversarial_images(self.model.logits, x, y, radius, cfg.adversarial_norm, cfg.adversarial_steps)
        if not self.sampler:
            return StepBatch(x, y, x_real, None, None), {}
        copy_weights(self.model, self.sampler_model)
        samples, y_sampled, measured = self.sampler(cfg.n_chains // self.world.size, sgld_steps, cfg.class_cond)
        return StepBatch(x, y, x_real, samples, y_sampled), measured

    def gradient(self, inputs: StepBatch) -> dict[str, Tensor]:
        """``backward``, on a GPU as a CUDA graph: one for each of SAM's passes, if the second keeps no statistics."""
        if not self.captured:
            return self.backward(inputs)
        return self.captured(self.backward, inputs, tracks_running_stats(self.model))

    def backward(self, inputs: StepBatch) -> dict[str, Tensor]:
        """The loss's gradient in the parameters, left in their ``grad``; returns the loss and its parts."""
        x, y, x_real, samples, y_sampled = inputs
        with utils.autocast(self.device, self.dtype):
            logits, logits_real, logits_sampled = self.joint_forward(x, x_real, samples)
        weights = Weights.of(self.cfg, self.recovery.remedies["energy_l2"])
        if x_real is None:
            logits_real = logits
        loss, parts = joint_loss(
            logits, y, logits_real, logits_sampled, y_sampled, weights, distributed.all_reduce_mean
        )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.world.size > 1:  # before SAM's next pass, where DistributedDataParallel spreads those of rank 0
            average_running_stats(self.model)
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        return parts | {"gradient_norm": gradient_norm}

    @property
    def lr(self) -> float:
        factor = self.recovery.remedies["lr_factor"]
        return factor * scheduled_rate(self.cfg, self.step, self.steps_per_epoch, self.cycle_ends)

    @property
    def epoch(self) -> float:
        return self.step / self.steps_per_epoch

    def recalibrate_ema(self) -> None:
        """Averaged weights, if there are any, get running statistics of their own: before they are used or saved."""
        if self.ema:
            recalibrate_batch_norm(self.ema, self.data.train.images, self.dtype)

    @property
    def eval_model(self):
        """The weights that evaluation and GIF chains use: the averaged ones, if there are any."""
        return self.ema or self.model

    def seed_generators(self, seed: int, own_alone: bool = False) -> None:
        """``own_alone``: only the generators that differ between processes."""
        seeds = {"sgld": 2 * seed + 1 + FAR * self.world.rank}
        seeds |= {} if own_alone else {"data": 2 * seed, "p_x": 2**31 + seed}
        for name, value in seeds.items():
            self.rng[name].manual_seed(value)
        torch.manual_seed(seed + FAR * self.world.rank)  # dropout's
        if self.sampler:
            self.sampler.reseed()

    def state_dict(self) -> dict[str, Any]:
        """Whatever changes the next step."""
        rng = {name: generator.get_state() for name, generator in self.rng.items()}
        rng["torch"] = torch.get_rng_state()  # dropout's
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"step": self.step, "best": self.best, "cycle_ends": self.cycle_ends, "sgld_step": self.sgld_step}
        return state | {"rng": rng}

    @property
    def parts(self) -> dict[str, Any]:
        """What has a state of its own, by its name in a checkpoint."""
        parts = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "batches": self.batches}
        parts |= {"real_batches": self.real_batches, "meter": self.meter, "recovery": self.recovery}
        if self.sampler:
            parts |= {"buffer": self.sampler.buffer, "sampler": self.sampler}
        return {name: part for name, part in parts.items() if part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the moment of a ``state_dict``; ``state`` is left as it is and may be on another device."""
        self.step, self.best, self.cycle_ends = state["step"], dict(state["best"]), list(state["cycle_ends"])
        self.sgld_step = state["sgld_step"]
        for name, part in self.parts.items():
            part.load_state_dict(tree_to(state[name], self.device))  # some of them keep the tensors they get
        rng = tree_to(state["rng"], torch.device("cpu"))  # where generators of all devices take their states from
        try:
            for name, generator in self.rng.items():
                generator.set_state(rng[name])
        except RuntimeError:
            print(f"The run goes on with new randomness: it was on another kind of device than {self.device.type}.")
            self.seed_generators(self.cfg.seed + self.step)
        torch.set_rng_state(rng["torch"])
        if "cuda" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.diverged.fill_(False)
        if self.captured:
            self.captured.graphs.clear()  # a remedy may have changed the loss

    def resume(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state. A run that was made longer gets another cycle of its learning rate.

        With another number of processes each gets another part of the replay buffer, and new randomness.
        """
        n_before = len(state.get("processes", [None]))
        self.load_state_dict(shard_state(state, self.world))
        if n_before != self.world.size:
            print(
                f"The run had {n_before} processes and goes on with {self.world.size}: the replay buffer is "
                "divided again, and the chains have new randomness."
            )
            self.seed_generators(self.cfg.seed + self.step, own_alone=True)
        if self.total_steps > self.cycle_ends[-1]:
            self.cycle_ends.append(self.total_steps)

    def state_on_host(self) -> dict[str, Any]:
        """A copy of the state on the CPU, made once a step."""
        if self.host_copy is None:
            self.host_copy = tree_to(self.state_dict(), torch.device("cpu"))
        return self.host_copy | {"best": dict(self.best)}

    def keep_state(self) -> None:
        """In memory, as one that training can go back to."""
        where = state_device(self.device, self.state_dict())
        on_host = where.type == "cpu"
        self.recovery.keep(self.state_on_host() if on_host else tree_to(self.state_dict(), where))

    def load_weights(self, path: Path, content: dict[str, Any]) -> None:
        """Start from another run's weights (the averaged ones, if it has them) and, where it fits, its buffer."""
        load_weights(self.model, self.cfg, path, content)
        if self.ema:
            self.ema.load_state_dict(self.model.state_dict())
        kind = "averaged weights" if "ema" in content["state"] else "weights"
        step = content["state"]["step"]
        print(f"Starting from the {kind} of {path}" + (f", step {step}." if step is not None else "."))
        if self.sampler and "buffer" in content["state"]:
            stored = shard_buffer(content["state"]["buffer"], self.world)
            if stored["images"].shape == self.sampler.buffer.images.shape:
                self.sampler.buffer.load_state_dict(stored)
            else:
                print("The checkpoint's replay buffer has another size: starting with a fresh one.")

    def checkpoint(self, name: str) -> None:
        state = self.state_on_host()
        if name != "last.pt":  # to measure and to sample from; training is resumed from last.pt
            state = {part: state[part] for part in ("step", "model", "ema") if part in state}
        elif self.world.size > 1:
            state = gather_state(state)
        about = {"time": time.time(), "total_steps": self.total_steps}  # by which --resume auto chooses among runs
        self.record.checkpoint(
            name, {"config": asdict(self.cfg), "data": self.data.description, "state": state} | about
        )

    def recover(self) -> None:
        """Training diverged: go back to the last proven state with new randomness and, perhaps, gentler settings."""
        diverged_at = self.step
        state, change = self.recovery.go_back(diverged_at)
        self.load_state_dict(state | {"recovery": self.recovery.state_dict(), "best": self.best})
        self.host_copy = None
        self.seed_generators(self.cfg.seed + 1_000_003 * self.recovery.recoveries)
        self.record.recovery(diverged_at, self.step, change)
        self.recalibrate_ema()
        self.checkpoint("last.pt")  # the one on disk may be of a later step, on the way to the divergence

    def measurements(self) -> dict[str, float | list[int]]:
        """Means over the steps since the last call, where training stands, longer chains. Waits for the device."""
        values, speed = self.meter.read(), self.record.speed(self.step)
        if self.sampler:
            values["sgld/steps"] = self.sgld_step * self.recovery.remedies["sgld_step_factor"]
            longest = self.cfg.sgld_step_max or 0
            if self.sgld_step < longest and values["sgld/auroc"] > self.cfg.sgld_step_auroc:
                self.sgld_step += 1  # samples lag behind: from the next step on
        self.record.show(speed, values)
        return values | {"epoch": self.epoch, "lr": self.lr, "speed/images_per_second": speed}

    def dump_samples(self, samples: Tensor) -> None:
        """The first of this step's chains; a smaller batch is filled up from the (process's) replay buffer."""
        self.record.samples(self.step, torch.cat([samples, self.sampler.buffer.images[:SHOWN]])[:SHOWN])

    def dump_gif(self) -> None:
        """A long annealed chain of 16 fresh images; its randomness is its own and leaves training alone."""
        rng = torch.Generator(self.device).manual_seed(self.cfg.seed + self.step)
        copy_weights(self.eval_model, self.sampler_model)
        x = self.start([i % len(self.data.class_names) for i in range(16)], rng)
        frames = annealed_chain(self.film, x, self.cfg.sgld_lr, self.cfg.sgld_std, rng, every=FRAME_EVERY)
        self.record.film(self.step, frames, FRAME_EVERY)

    def measure_quality(self) -> dict[str, float]:
        """How far samples are from training images; their randomness is their own and leaves training alone."""
        rng = torch.Generator(self.device).manual_seed(self.cfg.seed + self.step)
        copy_weights(self.eval_model, self.sampler_model)
        return self.quality(self.film, self.sampler.buffer.images, rng)

    def evaluate(self) -> dict[str, float]:
        """Validation and test accuracy."""
        if not self.cfg.classifies:
            return {}
        model, splits = self.eval_model, {"accuracy/valid": self.data.valid, "accuracy/test": self.data.test}
        return {name: accuracy(model, split, self.dtype) for name, split in splits.items() if len(split)}
