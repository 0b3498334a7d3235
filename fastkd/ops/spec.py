"""The single list of losses, used by kernels, plans, `fastkd check`, benchmarks and tests.

A loss is an entry of ``LOSSES``. Its name is also that of its formula in fastkd/ops/triton/formulas.py and in
csrc/row_formulas.h; names, options and needs are compared when the native library is loaded.
docs/add-a-loss.md says how to add a loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fastkd import reference

# softmax: a pass for the softmax sums of both models, a formula of the sums, a pass for the gradient.
# mixture: the same sums, a pass over a function of q and p per class, a pass for the gradient.
# pointwise: a sum over classes of a function of two logits, in a single pass.
Family = Literal["softmax", "mixture", "pointwise"]
# In fastkd.reference: (student_logits, teacher_logits, target, *options) -> losses and terms per row.
RowLoss = Callable[..., tuple[Tensor, Tensor]]


class Needs(IntFlag):
    """What a call needs of the row kernels. Each bit costs work per class."""

    DISTILLS = auto()  # the teacher is read: sums of both models at the temperature
    CROSS_ENTROPY = auto()  # of the student, at T = 1
    STUDENT_AT_T1 = auto()  # the student's sum at T = 1, if it differs from the one at the temperature
    TEACHER_AT_T1 = auto()
    CROSS_TERM = auto()  # the cross-entropy of both models instead of their divergence
    LOG_RATIO = auto()  # a gradient with the term q log(p / q), and its sum
    OWN_SLOPES = auto()  # the logits of the two models are scaled differently
    STANDARDIZED = auto()  # by mean and deviation of the row; adds an affine term to the gradient
    LABEL_SMOOTHING = auto()  # the mean of the student's logits
    SUMS_ONLY = auto()  # the softmax sums without a divergence
    LABELLED = auto()  # the target class is excluded from every sum


# Options of the losses, in the order in which kernels receive them. Fields of type float are dynamic: a new
# value needs no compilation. Fields of type bool are static: they select code. Dynamic fields come first.


class SoftmaxOptions(NamedTuple):
    temperature: float
    ce_weight: float = 0.0
    kd_weight: float = 0.0
    tckd_weight: float = 0.0
    nckd_weight: float = 0.0
    label_smoothing: float = 0.0
    standardize: bool = False
    fix_acquired: bool = False


class NKDOptions(NamedTuple):
    temperature: float
    gamma: float


class TTMOptions(NamedTuple):
    gamma: float
    weighted: bool = False


class TemperatureOptions(NamedTuple):
    temperature: float


class JSDOptions(NamedTuple):
    temperature: float
    beta: float
    rest: float  # 1 - beta, of which float32 would lose digits where beta is near 1

    @classmethod
    def of(cls, temperature: float, beta: float) -> "JSDOptions":
        return cls(temperature, beta, 1.0 - beta)


class SkewOptions(NamedTuple):
    temperature: float
    skew: float
    rest: float  # 1 - skew, likewise

    @classmethod
    def of(cls, temperature: float, skew: float) -> "SkewOptions":
        return cls(temperature, skew, 1.0 - skew)


class Case(NamedTuple):
    """A public call and the kernel options that it results in. Together the cases reach all kernel code."""

    name: str
    function: str  # of the package fastkd
    arguments: Mapping[str, Any]
    options: Any  # that result from the arguments
    labelled: bool = False  # the loss depends on the target
    vanishes: bool = True  # no gradient at equal logits
    benchmarked: bool = False


@dataclass(frozen=True, eq=False)
class Loss:
    name: str
    family: Family
    rows: RowLoss  # the specification
    options: type[Any]
    needs: Callable[[Any], Needs]
    cases: tuple[Case, ...]
    takes_label: bool = False
    terms: tuple[str, ...] = ()
    # About the largest gradient of a row by its logits, of weight 1, given options and the number of classes:
    # what float16 must hold. The options may be tensors: arithmetic without a condition on them.
    bound: Callable[[Any, int], Any] = lambda options, classes: 1.0
    # The gradient may be written over the student's logits: each is read once, and before.
    may_alias: bool = False
    # For the first options: the value that selects other code.
    code_values: tuple[float, ...] = ()
    # The temperatures of student and teacher.
    temperatures: Callable[[Any], tuple[float, float]] = lambda options: (options.temperature,) * 2
    # Options of a term of the student's logits alone, at T = 1.
    of_student: tuple[str, ...] = ()
    # A teacher known at K classes must know the label, if there is one.
    labelled_at_k: Callable[[Any], bool] = lambda options: True
    # Why it is not defined for such a teacher, with these options; None if it is.
    undefined_at_k: Callable[[Any], str | None] = lambda options: None
    # It is infinite for a teacher without probability outside of the known classes.
    needs_rest: bool = False

    def at_k(self, options: Sequence[float]) -> tuple[float, ...]:
        """The options of the terms that a teacher known at K classes has: without those ``of_student``."""
        names = self.options._fields
        return tuple(
            0.0 if name in self.of_student else value for name, value in zip(names, options, strict=True)
        )

    def of_student_only(self, options: Sequence[float]) -> tuple[float, ...]:
        """The options of the other terms. They do not read the temperature, which is 1 here."""
        names = self.options._fields
        values = zip(names, options, strict=True)
        return tuple(
            value if name in self.of_student else float(name == "temperature") for name, value in values
        )

    @property
    def dynamic(self) -> int:
        """How many of the options are dynamic: the first ones."""
        return sum(kind is float for kind in self.options.__annotations__.values())


def _distills(options: SoftmaxOptions) -> bool:
    return options.kd_weight != 0 or options.tckd_weight != 0 or options.nckd_weight != 0


def without_unread_temperature(options: SoftmaxOptions) -> SoftmaxOptions:
    """The same loss; a cross-entropy alone at T = 1, where it needs one exponential per class and not two."""
    return options if _distills(options) else options._replace(temperature=1.0)


def _softmax_needs(options: SoftmaxOptions) -> Needs:
    needs = Needs(0)
    distills = _distills(options)
    standardizes = bool(options.standardize) and distills
    if distills:
        needs |= Needs.DISTILLS
    if options.ce_weight != 0:
        needs |= Needs.CROSS_ENTROPY
        # At T = 1 the cross-entropy uses the same exponentials.
        if options.temperature != 1 or standardizes:
            needs |= Needs.STUDENT_AT_T1
    if options.label_smoothing != 0:
        needs |= Needs.LABEL_SMOOTHING
    if standardizes:
        needs |= Needs.OWN_SLOPES | Needs.STANDARDIZED
    return needs


def _softmax_bound(options: SoftmaxOptions, classes: int) -> float:
    distillation = abs(options.kd_weight) + abs(options.tckd_weight) + abs(options.nckd_weight)
    return abs(options.ce_weight) + options.temperature * distillation


def _ttm_bound(options: TTMOptions, classes: int) -> float:
    """WTTM's weight, sum_i p_i^gamma, is largest where the teacher is uniform."""
    return 1.0 + classes ** (1.0 - options.gamma) if options.weighted else 1.0


