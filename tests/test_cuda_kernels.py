"""The CUDA kernels without a GPU: the same headers, compiled for the host by tests/cuda_emulation, which runs every
thread as a fiber. Every loss, layout and way of sharing a row against the reference in float64, with the tolerances
of the other backends. What this cannot show: that the instructions of csrc/cuda/device.h do what they are taken for,
and how fast it is."""

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastkd
from fastkd.ops import native, team_plan
from fastkd.ops.team_plan import TeamPlan, plan_team
from tests.cases import BY_NAME, CASES, assert_matches, error, exact, loss_and_gradient, make_logits

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CODES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


class Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int32)]

    @classmethod
    def of(cls, tensor):
        return cls(tensor.data_ptr() if tensor.numel() else None, tensor.stride(0), CODES[tensor.dtype])


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("student", "teacher", "gradient")),
        *((name, ctypes.c_int64) for name in ("count", "classes")),
        ("target", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("row_weight", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("losses", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
    ]


class LossOptions(ctypes.Structure):
    _fields_ = [("loss", ctypes.c_int32), ("values", ctypes.c_float * 8)]


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in TeamPlan._fields]


class Emulation:
    """What fastkd.ops.native is to the operators, on the emulated kernels; ``plan`` chooses the teams."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name in ("emulated_row_loss", "emulated_scale_rows"):
            getattr(self.library, name).restype = ctypes.c_char_p
        assert self.library.size_of_rows() == ctypes.sizeof(Rows)
        assert self.library.size_of_options() == ctypes.sizeof(LossOptions)
        self.plan = lambda rows, classes, element_bytes: plan_team(rows, classes, element_bytes, (9, 0), 132)

    def rows(self, student, teacher, target, row_weight, scale, rows, terms, gradient):
        def pointer(tensor):
            return None if tensor is None or not tensor.numel() else tensor.data_ptr()

        return Rows(
            Matrix.of(student), Matrix.of(teacher), Matrix.of(gradient), *student.shape, pointer(target),
            0 if target is None or not target.numel() else target.stride(0), pointer(row_weight), scale,
            pointer(rows), pointer(terms),
        )  # fmt: skip

    def launch(self, pairs, loss, options, plan):
        values = (ctypes.c_float * 8)(*options)
        self.check(
            self.library.emulated_row_loss(
                (Rows * len(pairs))(*pairs), len(pairs), ctypes.byref(LossOptions(native._CODES[loss], values)),
                ctypes.byref(Plan(*plan)),
            )
        )  # fmt: skip

    def row_loss(
        self, student, teacher, target, row_weight, scale, loss, options, rows, terms, gradient
    ):
        plan = self.plan(*student.shape, student.element_size() + teacher.element_size())
        pair = self.rows(student, teacher, target, row_weight, scale, rows, terms, gradient)
        self.launch([pair], loss, options, plan)

    def scale_rows_(self, gradient, upstream):
        plan = self.plan(*gradient.shape, 2 * gradient.element_size())
        self.check(
            self.library.emulated_scale_rows(
                ctypes.byref(Matrix.of(gradient)), ctypes.c_void_p(upstream.data_ptr()),
                ctypes.c_int64(upstream.stride(0)), *map(ctypes.c_int64, gradient.shape), ctypes.byref(Plan(*plan)),
            )
        )  # fmt: skip

    @staticmethod
    def check(refusal):
        if refusal is not None:
            raise RuntimeError(refusal.decode())


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulation") / "emulation.so"
    source = ROOT / "tests/cuda_emulation/emulation.cpp"
    command = [
        COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror",
        "-Wno-unknown-pragmas", f"-I{source.parent}", str(source), "-o", str(path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture
def emulated(library, monkeypatch):
    """The emulated kernels in the place of the native backend's."""
    emulation = Emulation(library)
    monkeypatch.setattr(native, "row_loss", emulation.row_loss)
    monkeypatch.setattr(native, "scale_rows_", emulation.scale_rows_)
    with fastkd.use_backend("native"):
        yield emulation


def forced(emulated, *plan):
    emulated.plan = lambda *_: TeamPlan(*plan)


@each_case
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000, 1025])
def test_matches_reference(emulated, case, classes, dtype):
    student, teacher, target = make_logits(4, classes, dtype)
    target[1] = -100
    floor = 1.0 if classes == 2 else 1e-2
    assert_matches(case, student, teacher, target, torch.randn(4), floor, reduction="none")


# Threads a row, rows a block, blocks a row, slots; kept whole, in part and not at all.
TEAMS = {
    "half a warp, two rows": (16, 2, 1, 12),
    "a warp": (32, 1, 1, 9),
    "a warp, eight rows": (32, 8, 1, 4),
    "a block": (128, 1, 1, 3),
    "a block, a part kept": (64, 1, 1, 5),
    "the largest block": (512, 1, 1, 1),
    "a cluster of two": (64, 1, 2, 3),
    "a cluster of three, a part kept": (32, 1, 3, 5),
    "a cluster of four, nothing kept": (32, 1, 4, 4),
    "a cluster of eight": (32, 1, 8, 2),
}


@each_case
@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
def test_every_way_to_share_a_row(emulated, case, team):
    classes = 1203
    forced(emulated, *team)
    if team == TEAMS["a cluster of four, nothing kept"]:
        classes = 5003
    student, teacher, target = make_logits(3, classes)
    target[1] = classes - 1
    assert_matches(case, student, teacher, target, torch.randn(3), reduction="none")
