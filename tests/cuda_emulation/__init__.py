"""Compiles emulation.cpp; its kernels are called like those of fastkd.ops.native."""

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


def build(library: Path) -> Path:
    """Compile the emulation to a shared library; takes ten seconds."""
    command = [
        COMPILER, "-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared",
        f"-I{FOLDER}", str(FOLDER / "emulation.cpp"), "-o", str(library),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


class Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "inner", "outer_stride")),
        ("dtype", ctypes.c_int32),
    ]

    @classmethod
    def of(cls, tensor):
        inner, outer_stride = (2**63 - 1, 0) if tensor.dim() == 2 else (tensor.shape[1], tensor.stride(0))
        address = tensor.data_ptr() if tensor.numel() else None
        return cls(address, tensor.stride(-2), inner, outer_stride, CODES[tensor.dtype])


class Rows(ctypes.Structure):
    _fields_ = [
        *((name, Matrix) for name in ("student", "teacher", "gradient")),
        *((name, ctypes.c_int64) for name in ("count", "classes")),
        ("target", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
        ("row_weight", ctypes.c_void_p),
        ("row_weight_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("losses", ctypes.c_void_p),
        ("terms", ctypes.c_void_p),
        ("term_stride", ctypes.c_int64),
    ]


class Known(ctypes.Structure):
    _fields_ = [
        ("indices", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "count")),
        ("needs", ctypes.c_uint32),
    ]


class LossOptions(ctypes.Structure):
    _fields_ = [("loss", ctypes.c_int32), ("needs", ctypes.c_uint32), ("values", ctypes.c_float * 8)]


class Plan(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in TeamPlan._fields]


class Emulation:
    """The interface of fastkd.ops.native, on the emulated kernels; ``plan`` returns the TeamPlan."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name in ("emulated_row_loss", "emulated_top_k_loss", "emulated_scale_rows"):
            getattr(self.library, name).restype = ctypes.c_char_p
        assert self.library.size_of_rows() == ctypes.sizeof(Rows)
        assert self.library.size_of_options() == ctypes.sizeof(LossOptions)
        self.library.words_of_workspace.argtypes = [ctypes.c_int64] * 2
        self.library.words_of_workspace.restype = ctypes.c_int64
        self.plan = lambda rows, classes, element_bytes: plan_team(rows, classes, element_bytes, (9, 0), 132)

    def rows(self, student, teacher, target, row_weight, scale, rows, terms, gradient):
        def pointer(tensor):
            return None if tensor is None or not tensor.numel() else tensor.data_ptr()

        def stride(tensor):
            return 0 if tensor is None or not tensor.numel() else tensor.stride(0)

        return Rows(
            Matrix.of(student), Matrix.of(teacher), Matrix.of(gradient), len(rows), student.shape[-1],
            pointer(target), stride(target), pointer(row_weight), stride(row_weight), scale,
            pointer(rows), pointer(terms), terms.stride(0),
        )  # fmt: skip

    @staticmethod
    def options(call):
        values, dynamic = (ctypes.c_float * 8)(*call.options), call.dynamic
        return (
            ctypes.byref(LossOptions(native._LOSS_INDEX[call.loss], call.needs, values)),
            ctypes.c_void_p(None if dynamic is None else dynamic.data_ptr()),
            0 if dynamic is None else len(dynamic),
        )

    def launch(self, pairs, call, plan):
        pointer = (Rows * len(pairs))(*pairs)
        arguments = *self.options(call), ctypes.byref(Plan(*plan))
        self.check(self.library.emulated_row_loss(pointer, len(pairs), *arguments))

    def launch_top_k(self, rows, call, plan, plan_at_k):
        count, known = call.indices.shape
        # NaN, and out of range as a position: what was not written shows.
        workspace = torch.full((count * (native.STATISTICS_WORDS + known + 1),), -1)
        assert len(workspace) == self.library.words_of_workspace(count, known)
        self.check(
            self.library.emulated_top_k_loss(
                ctypes.byref(rows),
                ctypes.byref(
                    Known(call.indices.data_ptr(), call.indices.stride(0), known, call.at_k.needs)
                ),
                *self.options(call), ctypes.c_void_p(workspace.data_ptr()), ctypes.byref(Plan(*plan)),
                ctypes.byref(Plan(*plan_at_k)),
            )
        )  # fmt: skip

    def row_loss(self, students, teachers, call, outputs):
        rows, terms, gradient, sums, term_sums = outputs[:5]
        row_weight = call.row_weight
        count, classes = len(rows) // len(students), students[0].shape[-1]
        terms = rows.new_empty(0, len(rows)) if terms is None else terms
        gradient = students[0].new_empty(0, classes) if gradient is None else gradient
        element_bytes = students[0].element_size() + teachers[0].element_size()
        plan = self.plan(len(rows), classes, element_bytes)
        pairs = []
        for pair, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
            pair_rows = slice(pair * count, (pair + 1) * count)
            weight = row_weight[pair] if row_weight is not None and row_weight.dim() == 2 else row_weight
            row_outputs = rows[pair_rows], terms[:, pair_rows], gradient[pair_rows]
            pairs.append(self.rows(student, teacher, call.target, weight, 1 / call.divisor, *row_outputs))
        if call.indices is None:
            self.launch(pairs, call, plan)
        else:
            self.launch_top_k(pairs[0], call, plan, self.plan(count, call.indices.shape[1] + 1, 8))
        if sums is not None:
            sums.copy_(rows.view(len(pairs), count).sum(-1).view_as(sums))
        if term_sums is not None:
            term_sums.copy_(terms.view(-1, len(pairs), count).sum(-1).view_as(term_sums))

    def scale_rows_(self, gradient, factors):
        plan = self.plan(*gradient.shape, 2 * gradient.element_size())
        factors = factors.reshape(-1)
        self.check(
            self.library.emulated_scale_rows(
                ctypes.byref(Matrix.of(gradient)), ctypes.c_void_p(factors.data_ptr()),
                ctypes.c_int64(factors.stride(0)), *map(ctypes.c_int64, gradient.shape),
                ctypes.byref(Plan(*plan)),
            )
        )  # fmt: skip

    @staticmethod
    def check(refusal):
        if refusal is not None:
            raise RuntimeError(refusal.decode())
