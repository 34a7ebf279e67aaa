"""JEM: a classifier read as an energy-based model (Grathwohl et al., ICLR 2020)."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.batch_norm import batch_norms, no_running_stats_update
from models.wide_resnet import WideResNet


class JEM(nn.Module):
    """A classifier whose logits are also unnormalised log-densities (section 3, equations 4 to 7).

    Images are float tensors (N, C, H, W) in [-1, 1], labels int64 (N,). With ``separate_energy`` log p(x) comes from a
    linear head of its own (M-JEM): the same number is added to all logits of an image, so that their logsumexp is the
    output of that head. This leaves p(y|x) as it is, so that log p(x, y) = log p(y|x) + log p(x) holds as without.
    """

    def __init__(self, backbone: WideResNet, n_classes: int, separate_energy: bool = False):
        super().__init__()
        self.f = backbone
        self.class_output = nn.Linear(backbone.n_features, n_classes)
        self.energy_output = nn.Linear(backbone.n_features, 1) if separate_energy else None

    def logits(self, x: Tensor) -> Tensor:
        """f(x), float32 (N, K): log p(x, y) up to one constant, and log p(y|x) up to one for each image."""
        features = self.f(x)
        # In bf16 a log-density of 100 has a resolution of half a nat, so the head stays in float32.
        with torch.autocast(x.device.type, enabled=False):
            features = features.float()
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


class JointForward(nn.Module):
    """The logits of all images of a training step in one call, which is what DistributedDataParallel wraps."""

    def __init__(self, model: JEM, logits: Callable[[Tensor], Tensor]):
        """``logits``: ``model.logits``, or the same compiled."""
        super().__init__()
        self.model, self.one = model, logits

    def forward(self, x: Tensor, x_real: Tensor | None, samples: Tensor | None) -> list[Tensor | None]:
        """Logits (N, K) of labelled images, other real ones and samples, in one forward pass where that is the same.

        Batch normalisation must not mix them, and keeps the running statistics of real images alone.
        """
        if batch_norms(self.model):
            logits = [None if view is None else self.one(view) for view in (x, x_real)]
            with no_running_stats_update(self.model):
                return [*logits, None if samples is None else self.one(samples)]
        views = (x, x_real, samples)
        given = [view for view in views if view is not None]
        logits = iter(self.one(torch.cat(given)).split([len(view) for view in given]))
        return [None if view is None else next(logits) for view in views]


def frozen_sampler_model(model: JEM, dtype: torch.dtype) -> JEM:
    """A frozen copy that sees images as the loss does, whose backbone computes in ``dtype`` and its head in float32.

    Dropout is off; batch normalisation uses each batch's own statistics and keeps none, so that chains climb the
    function that the loss scores. Chains run on this copy, so that sampling touches neither the mode nor the flags of
    the model in training, casts the weights once a step instead of once a layer and SGLD step, and finds them at
    addresses that never change.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    frozen.f.to(dtype)
    for module in batch_norms(frozen):
        module.float().train()  # its statistics need more than bf16's 8 bits; the layer takes bf16 images all the same
        module.track_running_stats = False
    return frozen


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in place, casting to the target's types."""
    pairs = list(zip(target.state_dict().values(), source.state_dict().values(), strict=True))
    for dtype in {to.dtype for to, _ in pairs}:  # a list of one type is copied by one kernel
        torch._foreach_copy_(*zip(*(pair for pair in pairs if pair[0].dtype == dtype), strict=True))
