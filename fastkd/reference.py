"""The losses in plain torch: the specification of every kernel, and the eager backend.

Each function takes logits ``[N, C]`` and returns one value per row, in float32 (float64 for float64
logits), before any reduction. They are twice differentiable and import nothing from the package.

Notation: u = z_s / T, v = z_t / T, q = softmax(u), p = softmax(v), y the label, hats renormalised
over the classes that are not y. T^2 is included, so that a weight means the same at every T.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this a logit is a masked class. It is finite so that the difference of two masked logits is 0
# rather than NaN, and far enough from float32's range that differences and T^2 do not overflow.
MASKED = -(2.0**100)
# Of a class that is left out of a softmax: below a masked one at any temperature from 1e-6 on.
EXCLUDED = -(2.0**120)
STANDARDIZE_EPSILON = 1e-7


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision raised to float32; float64 stays float64."""
    return values if values.dtype == torch.float64 else values.float()


def as_float(logits: Tensor) -> Tensor:
    """Logits converted to float32 (float64 unchanged) and clamped from below to MASKED."""
    wide = at_least_float32(logits)
    return wide.masked_fill(wide < MASKED, MASKED)  # unlike clamp_min, propagates NaN to the gradient


def centered(logits: Tensor) -> Tensor:
    """z - mean of each row, in float32 at least: half precision would round the difference once more."""
    wide = at_least_float32(logits)
    return wide - wide.mean(-1, keepdim=True)


