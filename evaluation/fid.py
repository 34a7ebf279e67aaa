"""FID, KID, IS, precision, recall of images uint8 (N, C, H, W) in features (N, D) of Inception or a classifier."""

import math
from dataclasses import replace
from pickle import UnpicklingError

import numpy as np
import torch
from torch import Generator, Tensor, nn

import distributed
from checkpoints.load import load_feature_model
from config import Config
from data import ImageData
from generation.chains import StartImages, run_chains
from logger.images import to_uint8
from models import JEM
from models.predict import predict
from sgld import ChainInit
from utils import UserError, evaluation_packages

CHUNK = 1000  # rows of a matrix of distances, of 50,000 columns
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
N_SAMPLES, N_REFERENCE = 2000, 10_000  # of --quality_every: unless --n_samples says another number; training images


class InceptionSpace:
    """torch-fidelity's Inception-v3 with the original TensorFlow weights, downloaded once, and TensorFlow's resizing.

    Features (N, 2048) of its pool layer, logits (N, 1008) without their bias. UserError if weights cannot be loaded.
    """

    table, frechet_name, network_name = "Inception scores", "FID", "Inception-v3 of torch-fidelity"

    def __init__(self, device: torch.device):
        self.network = distributed.rank0_first(load_inception).to(device)

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """``features``, and ``logits``, from which IS is computed."""
        batches = images.expand(-1, 3, -1, -1).split(250)  # grey as RGB; the network brings all to 299x299
        parts = distributed.sharded_map(batches, self.network, images.device, title="Inception's features")
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"features": features, "logits": logits}


@evaluation_packages()  # so that a missing one is a UserError in all processes
def load_inception() -> nn.Module:
    """It maps uint8 (N, 3, H, W) to features and logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # of the network; the others of a torn file
        advice = f"put the file {URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints"
        raise UserError(f"the Inception weights cannot be loaded or downloaded ({error}): {advice}") from None


class ClassifierSpace:
    """The features of the classifier that ``--feature_ckpt`` names; UserError if it names none."""

    table, frechet_name = "in a classifier's features", "Fréchet distance"

    def __init__(self, model: JEM | None, name: str):
        if model is None:
            raise UserError("no --feature_ckpt names one")
        self.backbone, self.network_name = model.f, f"features of {name}"

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": predict(self.backbone, images)}


def feature_statistics(features: Tensor) -> dict[str, np.ndarray]:
    """Mean and covariance, float64, of features (N, D), N above 1, as torch-fidelity has them."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    return fid_features_to_statistics(features.cpu().double())


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The Fréchet distance (FID, Heusel et al. 2017) of two ``feature_statistics``."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def kid_precision_recall(features: Tensor, real: Tensor, subset_size: int) -> dict[str, float]:
    """KID (Bińkowski et al. 2018), improved precision and recall (Kynkäänniemi et al. 2019) of features (N, D), (M, D).

    KID is the mean over ``KID_SUBSETS`` random subsets of ``subset_size`` images. All are torch-fidelity's.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    kid = kid_features_to_metric(features, real, kid_subsets=KID_SUBSETS, kid_subset_size=subset_size, verbose=False)
    parts = {"prc_batch_size": CHUNK, "save_cpu_ram": True}
    prc = prc_features_to_metric(features, real, prc_neighborhood=NEIGHBOURS, verbose=False, **parts)
    found = {"KID": kid[KEY_METRIC_KID_MEAN], "KID, standard deviation": kid[KEY_METRIC_KID_STD]}
    return found | {"precision": prc[KEY_METRIC_PRECISION], "recall": prc[KEY_METRIC_RECALL]}


def inception_score(logits: Tensor) -> dict[str, float]:
    """IS (Salimans et al. 2016) from Inception's logits (N, K), and its standard deviation over 10 random parts."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    score = isc_features_to_metric(logits.cpu())
    return {"IS": score[KEY_METRIC_ISC_MEAN], "IS, standard deviation": score[KEY_METRIC_ISC_STD]}


def nearest(points: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distance (N,) to each point's nearest reference, and that one's index; (N, ...), (M, ...)."""
    exact = "donot_use_mm_for_euclid_dist"  # so that an image lies at distance 0 from itself
    return torch.cdist(points.flatten(1).float(), references.flatten(1).float(), compute_mode=exact).min(1)


class SampleQuality:
    """--quality_every: Fréchet distances of a run's samples to always the same of its training images.

    The features are those of the classifier ``--feature_ckpt``, or else Inception's. UserError if there is neither.
    """

    def __init__(self, cfg: Config, images: ImageData, chain_init: ChainInit, device: torch.device):
        own = cfg.n_chains // distributed.current_world().size  # chains of a process, as in training
        self.cfg, self.device, classes = replace(cfg, p_x_batch_size=own), device, range(len(images.class_names))
        self.start = StartImages(cfg.start, cfg.n_samples or N_SAMPLES, chain_init, classes, cfg.class_cond)
        classifier = load_feature_model(cfg.feature_ckpt, cfg.dataset, images, device)
        with evaluation_packages():
            try:
                self.space = ClassifierSpace(classifier, cfg.feature_ckpt) if classifier else InceptionSpace(device)
            except UserError as error:
                raise UserError(f"--quality_every needs --feature_ckpt, a classifier, or Inception: {error}") from None
            order = torch.randperm(len(images.train), generator=Generator().manual_seed(0))[:N_REFERENCE]
            self.real = self.statistics(images.train.images[order])

    def statistics(self, images: Tensor) -> dict[str, np.ndarray]:
        return feature_statistics(self.space.outputs(images.to(self.device))["features"])

    def __call__(self, model: JEM, buffer: Tensor, rng: Generator) -> dict[str, float]:
        """The distances of fresh chains, of what they start from, and of images of the replay buffer (N, C, H, W).

        ``model`` is the ``frozen_sampler_model`` that the chains climb.
        """
        chains = run_chains(model, self.start, self.cfg.fresh_steps, self.cfg, rng)
        n = math.ceil(self.start.n / distributed.current_world().size)
        chosen = torch.randperm(len(buffer), generator=rng, device=rng.device)[:n]
        held = torch.cat(distributed.all_gather_object(to_uint8(buffer[chosen]).cpu()))
        sets = {"fresh_samples": to_uint8(chains.x), "chain_starts": to_uint8(chains.start), "buffer": held}
        return {f"quality/{k}": frechet_distance(self.statistics(images), self.real) for k, images in sets.items()}
