"""The training loop, and what it dumps; ``baseline_train`` leaves out everything about samples."""

import copy
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import distributed
import divergence
import utils
from acceleration import CompiledOrEager, CUDAGraphBackward, compiles
from chain_init import build_chain_init
from checkpoints.files import save_checkpoint
from checkpoints.load import build_for, load_weights, same_classes
from checkpoints.resume import gather_state, shard_state
from config import Config
from config.checks import check_sizes
from distributed import World
from divergence import Recovery
from evaluation.fid import SampleQuality
from logger.meter import Meter
from logger.progress import announce, check_memory, compiled
from logger.run_dir import RunDir, read_config
from logger.run_logger import RunLogger
from losses import joint_loss
from models import JointForward, StepBatch, copy_weights, frozen_sampler_model
from models.batch_norm import average_running_stats, convert_sync_batchnorm
from models.predict import accuracy, evaluation_mode
from optim import build_optimizer, learning_rate, recalibrate_batch_norm, update_ema
from pgd import adversarial_images, pgd
from sgld import SGLD, ReplayBuffer, Sampler, annealed_chain, chain_options
from utils import Generators, Signals, tree_to

MIN_EPOCH = 50  # steps; of shorter epochs, not each ends with an evaluation and a checkpoint
LOG_EVERY = 10  # steps; besides pictures, only then do host and device regularly synchronise, and chains grow
FRAME_EVERY = 10  # SGLD steps between the frames of a GIF; noise does not compress, 31 frames of 32x32 take 1.4 MB
SHOWN = 64  # samples in a grid


