"""How far the probability of a prediction is the share of right ones, before and after temperature scaling."""

import math

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from evaluation.inputs import EvalInputs
from evaluation.report import Section
from models.predict import predict

needs_labels = True
BINS = 20  # of confidence, equally wide: the habit of JEM's family


def measure(inputs: EvalInputs, section: Section) -> None:
    test, valid = inputs.subset(inputs.data.test), inputs.subset(inputs.data.valid)
    logits = predict(inputs.model, inputs.with_noise(test.images))
    scaled = {"as trained": 1.0}
    if len(valid):
        temperature = fit_temperature(predict(inputs.model, inputs.with_noise(valid.images)), valid.labels)
        scaled["temperature-scaled"] = temperature
        protocol = f"minimises the cross-entropy on validation images, {inputs.noise_protocol}"
        section.add("temperature", temperature, len(valid), protocol)
    else:
        section.add_absent("temperature scaling", "there are no validation images of the training")
    protocol = f"test images, {inputs.noise_protocol}"
    bins = f"{protocol}; {BINS} equally wide bins of the largest probability, torchmetrics; above 0 by chance alone"
    figure = Figure(figsize=(5 * len(scaled), 5.5), layout="constrained")
    panels = figure.subplots(2, len(scaled), height_ratios=(3, 1), sharex=True, squeeze=False)
    for (name, temperature), axes in zip(scaled.items(), panels.T, strict=True):
        p = (logits / temperature).softmax(1)
        ece, mce = calibration_errors(p, test.labels)
        brier = (p - F.one_hot(test.labels, p.shape[1])).square().sum(1)
        nll = F.cross_entropy(logits / temperature, test.labels, reduction="none")
        section.add("calibration", ece, len(test), bins, at=("expected calibration error", name))
        section.add("calibration", mce, len(test), bins, at=("maximum calibration error", name))
        section.add_mean("calibration", brier, f"{protocol}; summed over classes", ("Brier score", name))
        section.add_mean("calibration", nll, protocol, ("cross-entropy (nats)", name))
        reliability_panel(axes, p, test.labels, f"{name}, T = {temperature:.3g}, ECE {ece:.3f}")
    caption = f"Reliability of the predictions on {len(test)} test images, and how many of them lie in each bin"
    section.picture("reliability", caption, figure)


def calibration_errors(p: Tensor, labels: Tensor) -> tuple[float, float]:
    """Expected and maximum calibration error of probabilities (N, K)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    p = p.clamp(max=1 - 2**-24)  # the float32 below 1: for 1 itself torchmetrics has one more bin
    return tuple(multiclass_calibration_error(p, labels, p.shape[1], BINS, norm).item() for norm in ("l1", "max"))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T) (Guo et al., ICML 2017), within [0.01, 100]."""
    from scipy.optimize import minimize_scalar

    exact, bounds = logits.double(), (math.log(0.01), math.log(100))
    loss = lambda log_t: F.cross_entropy(exact / math.exp(log_t), labels).item()  # noqa: E731
    return math.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x)


def reliability_panel(axes, p: Tensor, labels: Tensor, title: str) -> None:
    """Accuracy against confidence, bin by bin, above the number of images in each bin."""
    confidence, predicted = (values.cpu().numpy() for values in p.double().max(1))
    above, below = axes
    style = {"edgecolor": "white"}
    counts, edges, _ = below.hist(confidence, BINS, range=(0, 1), color="tab:gray", **style)
    right, _ = np.histogram(confidence[predicted == labels.cpu().numpy()], edges)
    above.bar(edges[:-1], right / counts.clip(1), 1 / BINS, align="edge", label="accuracy", **style)
    above.plot([0, 1], [0, 1], "k--", linewidth=1, label="perfect")
    above.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.legend()
    below.set(xlabel="confidence", ylabel="images", yscale="log", ylim=(0.8, None))
