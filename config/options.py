"""Every option of the program, once: its default, its help text, and which of its values are allowed."""

from dataclasses import dataclass

from config.cli import option
from config.recipes import RECIPES
from data import DATASETS
from evaluation import METRICS
from models import BACKBONES
from models.wide_resnet import ACTIVATIONS, NORMS
from pgd import NORMS as ADVERSARIAL_NORMS

TRAINING = ("energy_train", "baseline_train")
MODES = (*TRAINING, "test", "sample", "export")
ATTACKS = ("pgd", "refined", "autoattack", "distal")


@dataclass(frozen=True)
class Options:
    """One run's options, unchecked: see ``Config``."""

    mode: str = option(
        "energy_train",
        "run",
        "what to do: train a JEM, or the plain classifier; or measure --load_ckpt, draw samples from it, or write its "
        "network for other programs",
        MODES,
    )
    recipe: str = option(
        "jem",
        "run",
        "set of options of a paper; options that are also given replace the recipe's. "
        + "; ".join(f"{name}: {recipe.summary} ({recipe.paper})" for name, recipe in RECIPES.items()),
        tuple(RECIPES),
    )
    gpu: str = option(
        "0", "run", "index of the CUDA device, or cpu; with torchrun a list such as 0,1 (default: all devices)"
    )
    seed: int = option(1, "run", "seed of every random generator", minimum=0)
    logdir: str = option("runs", "run", "folder in which each run makes its own directory", path_but=())
    note: str = option("", "run", "words added to the run directory's name")
    no_log: bool = option(False, "run", "write no TensorBoard events")
    load_ckpt: str = option(
        "", "run", "start from the weights and the replay buffer of this checkpoint or run directory", path_but=()
    )
    resume: str = option(
        "",
        "run",
        "continue a run directory or checkpoint exactly where it stopped, or auto: the "
        "newest run in logdir with the same configuration, images and note (a new run if there is none)",
        path_but=("auto",),
    )

    dataset: str = option("cifar10", "data", "training and test images", DATASETS)
    data_dir: str = option("data", "data", "where the data set's files are, or are downloaded to", path_but=())
    image_size: int | None = option(
        None,
        "data",
        "side in pixels that the images of a folder are resized to, whatever their aspect ratio "
        "(default: the images' own)",
        minimum=8,
        maximum=2048,
    )
    n_valid: int | None = option(
        None,
        "data",
        "images held out of train for validation (default: 5000, or a tenth of train where that is less)",
        minimum=0,
    )
    labels_per_class: int | None = option(
        None,
        "data",
        "training images of each class whose label is used; the others serve log p(x) alone (default: all)",
        minimum=1,
        off=True,
    )
    data_device: str = option(
        "auto",
        "data",
        "where training images are stored: in GPU memory, or in the computer's memory (cpu; each batch is sent early); "
        "auto: cpu if they need more than a fifth of the GPU's memory",
        ("auto", "cpu", "gpu"),
    )
    no_flip: bool = option(
        False,
        "data",
        "do not mirror training images left to right at random (default: images of cifar10, cifar100, fashion_mnist "
        "and folders are mirrored)",
    )
    sigma: float = option(
        0.03,
        "data",
        "standard deviation of the noise added to real images in training, on the [-1, 1] scale",
        minimum=0,
    )

    depth: int = option(28, "model", "layers of the Wide-ResNet, 6n + 4", minimum=10)
    width: int = option(10, "model", "widening factor of the Wide-ResNet", minimum=1)
    stages: int = option(
        3,
        "model",
        "stages of the network; a fourth, of twice the channels, suits images of 64x64",
        minimum=3,
        maximum=4,
    )
    backbone: str = option(
        "jem",
        "model",
        "form of the Wide-ResNet: the JEM papers', or that of robust classifiers (no biases, normalised images)",
        tuple(BACKBONES),
    )
    norm: str = option("none", "model", "normalisation layers", tuple(NORMS))
    sync_batch_norm: bool = option(
        False, "model", "batch statistics over the batches of all processes, not of each (torchrun)"
    )
    dropout_rate: float = option(0.0, "model", "dropout probability inside each block", minimum=0, maximum=0.99)
    separate_energy: bool = option(
        False, "model", "log p(x) from a linear head of its own, not from the logits' logsumexp"
    )
    activation: str = option("leaky_relu", "model", "nonlinearity", tuple(ACTIVATIONS))

    lr: float = option(1e-4, "optimisation", "peak learning rate", above=0, flags=("-l",))
    batch_size: int = option(128, "optimisation", "real images, and chains, of one step", minimum=1)
    epochs: int = option(200, "optimisation", "passes over the training images", minimum=1)
    max_steps: int | None = option(
        None,
        "optimisation",
        "stop after this many steps if the epochs last longer (default: no limit)",
        minimum=1,
        off=True,
    )
    optimizer: str = option("adam", "optimisation", "sgd has Nesterov momentum 0.9", ("adam", "sgd", "rmsprop"))
    weight_decay: float = option(
        0.0, "optimisation", "L2 penalty on the parameters, as the optimizer applies it", minimum=0
    )
    warmup_steps: int = option(
        1000, "optimisation", "steps over which the learning rate rises linearly, before --schedule", minimum=0
    )
    schedule: str = option(
        "cosine", "optimisation", "the learning rate after the warm-up: a cosine to 1e-6, or steps", ("cosine", "step")
    )
    decay_epochs: str = option(
        "", "optimisation", "epochs, separated by commas, after which --schedule step lowers the rate"
    )
    decay_rate: float = option(
        0.3, "optimisation", "factor by which --schedule step lowers the learning rate", above=0, maximum=1
    )
    sam_rho: float = option(
        0.0,
        "optimisation",
        "radius of sharpness-aware minimisation, which takes two passes a step; 0 is off",
        minimum=0,
    )
    sam_adaptive: bool = option(
        False, "optimisation", "measure --sam_rho in units of each weight's own size (adaptive SAM)"
    )
    ema: float = option(
        0.0,
        "optimisation",
        "decay of the averaged weights (exponential moving average), for instance 0.999, which evaluation and GIFs "
        "then use; early in training the smaller value (1 + step) / (10 + step) is used; 0 is off",
        minimum=0,
        maximum=0.99999,
    )

    reinit_freq: float = option(
        0.05, "SGLD", "probability that a chain starts afresh, from --start", minimum=0, maximum=1
    )
    sgld_step: int = option(20, "SGLD", "Langevin steps of a training chain", minimum=1)
    sgld_lr: float = option(1.0, "SGLD", "step size: the factor of the gradient of log p(x)", minimum=1e-12)
    sgld_std: float = option(
        0.01, "SGLD", "standard deviation of the noise of one step, on the [-1, 1] scale", minimum=0
    )
    sgld_grad_clamp: float | None = option(
        None,
        "SGLD",
        "largest size of the gradient in a pixel; larger ones are cut (default: no limit)",
        above=0,
        off=True,
    )
    sgld_clamp: bool = option(False, "SGLD", "keep the chains' images in [-1, 1]")
    start: str = option(
        "uniform",
        "SGLD",
        "where chains start: uniform noise, or samples of a Gaussian with the mean and covariance of the training "
        "images, of all or of each class",
        ("uniform", "gaussian", "class_gaussian", "folder"),
    )
    start_dir: str = option("", "SGLD", "images of --start folder, whatever they show", path_but=())
    sgld_normalize: bool = option(
        False, "SGLD", "bring each image's gradient to length 1, so that --sgld_lr is how far a step goes"
    )
    sgld_step_max: int | None = option(
        None,
        "SGLD",
        "longest training chain: it starts with --sgld_step steps and gets one more each time the AUROC is above "
        "--sgld_step_auroc (default: chains do not grow)",
        minimum=1,
        off=True,
    )
    sgld_step_auroc: float = option(
        0.7,
        "SGLD",
        "AUROC of real images against samples by log p(x), mean of 10 steps, above which --sgld_step_max adds a step",
        minimum=0,
        maximum=1,
    )
    class_cond: bool = option(
        False,
        "SGLD",
        "sample each class separately: chains climb log p(x|y), equally many for each class; in training the replay "
        "buffer is divided by class, pictures have a row for each class, --inpaint and --denoise use the test images' "
        "true classes",
    )
    buffer_size: int = option(10000, "SGLD", "images in the replay buffer", minimum=1)

    p_x_weight: float = option(
        1.0, "objective", "weight of the generative term of log p(x); with 0 no samples are drawn for it", minimum=0
    )
    generative: str = option(
        "difference",
        "objective",
        "the generative term of log p(x): the difference of the two means, or the binary cross-entropy of telling "
        "real images from samples by log p(x)",
        ("difference", "logistic"),
    )
    adversarial_eps: float = option(
        0.0,
        "objective",
        "train the classifier on adversarial images within this distance of the real ones, pixels in [0, 1] "
        "(for instance L2 0.5, Linf 0.03); 0 is off",
        minimum=0,
    )
    adversarial_norm: str = option("L2", "objective", "how --adversarial_eps measures distance", ADVERSARIAL_NORMS)
    adversarial_steps: int = option(10, "objective", "gradient steps that make an adversarial image", minimum=1)
    p_y_x_weight: float = option(1.0, "objective", "weight of the cross-entropy of p(y|x)", minimum=0)
    p_x_y_weight: float = option(
        0.0, "objective", "weight of the generative term of log p(x, y); needs --class_cond", minimum=0
    )
    energy_l2: float = option(
        0.0, "objective", "weight of the mean squared log-density of real and sampled images", minimum=0
    )
    mean_energy_l2: float = option(
        0.0,
        "objective",
        "weight of the squares of the mean log-density of real images and that of samples",
        minimum=0,
    )
    p_x_batch_size: int | None = option(
        None,
        "objective",
        "number of real images, drawn separately from the labelled ones, and of chains for log p(x) (default: the "
        "labelled images, and as many chains)",
        minimum=1,
        off=True,
    )
    p_x_no_augment: bool = option(
        False, "objective", "the real images of log p(x) are another draw, without crop, flip and noise"
    )
    diverge_threshold: float = option(
        1e4,
        "objective",
        "size of the gap between the mean log-densities of real and sampled images (nats) that counts as divergence",
        above=0,
    )
    max_recoveries: int = option(
        10, "objective", "returns to an earlier state after divergence before giving up; 0 ends at the first", minimum=0
    )

    sample_every: int = option(100, "dumps", "steps between grids of samples (PNG)", minimum=1)
    gif_every: int = option(500, "dumps", "steps between films of a long SGLD chain (GIF)", minimum=1)
    eval_every: int = option(1, "dumps", "epochs between evaluations on validation and test images", minimum=1)
    quality_every: int = option(
        0,
        "dumps",
        "epochs between measurements of sample quality: the Fréchet distance of --n_samples (2000) chains of "
        "--n_sample_steps to training images, in features of --feature_ckpt or of Inception; the best weights are "
        "best_quality.pt; 0: never",
        minimum=0,
    )
    ckpt_every: int = option(
        1000, "dumps", "steps between checkpoints, besides the one after each epoch of 50 steps or more", minimum=1
    )

    eval: str = option("all", "test", "what to measure, separated by commas: " + ", ".join(METRICS))
    ood_datasets: str = option(
        "auto",
        "test",
        "out-of-distribution sets, separated by commas: data sets (in --data_dir; with --dataset folder in data/), "
        "folders of images, and interp, noise, constant, shuffled, which need no files; auto: these four, and with "
        "cifar10 also svhn and cifar100",
    )
    max_images: int | None = option(
        None, "test", "images, at most, that a metric takes from any set (default: all; 1000 for attacks)", minimum=20
    )
    attacks: str | None = option(
        None,
        "test",
        "attacks of --eval robustness, separated by commas: pgd; refined (PGD through --refine_steps); autoattack; "
        "distal (noise that becomes a class) (default: all)",
    )
    attack_images: int | None = option(
        None, "test", "test images, at most, that are attacked (default: as --max_images says)", minimum=20
    )
    one_epsilon: bool = option(
        False, "test", "attack at one epsilon of each norm alone, that of AutoAttack: Linf 8/255 and L2 0.5"
    )
    refine_steps: int = option(
        10,
        "test",
        "SGLD steps that refine an attacked image before it is classified; 0 leaves this measurement out",
        minimum=0,
    )
    ais_chains: int = option(100, "test", "chains of annealed importance sampling, for --eval likelihood", minimum=2)
    ais_temperatures: int = option(
        1000,
        "test",
        "temperatures of annealed importance sampling; fewer are faster, and leave the bounds farther apart",
        minimum=2,
    )
    sigma_test: float = option(
        0.0,
        "test",
        "standard deviation of noise added to images before they are classified, on the [-1, 1] scale",
        minimum=0,
    )
    feature_ckpt: str = option(
        "",
        "test",
        "classifier (run directory or checkpoint); samples and training images are compared in its features",
        path_but=(),
    )
    fid_reference: str = option(
        "train",
        "test",
        "real images that FID, KID, precision and recall compare samples with: all training images (those held out for "
        "validation too), or the test images as well, as SADA-JEM does",
        ("train", "train+test"),
    )
    compare: str = option(
        "",
        "test",
        "show an earlier measured run next to this one: its run directory (the folder eval is used) or one of its eval "
        "folders (default: none)",
        path_but=(),
    )

    n_samples: int | None = option(
        None,
        "sample",
        "images to draw (default: 100; with --class_cond 10 a class), "
        "or test images for --inpaint, --denoise and --counterfactual (default: 10); --mode test: 10000",
        minimum=1,
    )
    n_sample_steps: int | None = option(
        None,
        "sample",
        "SGLD steps of a chain (default: 200; for --denoise the checkpoint's --sgld_step); 0 writes its start; "
        "gradient steps of --counterfactual (default: 200)",
        minimum=0,
    )
    from_buffer: bool = option(False, "sample", "start from the checkpoint's replay buffer, not from --start")
    inpaint: str = option(
        "",
        "sample",
        "fill in test images: left (their left half), center, or a picture of the "
        "images' size that is white where they are unknown",
        path_but=("left", "center"),
    )
    denoise: float | None = option(
        None, "sample", "clean test images of Gaussian noise of this standard deviation, on the [-1, 1] scale", above=0
    )
    counterfactual: str | None = option(
        None,
        "sample",
        "change test images of other classes a little, up log p(x|y) of this class, a name or a number from 0 on; "
        "all: each image to every class",
    )
    counterfactual_eps: float | None = option(
        None,
        "sample",
        "how far --counterfactual may move an image, L2, pixels in [0, 1] (default: 2.5)",
        above=0,
    )
    save_images: bool = option(False, "sample", "write each sample as a PNG of its own, too")

    export: str = option(
        "",
        "export",
        "new file for the network: NAME.pt as the JEM authors' programs name its parts, or NAME.safetensors with its "
        "options, which --load_ckpt opens",
        path_but=(),
    )

    precision: str = option(
        "auto",
        "speed",
        "arithmetic of the network; auto takes bf16 where the hardware has it",
        ("auto", "fp32", "bf16"),
    )
    compile: str = option("auto", "speed", "torch.compile; auto: on a GPU from 20,000 steps on", ("auto", "on", "off"))
