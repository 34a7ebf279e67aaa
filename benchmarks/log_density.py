"""What a checkpoint's log p(x) tells, in a minute: its accuracy, and AUROC of test images against others.

    python benchmarks/log_density.py runs/<run> [--data_dir PATH] [--json FILE]

A first look while a recipe is sought; --mode test measures more, with intervals and protocols. Log p(x) is of the
averaged weights if there are any, with running statistics, in bf16 where that is fast; the other images are the same
for every checkpoint (of digits and Fashion-MNIST their own set is left out). In the worst case they have moved up log
p(x) by L2 1 (pixels in [0, 1]) in 20 steps first. What --outlier_images can train on is marked (*); a model that has
seen such images in training says little by knowing them.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import run_script
from chain_init import shape_images, shuffled_patches, smooth_images  # noqa: E402
from checkpoints.load import load_data, load_model, open_trained  # noqa: E402
from evaluation.ood import moved_towards_data  # noqa: E402
from losses import auroc  # noqa: E402
from models import log_density  # noqa: E402
from models.predict import predict  # noqa: E402

ACCURACY_IMAGES = 4000
MOVED = 250  # images of a set for the worst case
FASHION = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist


def other_images(test: Tensor, rng: Generator) -> dict[str, Tensor]:
    """Sets of other images, float (N, C, H, W) in [-1, 1], by name, made from test images uint8 (N, C, H, W)."""
    n, c, h, w = test.shape
    x = data.to_float(test)
    order = torch.rand(n, 1, h * w, generator=rng).argsort(2).expand(n, c, -1)
    sets = {
        "noise (*)": 2 * torch.rand(test.shape, generator=rng) - 1,
        "one colour (*)": (2 * torch.rand(n, c, 1, 1, generator=rng) - 1).expand(test.shape),
        "shuffled pixels": x.flatten(2).gather(2, order).view(test.shape),
        "shuffled 8x8 patches (*)": shuffled_patches(x, max(2, h // 8), rng),
        "mixed pairs (*)": (x + x.roll(1, 0)) / 2,
        "blurred": functional.gaussian_blur(x, 9, 2.0),
        "inverted": -x,
        "digits": data.load("digits").test.images[:n],
        "smooth noise (*)": smooth_images(n, (c, h, w), rng),
        "shapes (*)": shape_images(n, (c, h, w), rng),
    }
    if Path(FASHION).is_dir():
        sets["Fashion-MNIST"] = data.load("fashion_mnist", FASHION).test.images[:n]
    for name in ("digits", "Fashion-MNIST"):
        if name in sets:
            sets[name] = data.to_float(functional.resize(sets[name].expand(-1, c, -1, -1), [h, w], antialias=True))
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("load_ckpt")
    parser.add_argument("--data_dir", help="where the data set is, if it has moved")
    parser.add_argument("--n", type=int, default=500, help="test images, and others of each kind (default: 500)")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    device = torch.device("cpu")
    utils.set_speed_options(device)
    given = {"mode": "test", "gpu": "cpu", "load_ckpt": args.load_ckpt}
    trained = open_trained(given | ({"data_dir": args.data_dir} if args.data_dir else {}))
    model, images = load_model(trained, device), load_data(trained, device)
    model.dtype = utils.pick_dtype("auto", device)
    order = torch.randperm(len(images.test), generator=Generator().manual_seed(0))
    test = images.test[order]

    def values(x: Tensor) -> Tensor:
        return log_density(predict(model, x))

    classified = test[:ACCURACY_IMAGES]
    right = predict(model, classified.images).argmax(1) == classified.labels
    inside = values(test.images[: args.n])
    result = {"accuracy": right.float().mean().item(), "mean": inside.mean().item(), "sd": inside.std().item()}
    print("accuracy {accuracy:.4f}; log p(x) of test images {mean:.2f} +- {sd:.2f} nats".format(**result))
    own = {"digits": "digits", "fashion_mnist": "Fashion-MNIST"}.get(trained.cfg.dataset)  # no other images
    for name, x in other_images(test.images[: args.n], Generator().manual_seed(1)).items():
        if name == own:
            continue
        outside, worst = values(x), values(moved_towards_data(model, x[:MOVED]))
        row = {"auroc": auroc(inside, outside).item(), "worst": auroc(inside, worst).item()}
        result[name] = row | {"mean": outside.mean().item()}
        print(f"{name:26}AUROC {row['auroc']:.3f}, worst case {row['worst']:.3f}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
