"""ResNet-50 as in He et al. 2015, its stride on the 3 x 3 convolution and its ReLUs in place, as torchvision has it."""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """A residual block of three convolutions, which widens `width` by four."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.reduce = _normalised(nn.Conv2d(inputs, width, 1, bias=False))
        self.across = _normalised(nn.Conv2d(width, width, 3, stride, padding=1, bias=False))
        self.expand = _normalised(nn.Conv2d(width, outputs, 1, bias=False))
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else _normalised(nn.Conv2d(inputs, outputs, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.relu(self.across(self.relu(self.reduce(x)))))
        y += x if self.shortcut is None else self.shortcut(x)
        return self.relu(y)  # type: ignore[no-any-return]


class ResNet50(nn.Sequential):
    """Logits of 1,000 classes: 25,557,032 parameters."""

    def __init__(self) -> None:
        stem = _normalised(nn.Conv2d(3, 64, 7, 2, padding=3, bias=False))
        blocks: list[nn.Module] = []
        inputs = 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(depth):
                blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
                inputs = 4 * width
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))
        super().__init__(stem, nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1), *blocks, *head)


def _normalised(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels))
