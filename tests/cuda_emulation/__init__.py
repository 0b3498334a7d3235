"""Compiles emulation.cpp and calls it as fastkd.ops.native calls the extension."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch

from fastkd.ops import native
from fastkd.ops.team_plan import TeamPlan, plan_team

FOLDER = Path(__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
CODES = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}


def build(folder: Path) -> Path:
    """The emulation as a shared library in ``folder``; five seconds."""
    library = folder / "emulation.so"
    command = [
        COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared",
        f"-I{FOLDER}", str(FOLDER / "emulation.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


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
                (Rows * len(pairs))(*pairs), len(pairs),
                ctypes.byref(LossOptions(native._CODES[loss], values)), ctypes.byref(Plan(*plan)),
            )
        )  # fmt: skip

    def row_loss(
        self, students, teachers, target, row_weight, scale, loss, options, rows, terms, gradient, sums=None
    ):
        count, classes = students[0].shape
        terms = rows.new_empty(0, len(rows)) if terms is None else terms
        gradient = students[0].new_empty(0, classes) if gradient is None else gradient
        element_bytes = students[0].element_size() + teachers[0].element_size()
        plan = self.plan(len(students) * count, classes, element_bytes)
        of_pairs = terms.new_empty(len(students), len(terms), count)
        pairs = []
        for pair, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            of_pair = slice(pair * count, (pair + 1) * count)
            outputs = rows[of_pair], of_pairs[pair], gradient[of_pair]
            pairs.append(self.rows(student, teacher, target, row_weight, scale, *outputs))
        self.launch(pairs, loss, options, plan)
        terms.view(len(terms), len(pairs), count).copy_(of_pairs.transpose(0, 1))
        if sums is not None:
            sums.copy_(rows.view(len(pairs), count).sum(-1).view_as(sums))

    def scale_rows_(self, gradient, upstream):
        plan = self.plan(*gradient.shape, 2 * gradient.element_size())
        self.check(
            self.library.emulated_scale_rows(
                ctypes.byref(Matrix.of(gradient)), ctypes.c_void_p(upstream.data_ptr()),
                ctypes.c_int64(upstream.stride(0)), *map(ctypes.c_int64, gradient.shape),
                ctypes.byref(Plan(*plan)),
            )
        )  # fmt: skip

    @staticmethod
    def check(refusal):
        if refusal is not None:
            raise RuntimeError(refusal.decode())
