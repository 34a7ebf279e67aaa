"""The Wide-ResNet backbone (Zagoruyko & Komodakis, BMVC 2016) in the form the JEM paper's code uses.

Parameter names and shapes are those of the JEM authors' checkpoints.
"""

import math

from torch import Tensor, nn

ACTIVATIONS = {"leaky_relu": lambda: nn.LeakyReLU(0.2), "silu": nn.SiLU}
NORMS = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "group": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),
}


class Block(nn.Module):
    """A pre-activation residual block; the stride sits on the second convolution and on the shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, norm: str, dropout_rate: float, activation: str):
        super().__init__()
        self.bn1 = NORMS[norm](channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.bn2 = NORMS[norm](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout_rate)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride=stride))

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.conv1(self.activation(self.bn1(x))))
        h = self.conv2(self.activation(self.bn2(h)))
        return h + self.shortcut(x)


class WideResNet(nn.Module):
    """Images (N, C, H, W) to features (N, 64 * width), H and W multiples of 4.

    A 3x3 stem of 16 channels, three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels and
    strides 1, 2, 2, a last activation and global average pooling.
    """

    def __init__(
        self,
        channels_in: int,
        depth: int = 28,
        width: int = 10,
        norm: str = "none",
        dropout_rate: float = 0.0,
        activation: str = "leaky_relu",
    ):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"depth must be 6n + 4, not {depth}")

        def stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
            ins, strides = [channels_in, *[channels] * (n - 1)], [stride, *[1] * (n - 1)]
            return nn.Sequential(
                *(Block(i, channels, s, norm, dropout_rate, activation) for i, s in zip(ins, strides, strict=True))
            )

        n = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels_in, 16, 3, padding=1)
        self.layer1 = stage(16, 16 * width, 1)
        self.layer2 = stage(16 * width, 32 * width, 2)
        self.layer3 = stage(32 * width, 64 * width, 2)
        self.bn1 = NORMS[norm](64 * width)
        self.activation = ACTIVATIONS[activation]()
        self.n_features = 64 * width

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x.to(self.conv1.weight.dtype))  # (N, 16, H, W)
        h = self.layer1(h)  # (N, 16w, H, W)
        h = self.layer2(h)  # (N, 32w, H/2, W/2)
        h = self.layer3(h)  # (N, 64w, H/4, W/4)
        return self.activation(self.bn1(h)).mean((2, 3))  # (N, 64w)
