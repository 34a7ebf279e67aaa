"""FID, KID, IS, precision and recall, in the features of Inception or of a classifier.

Images are uint8 (N, C, H, W), features float32 (N, D).
"""

from pickle import UnpicklingError

import numpy as np
import torch
from torch import Tensor, nn

import distributed
from models import JEM
from models.predict import images_per_batch, predict
from utils import UserError

CHUNK = 1000  # rows of a matrix of distances, of 50,000 columns
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
EXACT = "donot_use_mm_for_euclid_dist"  # so that an image lies at distance 0 from itself


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
        batches = images.expand(-1, 3, -1, -1).split(images_per_batch(250, images.shape[1:]))  # grey as RGB
        parts = distributed.sharded_map(batches, self.network, images.device, title="Inception's features")
        features, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"features": features, "logits": logits}


def load_inception() -> nn.Module:
    """It maps uint8 (N, 3, H, W) to features and logits."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

    try:
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).eval()
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:  # of the network; the others of a torn file
        raise UserError(
            f"the Inception weights cannot be loaded or downloaded ({error}): put the file {URL_INCEPTION_V3} "
            f"into {torch.hub.get_dir()}/checkpoints"
        ) from None


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
    points, references = points.flatten(1).float(), references.flatten(1).float()
    found = [torch.cdist(part, references, compute_mode=EXACT).min(1) for part in points.split(CHUNK)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])
