"""Every option, once: default, help, allowed values, modes that read it, and properties of config.cli.PROPERTIES."""

from dataclasses import dataclass
from functools import partial

from config.cli import option
from config.recipes import RECIPES
from data import DATASETS
from models import BACKBONES
from models.wide_resnet import ACTIVATIONS, NORMS
from pgd import NORMS as ADVERSARIAL_NORMS

TRAINING = ("energy_train", "baseline_train")
BATCHED = (*TRAINING, "test", "sample")  # modes that read --batch_size and --precision
MODES = (*BATCHED, "score", "export")
STARTS = {  # images that are no samples, and what reports call them
    "uniform": "uniform noise",
    "gaussian": "a Gaussian fitted to the training images",
    "class_gaussian": "a Gaussian fitted to each class's training images",
    "folder": "images of another folder",
    "smooth": "noise of random smoothness",
    "shapes": "shapes of two colours",
    "patches": "training images with their patches in another order",
    "mixed": "means of two training images",
}
EXPORT_FOR = ("auto", "jem", "jem++", "sada-jem", "robust")
METRICS = ("classification", "calibration", "ood", "robustness", "quality", "likelihood")  # modules of evaluation/
ATTACKS = ("pgd", "refined", "refined_straight", "autoattack")
START_HELP = "; ".join(f"{name} ({text})" for name, text in STARTS.items())
RESUME_HELP = "run or checkpoint to continue; auto: the last run of these options, images and note, or a new one"
RECIPE_HELP = "; ".join(f"{name}: {recipe.summary} ({recipe.paper})" for name, recipe in RECIPES.items())

run = partial(option, "run", modes=(*BATCHED, "score"), resumable=True)
settings = partial(option, "run", modes=MODES)
data_set = partial(option, "data", modes=MODES)
training_images = partial(option, "data", modes=TRAINING)
network = partial(option, "model", modes=MODES, of_network=True)
training_network = partial(option, "model", modes=TRAINING)
optim = partial(option, "optimisation", modes=TRAINING)
sgld = partial(option, "SGLD", modes=("energy_train", "test", "sample"))
training_chains = partial(option, "SGLD", modes=("energy_train",))
energy = partial(option, "objective", modes=("energy_train",))
of_samples = partial(energy, needs=("draws_samples",))
outliers = partial(energy, needs=("outlier_shares",))
classifier = partial(option, "objective", modes=TRAINING)
adversarial = partial(classifier, needs=("adversarial_eps",))
dumps = partial(option, "dumps", modes=TRAINING, resumable=True)
sample_dumps = partial(option, "dumps", modes=("energy_train",), resumable=True, needs=("draws_samples",))
test = partial(option, "test", modes=("test",), resumable=True)
attack = partial(test, needs=("metrics=robustness",))
refinement = partial(test, needs=("refinements",))
quality = partial(test, needs=("metrics=quality",))
likelihood = partial(test, needs=("metrics=likelihood",))
sample = partial(option, "sample", modes=("sample",), resumable=True)
pictures = partial(sample, modes=("sample", "score"), needs=("inpaint", "denoise", "mode=score"))
WITH_NOISE = ("metrics=classification", "metrics=calibration", "metrics=ood", "refinements")
QUALITY = ("quality_every", "metrics=quality", "mode=sample")
samples = partial(option, "sample", modes=("energy_train", "test", "sample"), resumable=True, needs=QUALITY)
exported = partial(option, "export", modes=("export",), resumable=True)
speed = partial(option, "speed", modes=BATCHED)