def standardized(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) of each row, std with C - 1 (logit standardisation, Sun et al. 2024)."""
    return centered(logits) / (logits.std(-1, keepdim=True) + STANDARDIZE_EPSILON)


def known_classes(logits: Tensor, indices: Tensor, temperature: float) -> Tensor:
    """Logits of K + 1 classes: those of ``indices`` [N, K], and all others as one, T log sum exp(z_j / T).

    At this temperature its softmax has the probabilities of the K classes, and the sum of the others'.
    """
    z = as_float(logits)
    rest = (z / temperature).scatter(1, indices, MASKED / temperature).logsumexp(-1, keepdim=True)
    return torch.cat([z.gather(1, indices), temperature * rest], 1)


def kl_from_logits(u: Tensor, v: Tensor) -> Tensor:
    """KL(softmax(v) || softmax(u)) of each row."""
    log_q, log_p = u.log_softmax(-1), v.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def target_kl(u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """TCKD: KL of (p_y, 1 - p_y) from (q_y, 1 - q_y), through the log odds of the label."""
    m_s, m_t = label_log_odds(u, target), label_log_odds(v, target)
    # In terms of the outcome that the teacher gives the smaller probability: the log odds of a certain one
    # are too large to be added to anything.
    sign = 1 - 2 * (m_t > 0).to(m_t)
    m_s, m_t = sign * m_s, sign * m_t
    return m_t.sigmoid() * (m_t - m_s) + softplus(m_s) - softplus(m_t)


def label_log_odds(logits: Tensor, target: Tensor) -> Tensor:
    """log(p_y / (1 - p_y)), with the label excluded from the sum so that nothing cancels."""
    label = target[:, None]
    others = logits.scatter(1, label, EXCLUDED).logsumexp(-1)
    return logits.gather(1, label)[:, 0] - others


def nontarget_kl(u: Tensor, v: Tensor, target: Tensor) -> Tensor:
    """NCKD: KL between the distributions over the classes that are not the label."""
    label = target[:, None]
    return kl_from_logits(u.scatter(1, label, EXCLUDED), v.scatter(1, label, EXCLUDED))


def softmax_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    tckd_weight: float,
    nckd_weight: float,
    label_smoothing: float,
    standardize: float,
    fix_acquired: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """w_ce CE + T^2 (w_kd KD + w_t TCKD + w_n NCKD): the row loss [N] and its four terms [4, N].

    Terms are unweighted (T^2 included), and 0 if their weight is 0. CE is of the raw student logits at
    T = 1, even if the distillation terms are standardised. ``target`` [N] int64; for CE and KD also
    probabilities [N, C]. With ``fix_acquired`` TCKD is 0 where the student is at least as confident in the
    target class as the teacher.
    Hinton et al. 2015; Zhao et al. 2022.
    """
    z_s, z_t = as_float(student_logits), as_float(teacher_logits)
    u, v = (standardized(z_s), standardized(z_t)) if standardize else (z_s, z_t)
    u, v = u / temperature, v / temperature
    square = temperature * temperature
    # Zeros that are part of the graph, so that the loss has a (zero) gradient if all weights are 0.
    ce = kd = tckd = nckd = z_s[:, :0].sum(-1)
    if kd_weight:
        kd = square * kl_from_logits(u, v)
    if target is not None:
        if ce_weight:
            log_q = z_s.log_softmax(-1)
            if target.is_floating_point():
                ce = -(target.to(log_q.dtype) * log_q).sum(-1)
            else:
                ce = -log_q.gather(1, target[:, None])[:, 0]
            if label_smoothing:
                ce = (1 - label_smoothing) * ce - label_smoothing * log_q.mean(-1)
        if tckd_weight:
            tckd = square * target_kl(u, v, target)
            if fix_acquired:
                teacher_leads = label_log_odds(v, target) > label_log_odds(u, target)
                tckd = tckd.masked_fill(~teacher_leads, 0.0)
        if nckd_weight:
            nckd = square * nontarget_kl(u, v, target)
    terms = torch.stack([ce, kd, tckd, nckd])
    loss = ce_weight * ce + kd_weight * kd + tckd_weight * tckd + nckd_weight * nckd
    return loss, terms


def nkd_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, temperature: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """NKD: -p_y log q_y at T = 1, minus gamma T^2 sum over i != y of p-hat_i log q-hat_i (Yang 2023)."""
    z_s, z_t = as_float(student_logits), as_float(teacher_logits)
    label = target[:, None]
    p_y = label_log_odds(z_t, target).sigmoid()
    log_p_hat = (z_t / temperature).scatter(1, label, EXCLUDED).log_softmax(-1)
    log_q_hat = (z_s / temperature).scatter(1, label, EXCLUDED).log_softmax(-1)
    nontarget = -(log_p_hat.exp() * log_q_hat).scatter(1, label, 0.0).sum(-1)
    row = p_y * softplus(-label_log_odds(z_s, target)) + gamma * temperature * temperature * nontarget
    return row, no_terms(row)


def ttm_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, gamma: float, weighted: float
) -> tuple[Tensor, Tensor]:
    """TTM: KL(softmax(gamma z_t) || softmax(z_s)); ``weighted`` (WTTM) times sum_i softmax(z_t)_i^gamma.
    Zheng and Yang 2024."""
    z_s, z_t = as_float(student_logits), as_float(teacher_logits)
    row = kl_from_logits(z_s, gamma * z_t)
    if weighted:
        row = row * (gamma * z_t.log_softmax(-1)).exp().sum(-1)
    return row, no_terms(row)


def reverse_kl_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """KL(q || p), without T^2."""
    row = kl_from_logits(as_float(teacher_logits) / temperature, as_float(student_logits) / temperature)
    return row, no_terms(row)


def jsd_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    temperature: float,
    beta: float,
    rest: float,
) -> tuple[Tensor, Tensor]:
    """Generalised JSD: beta KL(p || m) + rest KL(q || m), m = beta p + rest q, rest = 1 - beta, without
    T^2."""
    log_q = (as_float(student_logits) / temperature).log_softmax(-1)
    log_p = (as_float(teacher_logits) / temperature).log_softmax(-1)
    log_m = _log_of_mixture(log_p, beta, log_q, rest)
    student = (log_q.exp() * (log_q - log_m)).sum(-1)
    teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    row = beta * teacher + rest * student
    return row, no_terms(row)


def _log_of_mixture(log_x: Tensor, share: float, log_y: Tensor, rest: float) -> Tensor:
    one = log_x.new_ones(())
    return torch.logaddexp(log_x + (one * share).log(), log_y + (one * rest).log())


def tvd_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """Total variation distance: 1/2 sum_i |p_i - q_i|, without T^2."""
    q = (as_float(student_logits) / temperature).softmax(-1)
    p = (as_float(teacher_logits) / temperature).softmax(-1)
    difference = p - q
    # The differences, whose sum is 0, take the slope that most of a concentrated student's probability has in
    # common out of the gradient, where it would cancel and leave the rounding of torch's softmax. The
    # product is 0, or NaN, where torch's abs has the slope 0.
    row = (difference.abs() + difference + 0.0 * difference * difference).sum(-1) / 2
    return row, no_terms(row)


def skew_kl_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, *options: float
) -> tuple[Tensor, Tensor]:
    """Skew KL: KL(p || m), m = skew p + (1 - skew) q, without T^2. Ko et al. 2024 (DistiLLM)."""
    return _kl_from_mixture(teacher_logits, student_logits, *options)


def skew_reverse_kl_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, *options: float
) -> tuple[Tensor, Tensor]:
    """Skew reverse KL: KL(q || m), m = (1 - skew) p + skew q, without T^2. Ko et al. 2024 (DistiLLM)."""
    return _kl_from_mixture(student_logits, teacher_logits, *options)


def _kl_from_mixture(
    logits: Tensor, other_logits: Tensor, temperature: float, skew: float, rest: float
) -> tuple[Tensor, Tensor]:
    """KL of the first distribution from skew times itself plus rest = 1 - skew times the other."""
    log_x = (as_float(logits) / temperature).log_softmax(-1)
    log_y = (as_float(other_logits) / temperature).log_softmax(-1)
    log_m = _log_of_mixture(log_x, skew, log_y, rest)
    x = log_x.exp()
    # m - x, whose sum is 0, takes the common slope out of the gradient, as in tvd_rows.
    row = (x * (log_x - log_m) + (log_m.exp() - x)).sum(-1)
    return row, no_terms(row)


def no_terms(row: Tensor) -> Tensor:
    return row.new_zeros(0, row.shape[0])


def binary_kl_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """BinaryKL: T^2 sum_i KL(Bern(sigmoid(v_i)) || Bern(sigmoid(u_i))). Yang et al. 2024 (DHKD)."""
    u, v = as_float(student_logits) / temperature, as_float(teacher_logits) / temperature
    row = v.sigmoid() * (v - u) + softplus(u) - softplus(v)
    return temperature * temperature * row.sum(-1), no_terms(row)


def binary_kl_norm_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """BinaryKL-Norm: T^2 sum_i KL(Bern(1/2) || Bern(sigmoid(u_i - v_i))), which is
    T^2 sum_i log cosh((z_s - z_t) / 2T). Yang et al. 2024 (DHKD)."""
    x = (as_float(student_logits) - as_float(teacher_logits)) / (2 * temperature)
    row = log_cosh(x).sum(-1)
    return temperature * temperature * row, no_terms(row)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x). torch's softplus is linear above 20: an error of 2e-9, too large for float64."""
    return -F.logsigmoid(-x)


def log_cosh(x: Tensor) -> Tensor:
    """log(cosh(x)) without overflow, and without cancellation for small x."""
    # |x| + softplus(-2|x|) - log 2 cancels for small x; the series is accurate there.
    small = x.abs() < 0.05 if x.dtype == torch.float32 else x.abs() < 1e-3
    inner = x.masked_fill(~small, 0.0)
    square = inner * inner
    series = square * (0.5 - square * (1 / 12 - square / 45))
    outer = x.masked_fill(small, 1.0).abs()
    return torch.where(small, series, outer + softplus(-2 * outer) - math.log(2))
