"""Binds, specialises and compiles every launch of the Triton kernels as on a GPU, without a GPU.

``launch.row_loss`` runs on CPU tensors as on a GPU (``fake_gpu.py``), and ``JITFunction.run`` is replaced
to record the launches. A recorded launch can be compiled, and passed to NVIDIA's launcher with a stub of
libcuda.

    python tools/jit_launches.py [--bind [N]] [--compile N] [--target sm_90 gfx942]

--bind binds and specialises every call, or every Nth; --compile compiles calls that cover all N-tuples of
argument values, and on NVIDIA targets launches them into the stub. Exit status 1 if one fails.

Import it before any kernel, so that the kernels are not defined for the interpreter.
"""

import argparse
import ctypes
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import fake_gpu
import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastkd.ops import spec
from fastkd.ops.call import Call as LossCall
from fastkd.ops.call import Marks, Outputs
from fastkd.ops.triton import launch as launcher
from fastkd.ops.triton import launch_options, row_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- recorded launches ---------------------------------------------------------------------------------

_run = JITFunction.run
_keys: dict[tuple[Any, ...], tuple[str, str, str]] = {}  # of Triton's JIT, by that of ``launch_options``


class Variant(NamedTuple):
    """A kernel with the arguments of a launch; equal keys share a compiled kernel."""

    key: tuple[str, str, str]
    kernel: JITFunction
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def compile(self) -> Any:
        return _run(self.kernel, *self.arguments, grid=(1,), warmup=True, **self.keywords)

    def launch(self) -> None:
        """Through the driver's launcher, as on a GPU: by the JIT, and again as a compiled kernel."""
        for _ in range(2):
            launch_options.launch(self.kernel, (1, 1, 1), self.arguments, self.keywords)