def _softmax_at_k(options: SoftmaxOptions) -> str | None:
    if options.standardize:
        return "with standardize=True: mean and deviation of the teacher's logits are not known"
    return None


def _nkd_at_k(options: NKDOptions) -> str | None:
    return (
        None
        if options.temperature == 1
        else "at a temperature other than 1: NKD reads the teacher at T = 1 too"
    )


def _ttm_at_k(options: TTMOptions) -> str | None:
    if options.weighted and options.gamma != 1:
        return "with weighted=True and a gamma other than 1: the weight is of the teacher at T = 1"
    return None


def _nkd_needs(options: NKDOptions) -> Needs:
    needs = Needs.DISTILLS | Needs.CROSS_TERM
    return needs if options.temperature == 1 else needs | Needs.STUDENT_AT_T1 | Needs.TEACHER_AT_T1


def _case(
    name: str,
    function: str,
    options: Any,
    *,
    labelled: bool = False,
    vanishes: bool = True,
    benchmarked: bool = False,
    **arguments: Any,
) -> Case:
    return Case(name, function, arguments, options, labelled, vanishes, benchmarked)


def _distill(name: str, *, benchmarked: bool = False, **arguments: Any) -> Case:
    """A case with a cross-entropy, whose minimum is not at the teacher's logits."""
    options = without_unread_temperature(SoftmaxOptions(**{"temperature": 4.0, **arguments}))
    return Case(name, "distill_loss", arguments, options, True, False, benchmarked)


