"""The Wide-ResNet (Zagoruyko & Komodakis, BMVC 2016), with the names and shapes of the JEM authors' checkpoints."""

import math

import torch
from torch import Tensor, nn

from utils import UserError

CIFAR10_MEAN = (0.49140, 0.48216, 0.44653)
CIFAR10_DEVIATION = (0.24703, 0.24349, 0.26159)


class Affine(nn.Module):
    """scale * (x + loc) with one of each per channel: what an activation normalisation is once it has started."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.scale * (x + self.loc)).to(x.dtype)


ACTIVATIONS = {"leaky_relu": lambda: nn.LeakyReLU(0.2), "silu": nn.SiLU, "relu": nn.ReLU}
NORMS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "act": Affine,
}


class Block(nn.Module):
    """A pre-activation residual block; the stride sits on the second convolution and on the shortcut."""

    bias, stride_first = True, False

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str, dropout_rate: float, activation: str):
        super().__init__()
        strides = (stride, 1) if self.stride_first else (1, stride)
        self.bn1 = NORMS[norm](channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, strides[0], padding=1, bias=self.bias)
        self.bn2 = NORMS[norm](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, strides[1], padding=1, bias=self.bias)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout_rate)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut.append(nn.Conv2d(channels_in, channels, 1, stride, bias=self.bias))

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.conv1(self.activation(self.bn1(x))))
        return self.conv2(self.activation(self.bn2(h))) + self.shortcut(x)


class RobustBlock(Block):
    """A pre-activation block without biases; the stride sits on the first convolution.

    Where the number of channels changes, the shortcut takes the activated input.
    """

    bias, stride_first = False, True

    def __init__(self, *args):
        super().__init__(*args)
        self.shortcut = self.shortcut[0] if len(self.shortcut) else None  # the name in checkpoints

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activation(self.bn1(x))
        h = self.conv2(self.dropout(self.activation(self.bn2(self.conv1(activated)))))
        return h + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(nn.Module):
    """Images (N, C, H, W) to features (N, 64 * width), H and W multiples of 4.

    A 3x3 stem of 16 channels, three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels and
    strides 1, 2, 2, a last activation and global average pooling. A fourth stage (SADA-JEM, for images of 64x64 and
    more) has 128 times ``width`` channels, which then are the features. Raises UserError for other depths.
    """

    block = Block

    def __init__(
        self,
        shape: tuple[int, int, int],
        depth: int = 28,
        width: int = 10,
        norm: str = "none",
        dropout_rate: float = 0.0,
        activation: str = "leaky_relu",
        stages: int = 3,
        **unused,
    ):
        super().__init__()
        if (depth - 4) % 6:
            raise UserError(f"--depth must be 6n + 4 (10, 16, 22, 28, ...), not {depth}")
        n = (depth - 4) // 6

        def stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            first = self.block(c_in, c_out, stride, norm, dropout_rate, activation)
            others = [self.block(c_out, c_out, 1, norm, dropout_rate, activation) for _ in range(n - 1)]
            return nn.Sequential(first, *others)

        self.name, self.in_channels = f"WRN-{depth}-{width}", shape[0]
        self.conv1 = nn.Conv2d(shape[0], 16, 3, padding=1, bias=self.block.bias)
        self.layer1 = stage(16, 16 * width, 1)
        self.layer2 = stage(16 * width, 32 * width, 2)
        self.layer3 = stage(32 * width, 64 * width, 2)
        self.layer4 = stage(64 * width, 128 * width, 2) if stages == 4 else nn.Sequential()
        self.n_features = (128 if stages == 4 else 64) * width
        self.bn1 = NORMS[norm](self.n_features)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)  # (N, 16, H, W)
        h = self.layer1(h)  # (N, 16w, H, W)
        h = self.layer2(h)  # (N, 32w, H/2, W/2)
        h = self.layer3(h)  # (N, 64w, H/4, W/4)
        h = self.layer4(h)  # (N, 128w, H/8, W/8), where there is one
        return self.activation(self.bn1(h)).mean((2, 3))  # (N, n_features)


class RobustWideResNet(WideResNet):
    """The Wide-ResNet of robust classifiers and of DAT (Zagoruyko & Komodakis' own form), on normalised images.

    Images (N, 3, H, W) in [-1, 1] are brought to [0, 1] and then to CIFAR-10's mean and deviation of each channel.
    """

    block = RobustBlock

    def __init__(self, shape: tuple[int, int, int], *args, **options):
        if shape[0] != 3:
            raise UserError(f"--backbone robust takes images of 3 channels, not of {shape[0]}: give --backbone jem")
        super().__init__(shape, *args, **options)
        mean, deviation = torch.tensor(CIFAR10_MEAN), torch.tensor(CIFAR10_DEVIATION)
        self.register_buffer("mean", (2 * mean - 1).view(3, 1, 1), persistent=False)
        self.register_buffer("deviation", (2 * deviation).view(3, 1, 1), persistent=False)

    @staticmethod
    def initialise(layer: nn.Module) -> None:
        """What the authors' networks start with; all else is PyTorch's default."""
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")  # deviation sqrt(2 / (k * k * channels_out))
        elif isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x - self.mean) / self.deviation)