def record(function: Callable[[], object]) -> list[Variant]:
    """Run ``function`` and return its launches, bound and specialised for the current target."""
    made: list[Variant] = []

    def bind(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        binder = self.device_caches[driver.active.get_current_device()][-1]
        _, specialization, options = binder(*arguments, **keywords)
        key = (self.__name__, str(specialization), str(sorted(options.items())))
        own = launch_options.key_of(self, arguments, keywords)
        if driver.active.get_current_target().backend == "cuda" and _keys.setdefault(own, key) != key:
            raise RuntimeError(f"launch_options.key_of is the same for {key} and {_keys[own]}")
        made.append(Variant(key, self, arguments, keywords))

    JITFunction.run = bind
    try:
        function()
    finally:
        JITFunction.run = _run
    return made


# ---- the launches --------------------------------------------------------------------------------------


LOSSES = spec.distinct_cases()
SCALE = "scale"  # gradient scaling, in addition to the losses
# Of labels; the weights, if there are any, have the dtype of the student, and are averaged with `gradient`.
WEIGHTS = "row weights"
# (rows, classes): several rows per program; one row per program; streamed, whole or split, with wide loads or
# without.
PATHS = {
    "C 10": (300, 10),
    "C 100": (300, 100),
    "C 1000": (300, 1000),
    "C 4096": (300, 4096),
    "C 8192": (300, 8192),
    "C 20902": (300, 20902),
    "C 20902, few rows": (4, 20902),
    "C 32768": (300, 32768),
}
# Known classes of a teacher: in one step of a program, and in several.
KNOWN = (5, 3000)


class Call(NamedTuple):
    """A call of the launcher; the fields' values are all that the library can pass."""

    loss: str
    path: str
    student: str = "fp32"  # dtypes
    teacher: str = "fp32"
    layout: str = "dense"  # of the logits: LAYOUTS
    weights: str = "none"  # WEIGHTS_OF, LABELS_OF
    terms: bool = False
    gradient: bool = True
    dynamic: bool = False  # options
    pairs: int = 1
    known: int = 0  # the teacher's known classes; 0: all
    summed: bool = False  # over rows

    def __str__(self) -> str:
        dtypes = self.student if self.student == self.teacher else f"{self.student} {self.teacher}"
        words = [self.loss, self.path, dtypes]
        words += [] if self.layout == "dense" else [self.layout]
        words += [] if self.weights == "none" else [f"weights of {self.weights}"]
        words += [name for name in ("terms", "dynamic", "summed") if getattr(self, name)]
        words += [] if self.gradient else ["no gradient"]
        words += [f"{self.known} classes known"] if self.known else []
        return ", ".join(words + ([f"{self.pairs} pairs"] if self.pairs > 1 else []))

    def launches(self) -> list[Variant]:
        return record(self)

    def __call__(self) -> None:
        rows, classes = PATHS[self.path]
        student, teacher = (DTYPES[name] for name in (self.student, self.teacher))
        if self.loss == SCALE:
            launcher.scale_rows_(matrix(rows, classes, student, self.layout), torch.ones(1, rows))
            return
        if self.loss == WEIGHTS:
            weight = None if self.weights == "none" else torch.ones(rows, dtype=student)
            row_weights.row_weights(Marks(torch.zeros(rows, dtype=torch.int64), -100, self.gradient), weight)
            return
        loss, case = LOSSES[self.loss]
        options, dynamic = tuple(map(float, case.options)), None
        if self.dynamic:
            dynamic = torch.tensor(options)
            options = tuple(value if value in (0.0, 1.0) else math.nan for value in options)
        mean = self.weights.endswith("counted labels")
        marks = Marks(torch.zeros(rows, dtype=torch.int64), -100, mean) if "labels" in self.weights else None
        weights = {"rows": torch.ones(rows), "pairs": torch.ones(self.pairs, rows)}
        weight = weights.get(self.weights.split()[0])
        call = LossCall(
            target=torch.zeros(rows, dtype=torch.int64) if case.labelled else None,
            row_weight=weight, divisor=rows, loss=loss.name, options=options, dynamic=dynamic,
            backend="triton", reduced=False, with_terms=self.terms, with_gradient=self.gradient,
            indices=torch.zeros(rows, self.known, dtype=torch.int64) if self.known else None, marks=marks,
        )  # fmt: skip
        terms = torch.empty(len(loss.terms), rows * self.pairs) if self.terms else None
        gradient = matrix(rows * self.pairs, classes, student, "dense") if self.gradient else None
        students = [matrix(rows, classes, student, self.layout)]
        teachers = [matrix(rows, classes, teacher, self.layout)]
        if self.known:
            teachers = [matrix(rows, self.known + 1, teacher, "dense")]
        outputs = Outputs(torch.empty(rows * self.pairs), terms, gradient)
        if self.summed:
            outputs = launcher.with_sums(outputs, self.pairs, call)
        launcher.row_loss(students * self.pairs, teachers * self.pairs, call, outputs)


# None, [N], [H, N]; from labels in the row kernel.
WEIGHTS_OF = ("none", "rows", "pairs")
LABELS_OF = ("labels", "counted labels", "rows and counted labels")
# [N, C] dense; with an offset of one element and an odd row stride; [M, K, C] sliced from [M, K + 1, C].
LAYOUTS = ("dense", "unaligned", "sliced")


@cache
def matrix(rows: int, classes: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Uninitialised logits, whose memory is never accessed."""
    if layout == "sliced":
        return torch.empty(rows // 2, 3, classes, dtype=dtype)[:, :-1]
    first = int(layout == "unaligned")
    stride = classes + first * (1 - classes % 2)
    memory = torch.empty(rows * stride + first, dtype=dtype)
    return memory.as_strided((rows, classes), (stride, 1), first)


def calls() -> Iterator[Call]:
    """All calls: the product of the fields' values, without those that do not apply to a loss."""
    flags = (False, True)
    for dtype, weights, mean in itertools.product(DTYPES, ("none", "rows"), flags):
        yield Call(WEIGHTS, "C 10", dtype, weights=weights, gradient=mean)
    for loss, path in itertools.product([*LOSSES, SCALE], PATHS):
        scale = loss == SCALE
        with_terms = not scale and bool(LOSSES[loss][0].terms) and LOSSES[loss][1].labelled
        teachers = ("fp32",) if scale else tuple(DTYPES)
        others = itertools.product(
            DTYPES,
            teachers,
            ("dense",) if scale else LAYOUTS,
            ("none",) if scale else WEIGHTS_OF,
            flags if with_terms else (False,),
            (True,) if scale else flags,
            (False,) if scale else flags,
            (1,) if scale else (1, 2, 8),
        )
        for other in others:
            yield Call(loss, path, *other)
        if scale:
            continue
        by_labels = LABELS_OF if LOSSES[loss][0].family == "softmax" else ()
        for student, layout, weights in itertools.product(DTYPES, LAYOUTS, by_labels):
            yield Call(loss, path, student, student, layout, weights, with_terms)
        kinds = ("none", "rows", *by_labels)
        others = itertools.product(kinds, flags if with_terms else (False,), flags, (1, 2, 8))
        for weights, terms, gradient, pairs in others:
            yield Call(
                loss, path, "bf16", "bf16", "dense", weights, terms, gradient, pairs=pairs, summed=True
            )
        if not known_at_k(loss):
            continue
        others = itertools.product(
            DTYPES, LAYOUTS, ("none", "rows"), flags if with_terms else (False,), flags, flags, KNOWN
        )
        for student, layout, weights, terms, gradient, dynamic, known in others:
            yield Call(loss, path, student, "fp32", layout, weights, terms, gradient, dynamic, 1, known)


def known_at_k(loss: str) -> bool:
    """Whether a teacher that is known at some classes is read, and the loss is defined for it."""
    loss_spec, case = LOSSES[loss]
    reads = bool(loss_spec.needs(case.options) & spec.Needs.DISTILLS)
    return reads and loss_spec.undefined_at_k(case.options) is None


def covering(all_calls: Iterable[Call], together: int) -> list[Call]:
    """Calls that cover all combinations of ``together`` field values.

    Greedy, in a fixed random order, with a decreasing threshold of new combinations per call."""
    order = list(all_calls)
    random.Random(0).shuffle(order)
    chosen: list[Call] = []
    seen: set[tuple[tuple[str, Any], ...]] = set()
    fields = list(itertools.combinations(range(len(Call._fields)), together))
    most = math.comb(len(Call._fields), together)
    for wanted in sorted({most, most * 2 // 3, most // 3, most // 8, 3, 1} - {0}, reverse=True):
        rest = []
        for call in order:
            new = {tuple((field, call[field]) for field in some) for some in fields} - seen
            if len(new) >= wanted:
                chosen.append(call)
                seen |= new
            elif new:
                rest.append(call)
        order = rest
    return chosen


def differing(loss: str, *, aligned: bool, kind: str) -> Iterator[Callable[[], None]]:
    """Calls that must share a compiled kernel: they differ in rows, M, K, strides, options, and the addresses
    and strides of target and weights. ``kind``: "rows"; "labels" that kernels count, and which is ignored; or
    "known", in the number of known classes too."""
    loss_spec, case = LOSSES[loss]
    shapes = ((1, 1, 1000), (7, 1, 1008), (300, 1, 3200), (1, 12, 1000), (4, 3, 1016), (150, 2, 1000))
    for number, (outer, inner, stride) in enumerate(shapes):
        rows = outer * inner
        stride += not aligned
        memory = torch.empty((rows + outer) * stride)
        strides = (stride, 1) if inner == 1 else ((inner + 1) * stride, stride, 1)
        logits = memory.as_strided((rows, 1000) if inner == 1 else (outer, inner, 1000), strides)
        values = tuple(float(value) if value in (0.0, 1.0) else value + number for value in case.options)
        step = 1 + number % 3
        target = torch.zeros(rows * step + number, dtype=torch.int64)[number::step] if case.labelled else None
        weight = torch.ones(rows + number)[number:]
        labels = torch.zeros(rows + number, dtype=torch.int64)[number:]
        marks = Marks(labels, (-100, 0, 1, 16, 17, 10_000)[number], True) if kind == "labels" else None

        # 9 to 15: the row of K + 1 logits has the same tile, and no common alignment.
        indices = torch.zeros(rows, 9 + number, dtype=torch.int64) if kind == "known" else None
        teacher = torch.empty(rows, 10 + number) if kind == "known" else logits
        loss_call = LossCall(
            target, weight, rows, loss_spec.name, values, None, "triton", False, False, True, indices, marks
        )

        def call(logits=logits, teacher=teacher, loss_call=loss_call, rows=rows) -> None:
            outputs = Outputs(torch.empty(rows), None, torch.empty(rows, 1000))
            launcher.row_loss([logits], [teacher], loss_call, outputs)

        yield call


# ---- the command ---------------------------------------------------------------------------------------


def bind(target: str, step: int) -> list[str]:
    """Bind and specialise every ``step``-th call, print the number of kernels, return the failures."""
    failures, keys, count = [], set(), 0
    with fake_gpu.on_target(target):
        for call in itertools.islice(calls(), 0, None, step):
            count += 1
            try:
                keys |= {variant.key for variant in call.launches()}
            except Exception as error:  # any error of the binder is a result
                failures.append(f"{target}: {call}: {type(error).__name__}: {error}")
        for loss in LOSSES:
            for aligned, kind in itertools.product((True, False), ("rows", "labels", "known")):
                if kind == "known" and not known_at_k(loss):
                    continue
                kernels = [
                    {variant.key for variant in record(call)}
                    for call in differing(loss, aligned=aligned, kind=kind)
                ]
                if any(other != kernels[0] for other in kernels):
                    failures.append(f"{target}: {loss}: recompiled for other rows, strides or options")
    print(f"{target}: {count} calls bound, {len(keys)} kernels", flush=True)
    return failures


def compile_covering(target: str, together: int) -> list[str]:
    """Compile the covering calls, on NVIDIA targets launch them too; return the failures."""
    failures, compiled = [], 0
    nvidia = fake_gpu.TARGETS[target].backend == "cuda"
    with fake_gpu.on_target(target):
        for call in covering(calls(), together):
            try:
                for variant in call.launches():
                    variant.compile()
                    compiled += 1
                    if nvidia:
                        variant.launch()
            except Exception as error:  # any error of compiler or launcher is a result
                failures.append(f"{target}: {call}: {type(error).__name__}: {error}")
        launched = ctypes.c_int.in_dll(fake_gpu.stub_libcuda(), "fastkd_launches").value if nvidia else 0
    if nvidia and launched != 2 * compiled:
        failures.append(f"{target}: {launched} launches of {compiled} kernels; expected two of each")
    print(f"{target}: {compiled} kernels compiled, {launched} launched into a stub", flush=True)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bind", type=int, nargs="?", const=1, metavar="N", help="bind every call, or every Nth"
    )
    parser.add_argument(
        "--compile", type=int, metavar="N", help="compile calls that cover all N-tuples of values"
    )
    parser.add_argument("--target", nargs="+", choices=list(fake_gpu.TARGETS), default=["sm_90", "gfx942"])
    arguments = parser.parse_args()
    print(f"triton {triton.__version__}")
    failures = []
    for target in arguments.target:
        if arguments.bind:
            failures += bind(target, arguments.bind)
        if arguments.compile:
            failures += compile_covering(target, arguments.compile)
    print("\n".join(failures[:20]), f"{len(failures)} calls failed", sep="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