_DKD = SoftmaxOptions(4.0, tckd_weight=1.0, nckd_weight=8.0)
_LSKD = SoftmaxOptions(2.0, kd_weight=1.0, standardize=True)
_SOFTMAX_CASES = (
    _case("kd", "kd_loss", SoftmaxOptions(4.0, kd_weight=1.0), benchmarked=True),
    _case("kd-t1", "kd_loss", SoftmaxOptions(1.0, kd_weight=1.0), temperature=1.0),
    _case("lskd", "kd_loss", _LSKD, benchmarked=True, temperature=2.0, standardize=True),
    _case("dkd", "dkd_loss", _DKD, labelled=True, benchmarked=True),
    _case("ls-dkd", "dkd_loss", _DKD._replace(standardize=True), labelled=True, standardize=True),
    _case("tckd", "dkd_loss", SoftmaxOptions(4.0, tckd_weight=1.0), labelled=True, beta=0.0),
    _case("nckd", "dkd_loss", SoftmaxOptions(4.0, nckd_weight=1.0), labelled=True, alpha=0.0, beta=1.0),
    _case("dckd", "dckd_loss", _DKD._replace(fix_acquired=True), labelled=True),
    _distill("ce", ce_weight=1.0),
    _distill("ce-smoothed", ce_weight=1.0, temperature=1.0, label_smoothing=0.1),
    _distill("ce-kd", ce_weight=0.1, kd_weight=0.9, benchmarked=True),
    _distill("ce-kd-smoothed", ce_weight=0.1, kd_weight=0.9, label_smoothing=0.1),
    _distill("ce-kd-t1", ce_weight=0.5, kd_weight=0.5, temperature=1.0),
    _distill("ce-kd-t1-smoothed", ce_weight=0.5, kd_weight=0.5, temperature=1.0, label_smoothing=0.1),
    _distill("ce-dkd", ce_weight=1.0, tckd_weight=1.0, nckd_weight=8.0, label_smoothing=0.1),
    _distill("ce-dckd", ce_weight=1.0, tckd_weight=1.0, nckd_weight=2.0, fix_acquired=True),
    _distill("ce-lskd", ce_weight=0.1, kd_weight=9.0, temperature=2.0, standardize=True),
    _distill(
        "ce-lskd-smoothed",
        ce_weight=0.1,
        kd_weight=9.0,
        temperature=2.0,
        standardize=True,
        label_smoothing=0.1,
    ),
)


def _mixture(name: str, rows: RowLoss, options: type[Any], *cases: Case) -> Loss:
    needs = Needs.DISTILLS | Needs.SUMS_ONLY
    return Loss(
        name,
        "mixture",
        rows,
        options,
        lambda values: needs,
        cases,
        bound=lambda values, classes: 4.0 / values.temperature,
    )


def _pointwise(name: str, rows: RowLoss, options: type[Any], *cases: Case) -> Loss:
    return Loss(
        name,
        "pointwise",
        rows,
        options,
        lambda values: Needs.DISTILLS,
        cases,
        bound=lambda values, classes: values.temperature,
        may_alias=True,
        undefined_at_k=lambda values: "because it compares each class by itself, and needs all of them",
    )


