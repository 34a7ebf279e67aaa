"""JEM: a classifier read as an energy-based model (Grathwohl et al., ICLR 2020)."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from models.batch_norm import attribute_set, batch_norms, running_stats_only, running_stats_update
from utils import UserError


class JEM(nn.Module):
    """A classifier whose logits are also unnormalised log-densities (section 3, equations 4 to 7).

    Images are float tensors (N, C, H, W) in [-1, 1], labels int64 (N,). With ``separate_energy`` log p(x) comes from a
    linear head of its own (M-JEM): the same number is added to all logits of an image, so that their logsumexp is the
    output of that head. This leaves p(y|x) as it is, so that log p(x, y) = log p(y|x) + log p(x) holds as without.

    The backbone ``f`` maps float32 images to features (N, n_features), in float32 or under autocast. It has the
    attributes ``in_channels``, ``n_features`` and ``name``, and raises UserError for what it cannot be built for. A
    function ``initialise(layer)`` of it, if there is one, gives each layer of the network its first weights.
    """

    def __init__(self, backbone: nn.Module, n_classes: int, separate_energy: bool = False):
        super().__init__()
        self.f = backbone
        self.class_output = nn.Linear(backbone.n_features, n_classes)
        self.energy_output = nn.Linear(backbone.n_features, 1) if separate_energy else None
        self.in_channels, self.n_classes, self.name = backbone.in_channels, n_classes, backbone.name
        self.dtype = torch.float32  # in which the backbone computes (torch.autocast)

    def logits(self, x: Tensor) -> Tensor:
        """f(x), float32 (N, K): log p(x, y) up to one constant, and log p(y|x) up to one for each image.

        Raises UserError for images that are not float: uint8 would give numbers that mean nothing.
        """
        if not x.is_floating_point():
            raise UserError(f"the network takes float images in [-1, 1], not {x.dtype}: data.to_float makes them")
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype != torch.float32):
            features = self.f(x).float()  # in bf16 a log-density of 100 has a resolution of half a nat
        logits = self.class_output(features)
        if self.energy_output is None:
            return logits
        return logits + self.energy_output(features) - logits.logsumexp(1, keepdim=True)

    forward = logits

    def log_density(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Unnormalised log p(x) = logsumexp_y f(x)[y], or with labels log p(x, y) = f(x)[y]; (N,), in nats."""
        return log_density(self.logits(x), y)


def log_density(logits: Tensor, y: Tensor | None = None) -> Tensor:
    """What ``JEM.log_density`` returns, from logits (N, K) at hand."""
    return logits.logsumexp(1) if y is None else logits.gather(1, y[:, None]).squeeze(1)


class StepBatch(NamedTuple):
    """The images of a training step, float32 (N, C, H, W), each kind of its own N, and their classes, int64 (N,)."""

    x: Tensor  # labelled
    y: Tensor
    x_real: Tensor | None  # for log p(x); None: the labelled ones
    samples: Tensor | None
    y_sampled: Tensor | None = None  # with --class_cond
    outliers: Tensor | None = None
    y_real: Tensor | None = None  # where these labels may be used


class Logits(NamedTuple):
    """Logits of a training step's images, float32 (N, K), each of its own N."""

    labelled: Tensor
    real: Tensor  # of log p(x): those of the labelled images where there are no others
    sampled: Tensor | None = None
    outliers: Tensor | None = None


class JointForward(nn.Module):
    """The logits of all images of a training step in one call, which is what DistributedDataParallel wraps."""

    def __init__(self, model: JEM, logits: Callable[[Tensor], Tensor], norm_statistics: str = "batch"):
        """``logits``: ``model.logits``, or the same compiled. ``norm_statistics``: the option of that name."""
        super().__init__()
        self.model, self.logits = model, logits
        self.dropouts = [layer for layer in model.modules() if isinstance(layer, _DropoutNd) and layer.p > 0]
        self.dropouts += [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) and m.dropout > 0]
        self.norm_statistics = norm_statistics if batch_norms(model) else "none"

    def forward(self, batch: StepBatch, update_statistics: bool = True) -> Logits:
        """Logits of all images of the batch.

        Where batch normalisation uses a batch's own statistics, that batch goes through the network separately. With
        ``update_statistics`` its running statistics follow such batches of real images; but where log p(x) is on
        running statistics, these stay what they were for the chains: see ``Trainer.draw_step_batch``. Dropout acts on
        labelled images only: chains are without, and log p(x) must be one function.
        """
        x, x_real, samples, outliers = batch.x, batch.x_real, batch.samples, batch.outliers
        if self.norm_statistics == "batch":
            with running_stats_update(self.model, enabled=update_statistics):
                labelled = self.logits(x)
                with self.without_dropout():
                    real = labelled if x_real is None else self.logits(x_real)
            with running_stats_update(self.model, enabled=False), self.without_dropout():
                of_samples = None if samples is None else self.logits(samples)
                of_outliers = None if outliers is None else self.logits(outliers)
            return Logits(labelled, real, of_samples, of_outliers)
        if self.norm_statistics == "running":  # the classifier by its batch, log p(x) by running statistics
            with running_stats_update(self.model, enabled=False):
                labelled = self.logits(x)
        elif self.dropouts and samples is not None:  # the classifier with dropout, log p(x) without
            with running_stats_only(self.model):
                labelled = self.logits(x)
        else:  # one function for all images, so one pass
            with running_stats_only(self.model):
                labelled, real, *others = self.in_one_pass(x, x_real, samples, outliers)
            return Logits(labelled, labelled if x_real is None else real, *others)
        with running_stats_only(self.model), self.without_dropout():
            return Logits(labelled, *self.in_one_pass(x if x_real is None else x_real, samples, outliers))

    def without_dropout(self) -> AbstractContextManager[None]:
        return attribute_set(self.dropouts, "training", False)

    def in_one_pass(self, *batches: Tensor | None) -> list[Tensor | None]:
        """The logits of each batch, or None for None."""
        sizes = [len(images) for images in batches if images is not None]
        parts = iter(self.logits(torch.cat([images for images in batches if images is not None])).split(sizes))
        return [None if images is None else next(parts) for images in batches]


def frozen_sampler_model(model: JEM, dtype: torch.dtype, norm_statistics: str = "batch") -> JEM:
    """A frozen copy that sees images as the loss does, whose backbone computes in ``dtype`` and its head in float32.

    Dropout is off; batch normalisation uses each batch's own statistics and keeps none, or (``norm_statistics`` other
    than "batch") the running ones, so that chains climb the function that the loss scores. A copy casts the weights
    once a training step instead of once an SGLD step, and has them at addresses that never change.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.dtype = dtype
    for layer in frozen.f.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):  # what autocast casts; all else stays as it is in the loss
            layer.to(dtype)
    for layer in batch_norms(frozen):
        layer.train(norm_statistics == "batch")
        layer.track_running_stats = False
    return frozen


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in place, casting to the target's types."""
    old, new = list(target.state_dict().values()), list(source.state_dict().values())
    for dtype in {tensor.dtype for tensor in old}:  # one kernel copies a list of one type
        same = [i for i, tensor in enumerate(old) if tensor.dtype == dtype]
        torch._foreach_copy_([old[i] for i in same], [new[i] for i in same])