@dataclass(frozen=True)
class Options:
    """One run's options, unchecked: see ``Config``."""

    mode: str = settings("energy_train", "train a JEM or a classifier; or measure, draw, score, export one", MODES)
    recipe: str = settings("jem", f"a paper's options, which those given replace. {RECIPE_HELP}", tuple(RECIPES))
    gpu: str = run("0", "index of the CUDA device, or cpu; with torchrun a list such as 0,1 (0: all devices)")
    seed: int = settings(1, "seed of a run's random generators (splits of the data are always the same)", minimum=0)
    logdir: str = run("runs", "folder in which each run makes its own directory", is_path=True)
    note: str = run("", "words added to the run directory's name")
    no_log: bool = run(False, "write no TensorBoard events", modes=TRAINING)
    load_ckpt: str = run("", "checkpoint or run whose weights and replay buffer to take", is_path=True, modes=MODES)
    resume: str = run("", RESUME_HELP, ("auto",), is_path=True, modes=TRAINING)

    dataset: str = data_set("cifar10", "training and test images", tuple(DATASETS))
    data_dir: str = data_set("data", "where the data set's files are, or a download goes", is_path=True, resumable=True)
    image_size: int | None = data_set(
        None, "side in pixels to squeeze a folder's images to", minimum=8, maximum=2048, needs=("dataset=folder",)
    )
    n_valid: int | None = training_images(None, "images held out for validation (default: a tenth, <= 5000)", minimum=0)
    labels_per_class: int | None = training_images(
        None, "images of each class whose label is used; the others serve only log p(x) (default: all)", minimum=1
    )
    data_device: str = data_set(
        "auto", "memory for training images; auto: cpu above 1/5 of the GPU's", ("auto", "cpu", "gpu"), resumable=True
    )
    no_flip: bool = training_images(False, "no random mirror images of cifar10, cifar100, fashion_mnist and folders")
    augment: str = training_images("crop", "auto: crops with black edges, AutoAugment and Cutout", ("crop", "auto"))
    sigma: float = training_images(0.03, "standard deviation of noise on real images, [-1, 1] scale", minimum=0)

    depth: int = network(28, "layers of the Wide-ResNet, 6n + 4", minimum=10)
    width: int = network(10, "widening factor of the Wide-ResNet", minimum=1)
    stages: int = network(3, "a fourth stage, of twice the channels, suits images of 64x64", minimum=3, maximum=4)
    backbone: str = network("jem", "of JEM, or of robust classifiers: no biases, normalised images", tuple(BACKBONES))
    norm: str = network("none", "normalisation layers", tuple(NORMS))
    norm_statistics: str = training_network(
        "batch",
        "normalisation in chains and for log p(x): by the batch; by running statistics; frozen: those of --load_ckpt",
        ("batch", "running", "frozen"),
        modes=("energy_train", "test", "sample"),
        needs=("norm=batch",),
    )
    sync_batch_norm: bool = training_network(False, "batch statistics over all processes", needs=("norm=batch",))
    dropout_rate: float = training_network(0.0, "dropout probability inside each block", minimum=0, maximum=0.99)
    separate_energy: bool = network(False, "log p(x) from a linear head of its own, not from the logits' logsumexp")
    activation: str = network("leaky_relu", "nonlinearity", tuple(ACTIVATIONS))

    lr: float = optim(1e-4, "peak learning rate", above=0, flags=("-l",))
    batch_size: int = optim(128, "images and chains of a step; in test, sample: chains", minimum=1, modes=BATCHED)
    epochs: int = optim(200, "passes over the training images", minimum=1, resumable=True)
    max_steps: int | None = optim(None, "stop after so many steps, if epochs last longer", minimum=1, resumable=True)
    optimizer: str = optim("adam", "sgd: with Nesterov momentum 0.9", ("adam", "sgd", "momentum"))
    weight_decay: float = optim(0.0, "L2 penalty on the parameters, as the optimizer applies it", minimum=0)
    warmup_steps: int = optim(1000, "steps in which the learning rate first rises linearly", minimum=0)
    schedule: str = optim("cosine", "the learning rate then: a cosine to 1e-6, or steps", ("cosine", "step"))
    decay_epochs: str = optim("", "epochs, with commas, after which the rate falls", needs=("schedule=step",))
    decay_rate: float = optim(0.3, "factor by which it then falls", above=0, maximum=1, needs=("schedule=step",))
    sam_rho: float = optim(0.0, "radius of sharpness-aware minimisation, two passes a step; 0: off", minimum=0)
    sam_adaptive: bool = optim(False, "adaptive SAM: --sam_rho is relative to each weight", needs=("sam_rho",))
    grad_clip: float | None = optim(None, "largest norm of the gradient, else shortened (default: no limit)", above=0)
    ema: float = optim(0.0, "decay of evaluated, averaged weights, lower at first; 0: off", minimum=0, maximum=0.99999)

    reinit_freq: float = training_chains(0.05, "probability that a chain starts anew, at --start", minimum=0, maximum=1)
    sgld_step: int = sgld(20, "Langevin steps of a training chain", minimum=0)
    sgld_lr: float = sgld(1.0, "step size: the factor of the gradient of log p(x)", minimum=1e-12)
    sgld_std: float = sgld(0.01, "standard deviation of the noise of one step, [-1, 1] scale", minimum=0)
    sgld_grad_clamp: float | None = sgld(None, "largest gradient in a pixel, else cut (default: no limit)", above=0)
    sgld_clamp: bool = sgld(False, "keep the chains' images in [-1, 1]")
    start: str = sgld("uniform", f"what chains start from, or with shares, as gaussian:0.8,uniform:0.2: {START_HELP}")
    start_dir: str = sgld("", "images for --start folder, which it implies by itself", is_path=True, resumable=True)
    sgld_normalize: bool = sgld(False, "bring each image's gradient to length 1: --sgld_lr is how far a step goes")
    sgld_step_max: int | None = sgld(None, "steps to which chains grow (default: they do not)", minimum=1)
    sgld_step_auroc: float = training_chains(
        0.7, "mean AUROC (real, sampled) above which chains grow", minimum=0, maximum=1, needs=("sgld_step_max",)
    )
    class_cond: bool = sgld(False, "chains climb log p(x|y), as many for each class", modes=("energy_train", "sample"))
    buffer_size: int = training_chains(10000, "images in the replay buffer", minimum=1)

    p_x_weight: float = energy(1.0, "weight of log p(x); with 0, and p_x_y_weight 0, no samples", minimum=0)
    generative: str = energy(
        "difference", "a difference of two means, or a logistic loss", ("difference", "logistic"), needs=("p_x_weight",)
    )
    adversarial_eps: float = classifier(
        0.0, "distance of adversarial training images, pixels in [0, 1]; 0 is off", minimum=0, needs=("p_y_x_weight",)
    )
    adversarial_norm: str = adversarial("L2", "norm of --adversarial_eps", ADVERSARIAL_NORMS)
    adversarial_steps: int = adversarial(10, "steps to an adversarial image", minimum=1)
    adversarial_step_size: float | None = adversarial(None, "step size in [0, 1] (default: 2.5 eps/steps)", above=0)
    p_y_x_weight: float = classifier(1.0, "weight of the cross-entropy of p(y|x)", minimum=0)
    p_x_y_weight: float = energy(0.0, "weight of the generative term of log p(x, y); needs --class_cond", minimum=0)
    energy_l2: float = of_samples(0.0, "weight of the mean squared log-density of real and sampled images", minimum=0)
    mean_energy_l2: float = of_samples(0.0, "weight of the squared means of log-density, real and sampled", minimum=0)
    mean_energy_form: str = energy(
        "means", "real_squares: for real images, the mean square", ("means", "real_squares"), needs=("mean_energy_l2",)
    )
    p_x_batch_size: int | None = of_samples(None, "chains, and images of log p(x) (default: --batch_size)", minimum=1)
    p_x_no_augment: bool = of_samples(False, "log p(x) has real images of its own, without crop, flip and noise")
    outlier_weight: float = of_samples(0.0, "weight: log p(x) of outliers stays below real images'; 0: off", minimum=0)
    outlier_images: str = outliers("smooth", "what the outliers are, named as in --start")
    outlier_batch_size: int = outliers(16, "outliers of a step", minimum=1)
    outlier_margin: float = outliers(2.0, "by how many nats they should lie below")
    outlier_eps: float = outliers(1.0, "L2 distance, pixels in [0, 1], by which they first move up log p(x)", minimum=0)
    outlier_steps: int = outliers(3, "steps in which they do", minimum=1)
    diverge_threshold: float = of_samples(1e4, "gap of real and sampled log p(x), in nats, that is divergence", above=0)
    max_recoveries: int = classifier(10, "returns to an earlier state before giving up", minimum=0, resumable=True)

    sample_every: int = sample_dumps(100, "steps between grids of samples (PNG)", minimum=1)
    gif_every: int = sample_dumps(500, "steps between films of a long SGLD chain (GIF)", minimum=1)
    eval_every: int = dumps(1, "epochs, at least 50 steps, between evaluations (validation and test)", minimum=1)
    quality_every: int = sample_dumps(
        0, "epochs between Fréchet distances of --n_samples chains, by --feature_ckpt or Inception; 0: off", minimum=0
    )
    ckpt_every: int = dumps(1000, "steps between checkpoints, besides those of epochs of 50 steps or more", minimum=1)

    eval: str = test("all", "what to measure, separated by commas: " + ", ".join(METRICS))
    ood_datasets: str = test(
        "auto",
        "sets of other images, separated by commas: data sets, folders, interp, noise, constant, shuffled, patches, "
        "blurred, inverted, which need no files; auto: these and digits, with cifar10 also svhn and cifar100",
        needs=("metrics=ood",),
    )
    max_images: int | None = test(None, "most images of a set for a metric (default: all; attacks: 1000)", minimum=20)
    attacks: str | None = attack(None, "of --eval robustness, with commas (default: all): " + ", ".join(ATTACKS))
    attack_images: int | None = attack(None, "most attacked images (default: --max_images; refinement: 50)", minimum=20)
    one_epsilon: bool = attack(False, "attack at one epsilon of each norm, that of AutoAttack: Linf 8/255 and L2 0.5")
    refine_steps: int = refinement(10, "SGLD steps that refine an attacked image; 0: not measured", minimum=0)
    ais_chains: int = likelihood(100, "chains of annealed importance sampling, for --eval likelihood", minimum=2)
    ais_temperatures: int = likelihood(1000, "its temperatures; fewer are faster, with bounds farther apart", minimum=2)
    sigma_test: float = test(0.0, "deviation of noise on classified images, [-1, 1] scale", minimum=0, needs=WITH_NOISE)
    feature_ckpt: str = samples("", "run of a classifier, for distances", is_path=True, modes=("energy_train", "test"))
    fid_reference: str = quality("train", "real images for FID, KID, precision, recall", ("train", "train+test"))
    compare: str = test("", "earlier measured run, or its eval folder, to show next to this one", is_path=True)

    n_samples: int | None = samples(
        None, "images to draw (default: 100, or 10 a class; inpaint, denoise 10; training 2000, test 10000)", minimum=1
    )
    n_sample_steps: int | None = samples(None, "default 20 x --sgld_step, to 200; dat, oe-jem: 50", minimum=0)
    images: str = pictures("", "your own pictures, a file or a folder: to score, fill in or clean", is_path=True)
    classes: str = sample("", "with --class_cond: names of classes, with commas (default: all)", needs=("class_cond",))
    from_buffer: bool = sample(False, "start from the checkpoint's replay buffer, not from --start")
    inpaint: str = sample("", "part to fill in, or where a picture is white", ("left", "center"), is_path=True)
    denoise: float | None = sample(None, "remove noise of this deviation, [-1, 1] scale, by a training chain", above=0)
    save_images: bool = sample(False, "write each sample as a PNG of its own, too")

    export: str = exported("", "new file: NAME.pt, for --export_for; NAME.safetensors, for --load_ckpt", is_path=True)
    export_for: str = exported("auto", "of NAME.pt; auto: by recipe; sada-jem: M-JEM too; robust: DAT", EXPORT_FOR)

    precision: str = speed("auto", "arithmetic; auto: bf16 where the hardware has it", ("auto", "fp32", "bf16"))
    compile: str = speed(
        "auto", "torch.compile; auto: long GPU runs", ("auto", "on", "off"), resumable=True, modes=(*TRAINING, "sample")
    )