_ROWS = (
    Loss(
        "softmax",
        "softmax",
        reference.softmax_rows,
        SoftmaxOptions,
        _softmax_needs,
        _SOFTMAX_CASES,
        takes_label=True,
        terms=("ce", "kd", "tckd", "nckd"),
        bound=_softmax_bound,
        code_values=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        of_student=("ce_weight", "label_smoothing"),
        labelled_at_k=lambda options: options.tckd_weight != 0 or options.nckd_weight != 0,
        undefined_at_k=_softmax_at_k,
    ),
    Loss(
        "nkd",
        "softmax",
        reference.nkd_rows,
        NKDOptions,
        _nkd_needs,
        (
            _case("nkd", "nkd_loss", NKDOptions(1.0, 1.5), labelled=True, vanishes=False),
            _case(
                "nkd-t3",
                "nkd_loss",
                NKDOptions(3.0, 3.5),
                labelled=True,
                vanishes=False,
                gamma=3.5,
                temperature=3.0,
            ),
        ),
        takes_label=True,
        bound=lambda options, classes: 1.0 + abs(options.gamma) * options.temperature,
        code_values=(1.0,),
        undefined_at_k=_nkd_at_k,
    ),
    Loss(
        "ttm",
        "softmax",
        reference.ttm_rows,
        TTMOptions,
        lambda options: Needs.DISTILLS | Needs.OWN_SLOPES | Needs.TEACHER_AT_T1,
        (
            _case("ttm", "ttm_loss", TTMOptions(0.25), vanishes=False, gamma=0.25),
            _case("wttm", "ttm_loss", TTMOptions(0.25, True), vanishes=False, gamma=0.25, weighted=True),
        ),
        bound=_ttm_bound,
        temperatures=lambda options: (1.0, 1.0 / options.gamma),
        undefined_at_k=_ttm_at_k,
    ),
    Loss(
        "reverse_kl",
        "softmax",
        reference.reverse_kl_rows,
        TemperatureOptions,
        lambda options: Needs.DISTILLS | Needs.LOG_RATIO,
        (_case("reverse-kl", "reverse_kl_loss", TemperatureOptions(2.0), temperature=2.0),),
        bound=lambda options, classes: 16.0 / options.temperature,  # grows with the logits
        needs_rest=True,
    ),
    _mixture(
        "jsd",
        reference.jsd_rows,
        JSDOptions,
        _case("jsd", "jsd_loss", JSDOptions.of(1.0, 0.5), benchmarked=True),
        _case("jsd-0.1", "jsd_loss", JSDOptions.of(2.0, 0.1), beta=0.1, temperature=2.0),
    ),
    _mixture(
        "tvd",
        reference.tvd_rows,
        TemperatureOptions,
        _case("tvd", "tvd_loss", TemperatureOptions(1.0), benchmarked=True),
    ),
    _mixture(
        "skew_kl",
        reference.skew_kl_rows,
        SkewOptions,
        _case("skew-kl", "skew_kl_loss", SkewOptions.of(1.0, 0.1), benchmarked=True),
        _case("skew-kl-0.7", "skew_kl_loss", SkewOptions.of(2.0, 0.7), temperature=2.0, skew=0.7),
    ),
    _mixture(
        "skew_reverse_kl",
        reference.skew_reverse_kl_rows,
        SkewOptions,
        _case("skew-reverse-kl", "skew_kl_loss", SkewOptions.of(1.0, 0.1), reverse=True),
    ),
    _pointwise(
        "binary_kl",
        reference.binary_kl_rows,
        TemperatureOptions,
        _case("binary-kl", "binary_kl_loss", TemperatureOptions(2.0)),
    ),
    _pointwise(
        "binary_kl_norm",
        reference.binary_kl_norm_rows,
        TemperatureOptions,
        _case("binary-kl-norm", "binary_kl_norm_loss", TemperatureOptions(2.0), benchmarked=True),
    ),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ROWS}
CASES: dict[str, tuple[Loss, Case]] = {case.name: (loss, case) for loss in _ROWS for case in loss.cases}


@lru_cache(maxsize=1024)
def needs_of(loss: Loss, options: tuple[float, ...], labelled: bool) -> int:
    """Return the bits of ``Needs`` for these values of ``loss.options``."""
    needs = loss.needs(loss.options(*options))
    return int(needs | Needs.LABELLED if labelled else needs)


def distinct_cases() -> dict[str, tuple[Loss, Case]]:
    """One case per compiled kernel: per loss and needs."""
    names: dict[tuple[str, int], str] = {}
    for name, (loss, case) in CASES.items():
        names.setdefault((loss.name, needs_of(loss, case.options, case.labelled)), name)
    return {name: CASES[name] for name in names.values()}