class Trainer:
    """One run: everything that changes from step to step, and the loop that changes it.

    Of several processes, each has its part of every batch and of the replay buffer; the rest is the same in all.
    """

    def __init__(self, cfg: Config, images: data.ImageData, device: torch.device, world: World = data.ALONE):
        self.cfg, self.data, self.device, self.world = cfg, images, device, world
        self.n_classes, self.dtype = len(images.class_names), utils.pick_dtype(cfg.precision, device)
        self.rng = Generators(device, world.rank)
        self.build_batches()
        self.chain_init = build_chain_init(cfg, images) if cfg.draws_samples else None
        self.outlier_init = build_chain_init(cfg, images, cfg.outlier_shares) if cfg.outlier_shares else None
        measures = cfg.draws_samples and cfg.quality_every
        self.quality = SampleQuality(cfg, images, self.chain_init, device) if measures else None
        torch.manual_seed(cfg.seed)  # weights are the same in all processes; what is drawn after them is not
        self.build_model()
        self.rng.seed(cfg.seed)  # before the first replay buffer is drawn
        self.buffer = self.sampler = None
        check_memory(self)
        if cfg.draws_samples:
            self.build_sampler()
        self.recovery, self.meter = Recovery(cfg), Meter()
        names = ("model", "ema", "optimizer", "batches", "real_batches", "meter", "recovery", "buffer")
        self.saved = {name: getattr(self, name) for name in names if getattr(self, name) is not None}  # in checkpoints
        self.step, self.best, self.sgld_step = 0, {}, cfg.sgld_step
        self.diverged = torch.zeros((), dtype=torch.bool, device=device)  # set by a step, read in ``loop`` now and then

    def build_batches(self) -> None:
        cfg, images, world = self.cfg, self.data, self.world
        labelled = data.some_of_each_class(images.train, cfg.labels_per_class, self.n_classes)
        counts = labelled.labels.to(self.device).bincount(minlength=self.n_classes)
        self.class_weights = counts * self.n_classes / len(labelled)  # 1 where classes are of one size
        n_images = {"batch_size": len(labelled)}  # by the option that is the batch's size
        if cfg.separate_p_x:
            n_images["p_x_batch_size"] = len(images.train)
        check_sizes(cfg, n_images, self.n_classes, world.size, images.shape)
        flip = images.flip and not cfg.no_flip
        self.batches = data.Batches(labelled, cfg.batch_size, flip, cfg.sigma, self.rng.data, cfg.augment, world)
        self.steps_per_epoch = len(labelled) // cfg.batch_size
        self.real_batches = None
        if cfg.separate_p_x:
            augment = "none" if cfg.p_x_no_augment else "black" if cfg.augment == "auto" else "crop"
            self.real_batches = data.Batches(images.train, cfg.n_chains, flip, cfg.sigma, self.rng.p_x, augment, world)
            if cfg.labels_per_class:  # few labels: an epoch is a pass over all images
                self.steps_per_epoch = len(images.train) // cfg.n_chains
        self.total_steps = min(cfg.epochs * self.steps_per_epoch, cfg.max_steps or math.inf)

    def build_model(self) -> None:
        cfg = self.cfg
        self.synced = cfg.sync_batch_norm and self.world.size > 1  # processes exchange numbers within the network
        self.compiles = compiles(cfg.compile, self.device, self.total_steps) and not self.synced
        self.model = build_for(cfg, self.data.shape, self.n_classes).to(self.device)
        self.model.dtype = self.dtype
        if self.synced:
            convert_sync_batchnorm(self.model)
        self.forward = CompiledOrEager(self.model.logits) if self.compiles else self.model.logits
        statistics, on_gpu = cfg.norm_statistics if cfg.draws_samples else "batch", self.device.type == "cuda"
        self.one_process_forward = JointForward(self.model, self.forward, statistics)
        self.joint_forward = self.one_process_forward
        if distributed.is_distributed():  # gradients become means over all processes
            self.joint_forward = DistributedDataParallel(self.joint_forward, [self.device] if on_gpu else None)
        self.cuda_graphs = CUDAGraphBackward(self.model) if on_gpu and not distributed.is_distributed() else None
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False) if cfg.ema else None
        self.eval_model = self.model if self.ema is None else self.ema  # whose samples and accuracy are measured
        self.optimizer = build_optimizer(cfg, self.model)

    def build_sampler(self) -> None:
        cfg, rng, init = self.cfg, self.rng, self.chain_init
        self.sampler_model = frozen_sampler_model(self.model, self.dtype, cfg.norm_statistics)
        options = chain_options(cfg) | {"capture": not self.synced}
        engine = SGLD(self.sampler_model.log_density, **options, compile=self.compiles)
        self.buffer = buffer = ReplayBuffer(cfg.buffer_size // self.world.size, self.n_classes, init, rng.sgld)
        self.sampler = Sampler(engine, buffer, init, cfg.reinit_freq, cfg.sgld_lr, cfg.sgld_std, rng.sgld, rng.host)
        self.gif_engine = SGLD(self.sampler_model.log_density, **options)  # one chain in 500 steps: not compiled

    def train(self, run: RunDir, log_position: int = 0) -> int:
        """Run from byte ``log_position`` of metrics.jsonl on; returns the exit status, 128 + the number of a signal."""
        self.warm_up()
        precision = str(self.dtype).removeprefix("torch.")
        how = {"precision": precision, "compiled": compiled(self.forward, self.sampler), "processes": self.world.size}
        config = read_config(run.path)  # of a run that is resumed
        earlier = [*config.get("environments_before", []), config["environment"]] if "environment" in config else []
        announce(self, run.path, how, config.get("environment", how))
        written = run if self.world.rank == 0 else None
        if written:
            now = utils.environment(self.device) | how
            run.write_config(self.cfg, now, data=self.data.description, environments_before=earlier)
        self.logger = RunLogger(written, self.cfg, self.step, self.total_steps, log_position)
        with Signals() as signals:
            with self.logger:
                self.recovery.keep(tree_to(self.state_dict(), "cpu"))
                if self.step == 0:
                    self.checkpoint("last.pt")
                status = self.loop(signals)
            distributed.all_reduce_max(0)  # when one process ends, torchrun stops the others
        self.logger.end(self.step, status)
        return status

    def warm_up(self) -> None:
        """Compile, and let DistributedDataParallel choose its order of adding, in a first step that is then undone."""
        if not (self.compiles or distributed.is_distributed()):
            return
        state = tree_to(self.state_dict())
        batch, _ = self.draw_step_batch(chain_length=1)  # a chain compiles itself
        if self.compiles:
            try:  # without joint_forward, in which processes would wait for each other
                logits = self.one_process_forward(batch)
                sum(part.sum() for part in logits if part is not None).backward()
            except Exception as error:  # the compiler's exceptions share no public base class
                self.forward.give_up(type(error).__name__)
        if distributed.is_distributed():
            self.loss_and_gradient(batch)  # the first adds gradients up in another order than all later ones
        self.load_state_dict(state)

    def loop(self, signals: Signals) -> int:
        """Steps to the end of the run or to a signal, and after each what is due; returns the exit status."""
        cfg = self.cfg
        save_every = self.steps_per_epoch * math.ceil(MIN_EPOCH / self.steps_per_epoch)
        eval_every = max(save_every, cfg.eval_every * self.steps_per_epoch)
        quality_every = max(save_every, cfg.quality_every * self.steps_per_epoch)
        while self.step < self.total_steps:
            self.step += 1
            samples = self.training_step()
            asked, status = distributed.all_reduce_max(*signals.take())  # one that comes later is for the next step
            log = self.due(LOG_EVERY)
            evaluate = self.due(eval_every)
            measure = self.quality is not None and self.due(quality_every)
            save = asked or self.due(save_every) or self.due(cfg.ckpt_every)

            if (log or evaluate or measure or save) and distributed.all_reduce_sum(self.diverged.int()).item() > 0:
                self.recover()
                if status:
                    return status
                continue
            epoch, found = self.step / self.steps_per_epoch, {}
            values = self.measurements() if log else {}
            if "sgld/auroc" in values and self.step % LOG_EVERY == 0:  # a run's last step logs, too, but grows nothing
                self.grow_chains(values["sgld/auroc"])
            if evaluate or measure or save:
                self.recalibrate_ema()
            if self.step % divergence.STATE_EVERY == 0:
                self.recovery.keep(tree_to(self.state_dict(), "cpu"))
            if self.sampler is not None and (self.step - 1) % cfg.sample_every == 0:
                self.logger.save_samples(self.step, self.buffer.filled_up(samples[:SHOWN], SHOWN))
            if self.sampler is not None and self.step > 1 and (self.step - 1) % cfg.gif_every == 0:
                self.dump_gif()
            if evaluate:
                found |= self.evaluate()
            if measure:
                found |= self.measure_quality()
            if values or found:
                self.logger.log_values(self.step, values, found, epoch)
            if save:
                self.checkpoint("last.pt")
            if evaluate:
                self.logger.draw_curves()
            self.logger.advance(self.step)
            if status and self.step < self.total_steps:
                return status
        return 0

    def grow_chains(self, auroc: float) -> None:
        """One SGLD step more, up to ``--sgld_step_max``, while the network tells real images from samples (DAT)."""
        longest = self.cfg.sgld_step_max
        if longest is not None and self.sgld_step < longest and auroc > self.cfg.sgld_step_auroc:
            self.sgld_step += 1

    def due(self, every: int) -> bool:
        """Whether this step is one of each ``every`` steps, or the last."""
        return self.step % every == 0 or self.step == self.total_steps

    def training_step(self) -> Tensor | None:
        """The update that ``self.step`` counts; returns the samples (N, C, H, W), or None.

        Synchronises with the device only for AutoAugment and for images on the host.
        """
        batch, chain_values = self.draw_step_batch(self.chain_length)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

        def closure(update_statistics: bool = True) -> dict[str, Tensor]:  # the optimizer calls it once, SAM twice
            if self.cuda_graphs is None:
                return self.loss_and_gradient(batch, update_statistics)
            return self.cuda_graphs(self.loss_and_gradient, batch, update_statistics)

        parts = self.optimizer.step(closure)  # what the closure returns
        if self.ema is not None:
            update_ema(self.ema, self.model, self.cfg.ema, self.step)

        healthy = parts["loss/total"].isfinite() & parts["gradient_norm"].isfinite()
        if self.sampler is not None:
            healthy &= parts["loss/generative"].abs() < self.cfg.diverge_threshold
        self.diverged |= ~healthy
        self.meter.add(parts | chain_values)
        return batch.samples

    def draw_step_batch(self, chain_length: int) -> tuple[StepBatch, dict[str, Tensor]]:
        """Draw the step's images and run its chains; also returns what the log says of the chains.

        The order matters: running statistics first, then the copy of the weights, then what climbs log p(x) of that
        copy, chains and outliers.
        """
        cfg = self.cfg
        x, y = self.batches.next()
        if self.real_batches is None:
            x_real, y_real = None, y  # None: log p(x) learns from x
        else:
            x_real, y_real = self.real_batches.next()
        if cfg.labels_per_class:
            y_real = None  # most of these labels may not be used
        adversarial = cfg.adversarial_eps > 0 and cfg.p_y_x_weight > 0
        classifier_differs = adversarial or self.one_process_forward.dropouts
        if self.sampler is not None and x_real is None and classifier_differs:
            x_real = x  # log p(x) learns from clean images, without dropout
        if adversarial:  # in evaluation mode: dropout and the batch's statistics would disturb the gradient
            attack = 2 * cfg.adversarial_eps, cfg.adversarial_norm, cfg.adversarial_steps  # pixels in [-1, 1]
            step_size = None if cfg.adversarial_step_size is None else 2 * cfg.adversarial_step_size
            with evaluation_mode(self.model):
                x = adversarial_images(self.model.logits, x, y, *attack, step_size=step_size)
        if self.sampler is None:
            return StepBatch(x, y, x_real, None), {}
        if self.one_process_forward.norm_statistics == "running":
            with torch.no_grad():
                self.model.logits(x)  # running statistics move on here, so that they are the same in chains and loss
            average_running_stats(self.model)  # and in all processes
        copy_weights(self.model, self.sampler_model)  # pictures and distances may have left averaged weights in it
        samples, y_sampled, measured = self.sampler(cfg.n_chains // self.world.size, chain_length, cfg.class_cond)
        outliers = None if self.outlier_init is None else self.draw_outliers()
        return StepBatch(x, y, x_real, samples, y_sampled=y_sampled, outliers=outliers, y_real=y_real), measured

    def draw_outliers(self) -> Tensor:
        """Images (Q, C, H, W) far from the data, moved to where the model finds them most likely nearby."""
        cfg = self.cfg
        x = self.outlier_init([i % self.n_classes for i in range(cfg.outlier_batch_size)], self.rng.p_x)
        x = x.chunk(self.world.size)[self.world.rank]  # this process's part, as of the real images
        if cfg.outlier_eps:
            x = pgd(lambda x: self.sampler_model.log_density(x).sum(), x, 2 * cfg.outlier_eps, "L2", cfg.outlier_steps)
        return x.contiguous(memory_format=torch.channels_last)

    def loss_and_gradient(self, batch: StepBatch, update_statistics: bool = True) -> dict[str, Tensor]:
        """Leaves the loss's gradient in the parameters' ``grad``; returns the loss and its parts."""
        logits = self.joint_forward(batch, update_statistics)
        classes = {"y_sampled": batch.y_sampled, "class_weights": self.class_weights, "y_real": batch.y_real}
        others = {"energy_l2": self.recovery.remedies["energy_l2"], "mean_over_processes": distributed.all_reduce_mean}
        loss, parts = joint_loss(self.cfg, logits, batch.y, **classes, **others)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_running_stats(self.model)  # before SAM's next pass, in which processes would get those of rank 0
        parameters = [p for p in self.model.parameters() if p.grad is not None]  # a network may leave some unused
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.cfg.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.cfg.grad_clip, gradient_norm)
        return {"loss/total": loss} | parts | {"gradient_norm": gradient_norm}

    @property
    def lr(self) -> float:
        rate = learning_rate(self.cfg, self.step, self.steps_per_epoch, self.total_steps)
        return rate * self.recovery.remedies["lr_factor"]

    @property
    def chain_length(self) -> int:
        return self.sgld_step * self.recovery.remedies["sgld_step_factor"]

    def recalibrate_ema(self) -> None:
        if self.ema is not None and self.one_process_forward.norm_statistics in ("batch", "running"):
            recalibrate_batch_norm(self.ema, self.data.train.images, self.cfg.batch_size // self.world.size)

    def state_dict(self) -> dict[str, Any]:
        """Whatever changes the next step."""
        state = {"step": self.step, "best": self.best, "sgld_step": self.sgld_step}
        return state | {name: part.state_dict() for name, part in self.saved.items()} | {"rng": self.rng.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the moment of a ``state_dict``; ``state`` is left as it is and may be on another device."""
        self.step, self.best, self.sgld_step = state["step"], dict(state["best"]), state["sgld_step"]
        for name, part in self.saved.items():
            part.load_state_dict(tree_to(state[name], self.device))  # some of them keep the tensors they get
        try:
            self.rng.load_state_dict(state["rng"])
        except RuntimeError:
            print(f"The run goes on with new randomness: it was on another kind of device than {self.device.type}.")
            self.rng.seed(self.cfg.seed + self.step)
        self.diverged.fill_(False)
        if self.cuda_graphs is not None:
            self.cuda_graphs.graphs.clear()  # a remedy may have changed the loss

    def resume(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        n_before = len(state.get("processes", [None]))
        self.load_state_dict(shard_state(state, self.world))
        if n_before != self.world.size:
            print(f"The run had {n_before} processes and goes on with {self.world.size}: it has new randomness.")
            self.rng.seed(self.cfg.seed + self.step)

    def load_weights(self, path: Path, content: dict[str, Any]) -> None:
        """Start from another run's weights (the averaged ones, if it has them) and, where it fits, its buffer.

        If these images have other classes, the head that makes logits of features, and the buffer, start anew.
        """
        new_head = not same_classes(content["data"], self.data)
        load_weights(self.model, self.cfg, path, content, new_head)
        if self.ema is not None:
            self.ema.load_state_dict(self.model.state_dict())
        print(f"Starting from the {'averaged ' if 'ema' in content['state'] else ''}weights of {path}.")
        if new_head:
            print("Its classes are others: the last layer and the replay buffer start anew.")
        elif self.buffer is not None and "buffer" in content["state"]:
            stored = shard_state({"buffer": content["state"]["buffer"]}, self.world)["buffer"]
            by_class = content["config"].get("class_cond", False) or not self.cfg.class_cond
            if by_class and stored["images"].shape == self.buffer.images.shape:
                finite = stored["images"].isfinite().all(dim=(1, 2, 3), keepdim=True)  # another program's may not be
                images = torch.where(finite, stored["images"], self.buffer.images.cpu())
                self.buffer.load_state_dict(stored | {"images": images})
            else:
                print("The checkpoint's replay buffer has another size, or no classes: starting with a fresh one.")

    def checkpoint(self, name: str) -> None:
        state = self.state_dict()
        if name != "last.pt":  # to measure and to sample from; training is resumed from last.pt
            state = {part: state[part] for part in ("step", "model", "ema", "recovery") if part in state}
        state = tree_to(state, "cpu")
        if name == "last.pt" and self.world.size > 1:
            state = gather_state(state)
        about = {"time": time.time(), "total_steps": self.total_steps}  # by which --resume auto chooses among runs
        about |= {"processes": self.world.size, "config": asdict(self.cfg), "data": self.data.description}
        self.logger.checkpoint(save_checkpoint, name, about | {"state": state})

    def recover(self) -> None:
        """Training diverged: go back to the last proven state with new randomness and, perhaps, gentler settings."""
        diverged_at = self.step
        state, change = self.recovery.go_back(diverged_at)
        self.load_state_dict(state | {"recovery": self.recovery.state_dict(), "best": self.best})
        self.rng.seed(self.cfg.seed + 1_000_003 * self.recovery.recoveries)
        self.logger.log_recovery(diverged_at, self.step, change)
        self.recalibrate_ema()
        self.checkpoint("last.pt")  # the one on disk may be of a later step, on the way to the divergence

    def measurements(self) -> dict[str, float | list[int]]:
        """Means over the steps since the last call, and where training stands. Synchronises with the device."""
        values = self.meter.read() | ({} if self.sampler is None else {"sgld/steps": self.chain_length})
        return values | {"lr": self.lr, "speed/images_per_second": self.logger.take_speed(self.step)}

    def dump_gif(self) -> None:
        """A long annealed chain of 16 fresh images; its randomness is its own and does not change training."""
        rng = torch.Generator(self.device).manual_seed(self.cfg.seed + self.step)
        if self.one_process_forward.norm_statistics == "running":
            self.recalibrate_ema()
        copy_weights(self.eval_model, self.sampler_model)
        cfg, classes = self.cfg, [i % self.n_classes for i in range(16)]
        y = torch.tensor(classes, device=self.device) if cfg.class_cond else None
        x = self.chain_init(classes, rng)
        film = annealed_chain(self.gif_engine, x, cfg.sgld_lr, cfg.sgld_std, rng, FRAME_EVERY, y)
        self.logger.save_gif(self.step, film, FRAME_EVERY)

    def evaluate(self) -> dict[str, float]:
        """Validation and test accuracy; best.pt is chosen by the first, never by the second."""
        splits = {"accuracy/valid": self.data.valid, "accuracy/test": self.data.test} if self.cfg.classifies else {}
        found = {name: accuracy(self.eval_model, split) for name, split in splits.items() if len(split)}
        if "accuracy/valid" in found:
            self.keep_if_best("best.pt", found["accuracy/valid"])
        return found

    def measure_quality(self) -> dict[str, float]:
        """How far samples are from training images; their randomness is their own and does not change training."""
        rng = torch.Generator(self.device).manual_seed(self.cfg.seed + self.step)
        copy_weights(self.eval_model, self.sampler_model)
        found = self.quality(self.sampler_model, self.buffer.images, rng)
        self.keep_if_best("best_quality.pt", -found["quality/fresh_samples"])
        return found

    def keep_if_best(self, name: str, score: float) -> None:
        """Write the checkpoint ``name`` if no evaluation before had so high a score."""
        if score > self.best.get(name, -math.inf):
            self.best[name] = score
            self.checkpoint(name)
