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
    test = inputs.subset(inputs.data.test)
    logits, names = predict(inputs.model, inputs.with_noise(test.images)), inputs.data.class_names
    correct = logits.argmax(1) == test.labels
    protocol = f"test images, {inputs.noise_protocol}"
    section.share("accuracy", correct, protocol)
    section.mean("cross-entropy (nats)", F.cross_entropy(logits, test.labels, reduction="none"), protocol)

    on_test = log_density(logits)
    section.mean("log p(x) of test images (nats)", on_test, f"{protocol}; up to the unknown constant log Z")
    if len(inputs.data.train):
        add_training_images(inputs, section, on_test)
    else:
        section.skip("log p(x) of training images", "these data are test images alone")
    for k, name in enumerate(names):
        if (of_class := test.labels == k).any():
            section.share("accuracy of each class", correct[of_class], f"{protocol}, of one class", (name, "accuracy"))
    pairs = test.labels * len(names) + logits.argmax(1)
    counts = torch.bincount(pairs, minlength=len(names) ** 2).view(len(names), -1).cpu()
    section.picture("confusion_matrix", f"Confusion matrix of {len(test)} test images", confusion_figure(counts, names))


def add_training_images(inputs: EvalInputs, section: Section, on_test: Tensor) -> None:
    """log p(x) of training images, and how far it lies above that of test images, ``on_test`` (N,)."""
    train = inputs.subset(inputs.data.train)
    on_train = log_density(predict(inputs.model, inputs.with_noise(train.images)))
    section.mean(
        "log p(x) of training images (nats)",
        on_train,
        f"training images, {inputs.noise_protocol}; up to the unknown constant log Z",
    )
    section.add(
        "log p(x), training minus test (nats)",
        on_train.mean() - on_test.mean(),
        len(on_test) + len(on_train),
        f"difference of the two means above, {inputs.noise_protocol}; well above 0 shows memorisation",
        bootstrap(lambda a, b: a.mean() - b.mean(), on_train, on_test),
    )


def confusion_figure(counts: Tensor, names: tuple[str, ...]) -> Figure:
    """counts (K, K): true class, predicted class."""
    side = 3.5 + 0.3 * min(len(names), 30)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        turn = 45 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(len(names)), names, rotation=turn, parse_math=False)
        axes.set_yticks(range(len(names)), names, parse_math=False)
        for i, j in counts.nonzero().tolist():
            axes.text(
                j,
                i,
                counts[i, j].item(),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if shares[i, j] > 0.5 else "black",
            )
    axes.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(shown, label="share of the true class")
    return figure
