"""Instructions per element of the compiled Triton kernels, against budgets and recorded baselines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def kernel_report(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(ROOT / "tools/kernel_report.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_the_kernels_keep_their_budgets():
    """And exchange nothing between threads in a loop over tiles."""
    done = kernel_report("--check", "kd", "dkd", "ce-kd", "binary-kl-norm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("instructions per element") == 8


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD.MOV.U32 R2, RZ, RZ, RZ ;
        /*0020*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E.128 R8, desc[UR4][R2.64] ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/                   SHFL.BFLY PT, R5, R3, 0x1, 0x1f ;
        /*0060*/               @P0 BRA 0x20 ;
        /*0070*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0;
"""


def test_a_loop_is_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import sass

    monkeypatch.setattr(sass, "disassembled", lambda cubin: SASS)
    (loop,) = sass.passes_of(b"")
    assert loop == sass.Pass(instructions=5, special=1, barriers=0, shuffles=1, loaded=32, width=16)


VECTORS = """
		Function : some_rows
        /*0000*/                   LDS.128 R0, [R1] ;
        /*0010*/              @P0  BRA 0x0040 ;
        /*0020*/                   MUFU.EX2 R4, R0 ;
        /*0030*/                   BRA 0x0060 ;
        /*0040*/                   FADD R4, R0, R1 ;
        /*0050*/                   FADD R4, R4, R1 ;
        /*0060*/                   BRA P1, 0x0080 ;
        /*0070*/                   STG.E.EF.128 desc[UR4][R2.64], R4 ;
        /*0080*/              @!P2 BRA 0x0000 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_a_loop_over_vectors_is_counted_along_its_shortest_way_that_writes(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import sass

    assert sass.vector_loops(VECTORS) == {"some_rows": [7]}
    assert sass.vector_loops(VECTORS.replace("STG.E.EF.128", "STG.E.U16")) == {"some_rows": [6]}


def test_a_kernel_without_a_loop_is_counted_whole(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import sass

    monkeypatch.setattr(sass, "disassembled", lambda cubin: SASS.replace("@P0 BRA 0x20", "NOP"))
    (whole,) = sass.passes_of(b"")
    assert (whole.instructions, whole.barriers, whole.loaded, whole.width) == (11, 1, 34, 16)
