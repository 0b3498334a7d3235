"""Auxiliary classifiers for training: on pooled features (DHKD) and on feature maps (MHKD)."""

from __future__ import annotations

from torch import Tensor, nn

from .taps import pooled


class RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm of ``[N, D]`` that also accepts a single row, for example in the last batch of an epoch.

    A single row has no variance, so the running statistics are used.
    """

    def forward(self, input: Tensor) -> Tensor:
        if len(input) == 1:
            statistics = self.running_mean, self.running_var
            return nn.functional.batch_norm(input, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def pooled_head(kind: str, width: int, num_classes: int, *, hidden: int, dropout: float) -> nn.Module:
    """From ``[N, width]`` to logits: Linear; "nonlinear": Linear, Dropout, BatchNorm, ReLU, Linear."""
    if kind == "linear":
        return nn.Linear(width, num_classes)
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.Dropout(dropout),
        RowBatchNorm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )


class MapHead(nn.Module):
    """Twice 3x3 convolution, BatchNorm, ReLU with ``width`` channels; then the mean over space and Linear.

    With ``linears`` 2 the last part is Linear(width, width), ReLU, Linear(width, C). For features without
    space (``[N, D]``, or the mean over tokens of ``[N, L, D]``) linear layers replace the convolutions.
    """

    def __init__(
        self, shape: tuple[int, ...], num_classes: int, *, width: int = 256, linears: int = 1
    ) -> None:
        super().__init__()
        self.is_map = len(shape) == 4
        channels = shape[1] if self.is_map else shape[-1]
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            if self.is_map:
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            else:
                layers += [nn.Linear(inputs, width, bias=False), RowBatchNorm(width)]
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)
        # The keys of a single layer are those of checkpoints before there was a choice.
        self.classifier: nn.Module = nn.Linear(width, num_classes)
        if linears == 2:
            self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), self.classifier)

    def forward(self, feature: Tensor) -> Tensor:
        if not self.is_map:
            feature = pooled(feature)
        logits: Tensor = self.classifier(pooled(self.layers(feature)))
        return logits
