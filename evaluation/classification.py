"""Accuracy, log p(x) and the confusion matrix."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from evaluation.inputs import EvalInputs
from evaluation.report import Section, bootstrap
from models import log_density
from models.predict import predict


def measure(inputs: EvalInputs, section: Section) -> None:
    """Accuracy; log p(x) of test images and of training images, and how far these lie above those."""
    test, noise = inputs.subset(inputs.data.test), inputs.noise_protocol
    logits, names = predict(inputs.model, inputs.with_noise(test.images)), inputs.data.class_names
    predicted, protocol, on_test = logits.argmax(1), f"test images, {noise}", log_density(logits)
    correct = predicted == test.labels
    if inputs.classifies:
        section.add_proportion("accuracy", correct, protocol)
        section.add_mean("cross-entropy (nats)", F.cross_entropy(logits, test.labels, reduction="none"), protocol)
    constant = "up to the unknown constant log Z"
    section.add_mean("log p(x) of test images (nats)", on_test, f"{protocol}; {constant}")
    if len(inputs.data.train):
        train = inputs.subset(inputs.data.train, len(test))
        on_train = log_density(predict(inputs.model, inputs.with_noise(train.images)))
        section.add_mean("log p(x) of training images (nats)", on_train, f"training images, {noise}; {constant}")
        apart, n = "log p(x), training minus test (nats)", len(on_test) + len(on_train)
        interval = bootstrap(lambda a, b: a.mean() - b.mean(), on_train, on_test)
        meaning = f"difference of the two means above, {noise}; well above 0 shows memorisation"
        section.add(apart, on_train.mean() - on_test.mean(), n, meaning, interval)
    else:
        section.add_absent("log p(x) of training images", "these data are only test images")
    if not inputs.classifies:
        section.add_absent("accuracy", "the model was trained without labels")
        return
    for k, name in enumerate(names):
        if (of_class := test.labels == k).any():
            place = (name, "accuracy")
            section.add_proportion("accuracy of each class", correct[of_class], f"{protocol}, of one class", place)
    counts = torch.bincount(test.labels * len(names) + predicted, minlength=len(names) ** 2).view(len(names), -1).cpu()
    section.picture("confusion_matrix", f"Confusion matrix of {len(test)} test images", confusion_figure(counts, names))


def confusion_figure(counts: Tensor, names: tuple[str, ...]) -> Figure:
    """counts (K, K): true class, predicted class."""
    side, names = 3.5 + 0.3 * min(len(names), 30), [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        turn = 45 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(len(names)), names, rotation=turn, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for i, j in counts.nonzero().tolist():
            color = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, counts[i, j].item(), ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(shown, label="share of the true class")
    return figure
