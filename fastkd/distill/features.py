"""Feature and relation terms that can be added to any method: FitNets' hint, RKD's relations."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.reference import at_least_float32

from .heads import RowBatchNorm
from .taps import FeatureError, pooled, width_of

Projection = Literal["bn_relu", "linear"]


class Hint(nn.Module):
    """Mean squared error between a projected student feature and the teacher's (Romero et al. 2015).

    The projection "linear" is a 1x1 convolution for feature maps ``[N, D, H, W]``, and a linear layer for
    ``[N, D]`` and ``[N, L, D]``; "bn_relu" adds BatchNorm and ReLU, as CRD's benchmark does. Maps of
    different sizes are compared at the smaller height and the smaller width of the two, to which
    ``adaptive_avg_pool2d`` reduces each map that is larger. Raises ``FeatureError`` for different numbers of
    tokens, which are not a grid, or a map beside a vector.
    """

    def __init__(
        self, student: torch.Size, teacher: torch.Size, layers: tuple[str, str], projection: Projection
    ) -> None:
        super().__init__()
        _check_comparable(student, teacher, layers)
        self.teacher_layer = layers[1]
        widths = width_of(student), width_of(teacher)
        linear: nn.Module = nn.Conv2d(*widths, 1) if len(student) == 4 else nn.Linear(*widths)
        if projection == "linear":
            self.projection = linear
            return
        norm = nn.BatchNorm2d(widths[1]) if len(student) == 4 else RowBatchNorm(widths[1])
        self.projection = nn.Sequential(linear, norm, nn.ReLU())

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.dim() == 4:
            student, teacher = _at_one_size(student, teacher)
        elif student.dim() == 3:  # each token is a row, of which BatchNorm takes the statistics
            student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        projected = at_least_float32(self.projection(student))
        return F.mse_loss(projected, teacher.to(projected.dtype))

    def describe(self, teacher: Tensor) -> list[str]:
        """A warning if the projection ends in a ReLU but many of the teacher's values are negative."""
        if not isinstance(self.projection, nn.Sequential):
            return []
        negative = (teacher < 0).double().mean().item()
        if negative < 0.01:
            return []
        return [
            f"{negative:.0%} of the teacher's values at {self.teacher_layer!r} are negative, which the "
            "projection of the hint cannot reach, since it ends in a ReLU: name a layer after an activation, "
            "or take hint_projection: linear with a far smaller hint_weight"
        ]


def _check_comparable(student: torch.Size, teacher: torch.Size, layers: tuple[str, str]) -> None:
    if len(student) != len(teacher):
        needs = "two feature maps [N, D, H, W], two sequences of tokens [N, L, D] or two vectors [N, D]"
    elif len(student) == 3 and student[1] != teacher[1]:
        needs = "as many tokens L of both models, in [N, L, D]"
    else:
        return
    raise FeatureError(
        f"a hint needs {needs}, but the student's layer {layers[0]!r} gives {_sizes(student)} and the "
        f"teacher's layer {layers[1]!r} {_sizes(teacher)}"
    )


def _at_one_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the smaller height and the smaller width; a map of this size unchanged."""
    height, width = (min(student.shape[dim], teacher.shape[dim]) for dim in (2, 3))

    def pooled_to_size(feature: Tensor) -> Tensor:
        if feature.shape[2:] == (height, width):
            return feature
        return F.adaptive_avg_pool2d(feature, (height, width))

    return pooled_to_size(student), pooled_to_size(teacher)


def _sizes(shape: torch.Size) -> str:
    return "[" + ", ".join(["N", *map(str, shape[1:])]) + "]"


def over_all_ranks(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features of all ranks' rows, the same number on each; with one rank, the features unchanged.

    The gradient flows to this rank's rows, multiplied by the number of ranks: DDP's average over ranks is
    then the gradient of the loss, which is the same on all ranks.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return student, teacher
    if not torch.is_grad_enabled():  # a check of shapes, which a rank may run alone
        return student, teacher
    world, rank = dist.get_world_size(), dist.get_rank()
    gathered = []
    for own in (_flat(student), _flat(teacher)):
        parts = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(parts, own.detach().contiguous())
        parts[rank] = own.clone()
        if own.requires_grad:
            parts[rank].register_hook(lambda gradient: gradient * world)
        gathered.append(torch.cat(parts))
    return gathered[0], gathered[1]


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the pairwise distances, each divided by their mean (RKD-D, Park et al. 2019).

    Features are ``[N, D]``; feature maps are averaged over space. The widths may differ.
    """
    # Distances of near points cancel in half precision.
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_distances(_flat(student)), _distances(_flat(teacher)))


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the cosines of the angles that triples of the batch span (RKD-A, Park et al. 2019).

    Needs memory for N^3 numbers.
    """
    with torch.autocast(student.device.type, enabled=False):
        return F.smooth_l1_loss(_angles(_flat(student)), _angles(_flat(teacher)))


def _flat(feature: Tensor) -> Tensor:
    return at_least_float32(pooled(feature))


def _distances(points: Tensor) -> Tensor:
    # |a|^2 + |b|^2 - 2ab cancels where points are much nearer to each other than to the origin. Distances do
    # not depend on the origin, so it is moved to the mean of the points, which needs no gradient.
    points = points - points.detach().mean(0)
    squares = points.pow(2).sum(1)
    squared = (squares[:, None] + squares[None, :] - 2 * points @ points.T).clamp_min(1e-12)
    off_diagonal = ~torch.eye(len(points), dtype=torch.bool, device=points.device)
    distances = torch.where(off_diagonal, squared, 1.0).sqrt() * off_diagonal
    return distances / (distances.sum() / off_diagonal.sum().clamp_min(1)).clamp_min(1e-12)


def _angles(points: Tensor) -> Tensor:
    # Entry [i, j, k] is the cosine at point i between the directions to j and to k.
    differences = points[None, :, :] - points[:, None, :]
    lengths = torch.linalg.vector_norm(differences, dim=2, keepdim=True)
    # Equal points have no direction. Zeros have no gradient, but that of F.normalize at 0 is 1e12.
    apart = lengths != 0  # true for NaN, which must stay
    directions = torch.where(apart, differences / torch.where(apart, lengths, 1.0), 0.0)
    return directions @ directions.transpose(1, 2)
