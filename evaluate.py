"""``--mode test``: one function a metric, one report. Every number carries its protocol."""

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Generator, Tensor
from tqdm import tqdm

import likelihood as ais
import ood
import quality
import robustness
import utils
from config import Config
from data import ImageData, Split, fitting, to_float
from errors import UserError
from models import JEM, log_density
from report import Report, Section, bootstrap
from sample import load_data, load_model

BINS = 20  # of confidence, equally wide: the habit of JEM's family
AIS_CHAINS, AIS_TEMPERATURES, AIS_BURN_IN = 100, 1000, 200
AIS_SEARCH_TEMPERATURES = 200  # where only the scale of log p(x) is looked for


@torch.no_grad()
def predict(model: JEM, images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits float32 (N, K) of images (N, C, H, W), uint8 or float in [-1, 1], in evaluation mode.

    The backbone computes in ``dtype``. The model's mode is restored.
    """
    training = model.training
    model.eval()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        logits = [model(to_float(batch)) for batch in images.split(fitting(500, images.shape[1:]))]
    model.train(training)
    return torch.cat(logits)


def accuracy(model: JEM, split: Split, dtype: torch.dtype = torch.float32) -> float:
    """Share of a split's images whose most likely class is their label."""
    return (predict(model, split.images, dtype).argmax(1) == split.labels).float().mean().item()


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a frozen model in evaluation mode and float32, its data, its replay buffer if it has one."""

    cfg: Config
    model: JEM
    data: ImageData
    buffer: Tensor | None  # float32 (M, C, H, W)
    judge: JEM | None  # the classifier of --feature_ckpt
    device: torch.device

    def rng(self) -> Generator:
        """A generator that starts the same for each metric, whichever others run."""
        return Generator(self.device).manual_seed(self.cfg.seed)

    def some(self, split: Split, limit: int | None = None) -> Split:
        """At most ``limit`` and ``--max_images`` images of a split, the same random ones every time."""
        n = min(limit or len(split), self.cfg.max_images or len(split), len(split))
        order = torch.randperm(len(split), generator=Generator().manual_seed(0))[:n].sort().values
        return split[order.to(split.labels.device)] if n < len(split) else split

    def x(self, images: Tensor) -> Tensor:
        """uint8 images as they are or, with the noise of ``--sigma_test``, as floats."""
        if not self.cfg.sigma_test:
            return images
        noise = torch.randn(images.shape, generator=self.rng(), device=self.device)
        return to_float(images).add_(noise, alpha=self.cfg.sigma_test)

    @property
    def noise(self) -> str:
        sigma = self.cfg.sigma_test
        return f"with Gaussian noise of standard deviation {sigma:g} added" if sigma else "no noise added"


# ---------------------------------------------------------------------------------------------- classification


def classification(subject: Subject, section: Section) -> None:
    test, train = subject.some(subject.data.test), subject.some(subject.data.train)
    logits, names = predict(subject.model, subject.x(test.images)), subject.data.class_names
    correct = (logits.argmax(1) == test.labels).double()
    protocol = f"test images, {subject.noise}"
    section.mean("accuracy", correct, protocol)
    section.mean("cross-entropy (nats)", F.cross_entropy(logits, test.labels, reduction="none"), protocol)

    on_test, on_train = log_density(logits), log_density(predict(subject.model, subject.x(train.images)))
    section.mean("log p(x) of test images (nats)", on_test, f"{protocol}; up to the unknown constant log Z")
    section.mean(
        "log p(x) of training images (nats)",
        on_train,
        f"training images, {subject.noise}; up to the unknown constant log Z",
    )
    section.add(
        "log p(x), training minus test (nats)",
        on_train.mean() - on_test.mean(),
        len(on_test) + len(on_train),
        "difference of the two means above; well above 0 shows memorisation",
        bootstrap(lambda a, b: a.mean() - b.mean(), on_train, on_test),
    )
    for k, name in enumerate(names):
        if (of_class := test.labels == k).any():
            section.mean("accuracy of each class", correct[of_class], f"{protocol}, of one class", (name, "accuracy"))
    pairs = test.labels * len(names) + logits.argmax(1)
    counts = torch.bincount(pairs, minlength=len(names) ** 2).view(len(names), -1).cpu()
    section.picture("confusion_matrix", f"Confusion matrix of {len(test)} test images", confusion_figure(counts, names))


def confusion_figure(counts: Tensor, names: tuple[str, ...]) -> Figure:
    """counts (K, K): true class, predicted class."""
    side = 3.5 + 0.3 * min(len(names), 30)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=45 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), names)
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


# ---------------------------------------------------------------------------------------------- calibration


def calibration(subject: Subject, section: Section) -> None:
    test, valid = subject.some(subject.data.test), subject.some(subject.data.valid)
    logits = predict(subject.model, subject.x(test.images))
    scaled = {"as trained": 1.0}
    if len(valid):
        temperature = fit_temperature(predict(subject.model, subject.x(valid.images)), valid.labels)
        scaled["temperature-scaled"] = temperature
        section.add(
            "temperature", temperature, len(valid), f"minimises the cross-entropy on validation images, {subject.noise}"
        )
    else:
        section.skip("temperature scaling", "there are no validation images; train with --n_valid above 0")
    figure = Figure(figsize=(5 * len(scaled), 5.5), layout="constrained")
    panels = figure.subplots(2, len(scaled), height_ratios=(3, 1), sharex=True, squeeze=False)
    for (name, temperature), axes in zip(scaled.items(), panels.T, strict=True):
        p = (logits / temperature).softmax(1)
        ece, mce = calibration_errors(p, test.labels)
        protocol = f"test images, {subject.noise}"
        bins = f"{protocol}; {BINS} equally wide bins of the largest probability, torchmetrics"
        section.add("calibration", ece, len(test), bins, at=("expected calibration error", name))
        section.add("calibration", mce, len(test), bins, at=("maximum calibration error", name))
        brier = (p - F.one_hot(test.labels, p.shape[1])).square().sum(1)
        section.mean("calibration", brier, f"{protocol}; summed over classes", ("Brier score", name))
        nll = F.cross_entropy(logits / temperature, test.labels, reduction="none")
        section.mean("calibration", nll, protocol, ("cross-entropy (nats)", name))
        reliability_panel(axes, p, test.labels, f"{name}, T = {temperature:.3g}, ECE {ece:.3f}")
    section.picture(
        "reliability",
        f"Reliability of the predictions on {len(test)} test images, and how many of them lie in each bin",
        figure,
    )


def calibration_errors(p: Tensor, labels: Tensor) -> tuple[float, float]:
    """Expected and maximum calibration error of probabilities (N, K)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    return tuple(multiclass_calibration_error(p, labels, p.shape[1], BINS, norm).item() for norm in ("l1", "max"))


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The T that minimises the cross-entropy of softmax(logits / T) (Guo et al., ICML 2017), within [0.01, 100]."""
    from scipy.optimize import minimize_scalar

    logits = logits.double()

    def loss(log_t: float) -> float:
        return F.cross_entropy(logits / math.exp(log_t), labels).item()

    return math.exp(minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded").x)


def reliability_panel(axes, p: Tensor, labels: Tensor, title: str) -> None:
    """Accuracy against confidence, bin by bin, above the number of images in each bin."""
    confidence, predicted = p.max(1)
    correct = (predicted == labels).double()
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    count = torch.bincount(place, minlength=BINS)
    share = (torch.bincount(place, weights=correct, minlength=BINS) / count).nan_to_num(0)
    edges = [i / BINS for i in range(BINS)]
    above, below = axes
    above.bar(edges, share.tolist(), 1 / BINS, align="edge", edgecolor="white", label="accuracy")
    above.plot([0, 1], [0, 1], "k--", linewidth=1, label="perfect")
    above.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    above.legend()
    below.bar(edges, count.tolist(), 1 / BINS, align="edge", edgecolor="white", color="tab:gray")
    below.set(xlabel="confidence", ylabel="images", yscale="log", ylim=(0.8, None))


# ---------------------------------------------------------------------------------------------- likelihood


def likelihood(subject: Subject, section: Section) -> None:
    """log Z and bits per dimension of exp(log p(x) / T), for T = 1 and for the T that suits the validation images."""
    levels = 17 if subject.cfg.dataset == "digits" else 256
    test, valid, rng = subject.some(subject.data.test), subject.some(subject.data.valid), subject.rng()

    def on(split: Split) -> Tensor:
        x = ais.dequantise((split.images * ((levels - 1) / 255)).round(), levels, rng)
        return log_density(predict(subject.model, x))

    section.note(
        "The forward estimate makes the bits look too good and the reverse one too bad: the truth lies "
        "between them as far as the reverse chains, begun in the buffer, have reached that density."
    )
    with exact_float32():
        sandwich_log_z(subject, section, 1.0, on(test), levels, rng)
        if not len(valid):
            section.skip("likelihood at another temperature", "there are no validation images to choose it on")
            return
        beta = best_inverse_temperature(subject, on(valid).mean().item(), rng)
        section.add(
            "inverse temperature 1/T",
            beta,
            len(valid),
            "the power of two under which validation images are "
            "likeliest, by short forward runs, among those where a tenth of the chains are effective; the "
            "chains of training follow a colder density than T = 1",
        )
        if beta > 1:
            sandwich_log_z(subject, section, beta, on(test), levels, rng)


def tempered(model: JEM, beta: float) -> ais.LogDensity:
    return lambda x: beta * model.log_density(x)


def best_inverse_temperature(subject: Subject, mean_on_valid: float, rng: Generator) -> float:
    """The first maximum over 1, 2, 4, ... of the mean log-likelihood ``beta * mean_on_valid - log Z(beta)``.

    Ends before fewer than a tenth of the chains are effective: from there on log Z is far too low, and the likelihood
    too good.
    """
    base, best, highest = ais.Box(subject.data.shape), 1.0, -math.inf
    for beta in tqdm([2.0**k for k in range(20)], desc="inverse temperatures, until the best is past", leave=False):
        density = tempered(subject.model, beta)
        step_sizes = ais.tune_step_sizes(density, base, AIS_SEARCH_TEMPERATURES, rng, n_knots=10)
        run = ais.forward_ais(density, base, AIS_CHAINS, AIS_SEARCH_TEMPERATURES, rng, step_sizes=step_sizes)
        if run.ess < AIS_CHAINS / 10 or beta * mean_on_valid - run.log_z < highest:
            break
        best, highest = beta, beta * mean_on_valid - run.log_z
    return best


def sandwich_log_z(
    subject: Subject, section: Section, beta: float, on_test: Tensor, levels: int, rng: Generator
) -> None:
    """Both estimates of log Z of exp(beta * log p(x)), the bits that follow for test images, and the gap."""
    shape, dim = subject.data.shape, math.prod(subject.data.shape)
    density, base = tempered(subject.model, beta), ais.Box(shape)
    step_sizes = ais.tune_step_sizes(density, base, AIS_TEMPERATURES, rng, n_knots=20)
    forward = ais.forward_ais(density, base, AIS_CHAINS, AIS_TEMPERATURES, rng, step_sizes=step_sizes, progress=True)
    protocol = f"AIS by HMC from the uniform density on [-1, 1]^{dim}, {AIS_TEMPERATURES} temperatures"
    runs = {"forward": (forward, f"{protocol}; stochastic lower bound")}
    if subject.buffer is None:
        section.skip(f"reverse estimate, 1/T = {beta:g}", "the checkpoint has no replay buffer to start from")
    else:
        chosen = torch.randperm(len(subject.buffer), generator=rng, device=subject.device)[:AIS_CHAINS]
        reverse = ais.reverse_ais(
            density, base, subject.buffer[chosen].clamp(-1, 1), step_sizes, rng, burn_in=AIS_BURN_IN, progress=True
        )
        runs["reverse"] = (
            reverse,
            f"{protocol}, backwards from images of the buffer after {AIS_BURN_IN} HMC steps; stochastic upper bound",
        )
    for name, (result, protocol) in runs.items():
        row, n = f"1/T = {beta:g}, {name}", len(result.log_weights)
        section.add("log Z (nats)", result.log_z, n, protocol, result.log_z_interval, (row, "log Z"))
        section.add("log Z (nats)", result.ess, n, protocol, at=(row, "effective chains"))
        section.add("log Z (nats)", result.acceptance.mean(), n, protocol, at=(row, "mean HMC acceptance"))
        section.add("log Z (nats)", result.acceptance.min(), n, protocol, at=(row, "lowest HMC acceptance"))
        bits = ais.bits_per_dim(beta * on_test - result.log_z, dim, levels)
        section.mean(
            "test bits per dimension",
            bits,
            f"test images, uniformly dequantised from {levels} grey levels; "
            f"the uniform density has {math.log2(levels):.4g} bits",
            (row, "bits"),
        )
    if "reverse" in runs:
        gap = (reverse.log_z - forward.log_z) / dim / math.log(2)
        section.add(
            "gap",
            gap,
            len(reverse.log_weights),
            "reverse minus forward estimate of log Z, in bits per dimension",
            at=(f"1/T = {beta:g}", "bits"),
        )
        if gap < -0.01:
            section.note(
                f"At 1/T = {beta:g} the upper bound lies below the lower one: the buffer holds no samples of "
                "that density, and the reverse estimate means nothing. The forward one still bounds log Z "
                "from below, so the true bits are higher than its own."
            )


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, CUDA computes in float32 and not in TF32, whose error would swamp small steps of log p."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


# ---------------------------------------------------------------------------------------------- the whole


METRICS: dict[str, Callable[[Subject, Section], None]] = {
    "classification": classification,
    "calibration": calibration,
    "ood": ood.measure,
    "robustness": robustness.measure,
    "quality": quality.measure,
    "likelihood": likelihood,
}


def run(cfg: Config, path: Path, content: dict[str, Any]) -> int:
    """Measure the checkpoint ``content`` of ``path``; returns the exit status. Raises UserError if nothing worked."""
    device = utils.pick_device(cfg.gpu)
    utils.tune(device)
    model = frozen(cfg, path, content, device)
    images, state = load_data(cfg, path, content, device), content["state"]
    buffer = state["buffer"]["images"].to(device) if "buffer" in state else None
    subject = Subject(cfg, model, images, buffer, load_judge(cfg.feature_ckpt, images, device), device)
    ood.check_names(cfg)

    directory = report_directory(cfg, path)
    chosen = " (the last of its run, to which the replay buffer belongs)" if Path(cfg.load_ckpt).is_dir() else ""
    about = {
        "checkpoint": f"{path}{chosen}",
        "training steps": state["step"],
        "weights": "moving average" if "ema" in state else "as trained",
        "arithmetic": "float32" if device.type == "cpu" else "TF32, likelihood in float32",
        "data set": cfg.dataset,
        "network": f"WRN-{cfg.depth}-{cfg.width}",
        "seed": cfg.seed,
    }
    report = Report(
        directory,
        {
            "about": {k: str(v) for k, v in about.items()},
            "options": vars(cfg),
            "environment": utils.environment(device),
        },
    )
    for name in cfg.metrics:
        print(f"{name} ...", flush=True)
        section = report.section(name)
        torch.manual_seed(cfg.seed)  # for libraries that draw from the global generator
        try:
            METRICS[name](subject, section)
        except UserError as error:
            section.skip(name, str(error))
        except Exception as error:  # one metric's failure is not to cost the others, hours later
            traceback.print_exc()
            section.skip(name, f"{type(error).__name__}: {error}")
        report.write()
    if not cfg.no_log:
        report.to_tensorboard(state["step"])
    print(f"Look at {directory / 'report.md'}, results.json and the pictures beside it.")
    if not any(section.scalars() for section in report.sections.values()):
        raise UserError(f"nothing could be measured; {directory / 'report.md'} says why")
    return 0


def frozen(cfg: Config, path: Path, content: dict[str, Any], device: torch.device) -> JEM:
    return load_model(cfg, path, content).to(device).eval().requires_grad_(False)


def load_judge(place: str, images: ImageData, device: torch.device) -> JEM | None:
    """The classifier that ``--feature_ckpt`` names, if any; it must know the same classes of images of this shape."""
    if not place:
        return None
    path, content = utils.find_checkpoint(place)
    described = content["data"]
    if described["shape"] != list(images.shape) or described["class_names"] != list(images.class_names):
        raise UserError(f"--feature_ckpt {path} was trained on other images or classes: name one of the same data set")
    return frozen(Config.from_dict(content["config"], str(path)), path, content, device)


def report_directory(cfg: Config, path: Path) -> Path:
    """A new ``eval`` directory in the checkpoint's run, or where there is none, in a new run."""
    in_run = path.parent.name == "ckpt" and (path.parent.parent / "config.json").is_file()
    run = path.parent.parent if in_run else utils.RunDir.create(cfg.logdir, cfg.mode, cfg.note).path
    with utils.disk_errors(run):
        for end in ("", *(f"-{n}" for n in range(2, 1000))):
            try:
                (run / f"eval{end}").mkdir()
            except FileExistsError:
                continue
            return run / f"eval{end}"
    raise UserError(f"{run} holds 999 evaluations; remove some")
