"""What the compiled Triton kernels do per element, as a table and against recorded baselines.

    python tools/compile_kernels.py --report docs/reports/kernels.md
    python tools/kernel_report.py --check [LOSS ...]     # compare with kernel_baselines.json
    python tools/kernel_report.py --record               # replace this release's baselines

Kernels are those of ``launch.row_loss`` in bfloat16, compiled as Triton's JIT specialises them (see
jit_launches.py); nothing runs. A check fails if a kernel needs 10 % more instructions per element than is
recorded for this release of Triton, if it has barriers or shuffles in a loop over tiles, or if a loss passes
its budget in BUDGETS. On a release without a record it prints and does not fail.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import compile_cuda
import fake_gpu
import jit_launches
import sass
import triton

from fastkd.bench.report import table
from fastkd.ops.spec import Needs

BASELINES = Path(__file__).parent / "kernel_baselines.json"
RELEASE = ".".join(triton.__version__.split(".")[:2])
# Instructions per element of long rows on sm_90, over all passes.
BUDGETS = {"kd": 45, "dkd": 50, "ce-kd": 56, "binary-kl-norm": 50}
RESIDENT, STREAMED = "C 1000", "C 32768"
PATHS = (RESIDENT, STREAMED)
ALLOWED = 1.1
# What an H100 issues in practice (59 at its highest rate) in the time of three accesses in bfloat16.
INSTRUCTIONS_AT_FLOOR = 45
MOST_WARPS, REGISTERS = 64, 65536


class Kernel(NamedTuple):
    """One launch of a loss, compiled for a target."""

    loss: str
    path: str
    registers: int
    spilled: int  # bytes
    warps: int  # resident on a multiprocessor
    passes: list[sass.Pass]
    elements: list[float]  # that a thread reads in each pass

    @property
    def by_pass(self) -> list[float]:
        """Instructions per element."""
        return [one.instructions / read for one, read in zip(self.passes, self.elements, strict=True)]

    @property
    def instructions(self) -> float:
        return sum(self.by_pass)

    @property
    def special(self) -> float:
        return sum(one.special / read for one, read in zip(self.passes, self.elements, strict=True))

    @property
    def exchanges(self) -> int | None:
        """Barriers and shuffles in loops over tiles."""
        if self.path == RESIDENT:
            return None
        return sum(one.barriers + one.shuffles for one in self.passes)


def compiled(loss: str, path: str, target: str) -> Kernel:
    """The only launch of a call with whole rows."""
    spec, case = jit_launches.LOSSES[loss]
    needs = spec.needs(case.options)
    with fake_gpu.on_target(target):
        (variant,) = jit_launches.Call(loss, path, "bf16", "bf16").launches()
        kernel = variant.compile()
    used = compile_cuda.used_by(kernel.asm["cubin"])
    warps, tile = (variant.keywords[name] for name in ("num_warps", "TILE"))
    allocated = -(-used["REG"] // 8) * 8 * 32 * warps
    resident = warps * min(MOST_WARPS // warps, REGISTERS // allocated)
    # Other loops combine the parts of a row; one over tiles loads a vector at least.
    passes = [one for one in sass.passes_of(kernel.asm["cubin"]) if one.loaded >= 16]
    if path == RESIDENT and len(passes) == 1:
        elements = [tile * variant.keywords["ROWS"] / (32 * warps)]
    else:
        both = spec.family != "softmax" or bool(needs & Needs.DISTILLS)
        # Moments are of one model in each of the first two passes.
        alone = 2 if needs & Needs.STANDARDIZED else 0
        elements = [one.loaded / (4 if both and number >= alone else 2) for number, one in enumerate(passes)]
    return Kernel(loss, path, used["REG"], used["STACK"] + used["LOCAL"], resident, passes, elements)


def row(kernel: Kernel, recorded: float | None) -> list[str]:
    share = min(1.0, INSTRUCTIONS_AT_FLOOR / kernel.instructions)
    cells = [
        kernel.loss, kernel.registers, kernel.spilled or "", kernel.warps,
        " + ".join(f"{count:.1f}" for count in kernel.by_pass), f"**{kernel.instructions:.1f}**",
        "" if recorded is None else f"{recorded:.1f}", f"{kernel.special:.1f}",
        min(one.width for one in kernel.passes), "" if kernel.exchanges is None else kernel.exchanges,
        f"{share:.0%}",
    ]  # fmt: skip
    return [str(cell) for cell in cells]


COLUMNS = (
    "loss", "registers", "spilled bytes", "warps", "instructions per pass", "sum", "before", "special",
    "load, bytes", "exchanges", "issue",
)  # fmt: skip

INTRODUCTION = """\
# What the Triton kernels do per element

Written by `python tools/compile_kernels.py --report docs/reports/kernels.md` with Triton {release}, {today}.
Every kernel is compiled as a launch in bfloat16 would be, and its machine code counted. **Nothing here ran on
a GPU.**

An element is one class of one row.

- *Instructions per pass* are those of each loop over tiles, divided by the elements that it reads; rows of
  1,000 classes have no loop, and the whole kernel counts (of the binary losses, which have one, the loop).
  *Before*: with statistics per row instead of per thread, Triton 3.8, 2026-11-26; JSD, TVD and skew KL of
  1,000 classes had three loops then, and only these were counted.
- *Warps*: resident on a multiprocessor, of 64.
- *Special*: exponentials, logarithms, reciprocals and square roots.
- *Load*: the narrowest that a tile needs. *Exchanges*: barriers and shuffles in loops.
- *Issue*: the share of a copy's bandwidth at which instructions would be the limit on an H100, 45 / sum. At
  3.0 TB/s it moves three bfloat16 accesses in the time of 59 instructions per element at its highest rate of
  issue, of which kernels reach about 45. A row that is read twice has five accesses, of which two come from
  the L2 cache if the rows in flight fit into it; if they do not, 60 % is the limit instead.

`tools/kernel_report.py --check` compares with the baselines of a Triton release
(`tools/kernel_baselines.json`) and with the budgets of long rows: {budgets}.
"""


def report() -> str:
    before = json.loads(BASELINES.read_text()).get("before", {})
    budgets = ", ".join(f"{loss} {most}" for loss, most in BUDGETS.items())
    text = [INTRODUCTION.format(release=triton.__version__, today=date.today(), budgets=budgets)]
    for path in PATHS:
        for target in ("sm_80", "sm_90", "sm_100"):
            recorded = before if target == "sm_90" else {}
            rows = [
                row(compiled(loss, path, target), recorded.get(f"{loss}, {path}"))
                for loss in jit_launches.LOSSES
            ]
            text += [f"## {path.replace('C', 'Classes:')}, {target}", "", table(COLUMNS, rows), ""]
    rows = []
    for loss in jit_launches.LOSSES:
        for path in PATHS:
            registers, spilled = on_amd(loss, path)
            rows.append([loss, path.partition(" ")[2], str(registers), str(spilled or "")])
    text += ["## gfx942", "", table(["loss", "classes", "vector registers", "spilled"], rows)]
    return "\n".join(text) + "\n"


def on_amd(loss: str, path: str) -> tuple[int, int]:
    """Vector registers and how many are spilled, from the metadata of the assembly."""
    with fake_gpu.on_target("gfx942"):
        (variant,) = jit_launches.Call(loss, path, "bf16", "bf16").launches()
        assembly = variant.compile().asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))
        for name in ("vgpr_count", "vgpr_spill_count")
    )
    return registers, spilled


def check(losses: list[str]) -> int:
    """Print each kernel's instructions beside its baseline; 1 if one rose or passed its budget."""
    recorded = json.loads(BASELINES.read_text()).get(RELEASE, {})
    failures = 0
    for loss in losses:
        for path in PATHS:
            kernel = compiled(loss, path, "sm_90")
            name, now = f"{loss}, {path}", kernel.instructions
            faults = [f"spills {kernel.spilled} bytes"] * bool(kernel.spilled)
            faults += [f"{kernel.exchanges} barriers and shuffles in loops"] * bool(kernel.exchanges)
            if path == STREAMED and now > BUDGETS.get(loss, now):
                faults.append(f"its budget is {BUDGETS[loss]}")
            if name in recorded and now > ALLOWED * recorded[name]:
                faults.append(f"recorded for Triton {RELEASE}: {recorded[name]}")
            failures += bool(faults)
            print(f"{name:32s} {now:6.1f} instructions per element  {'; '.join(faults)}", flush=True)
    if not recorded:
        print(f"not a failure: there are no baselines for Triton {RELEASE}")
    return int(bool(failures and recorded))


def record() -> None:
    baselines: dict[str, Any] = json.loads(BASELINES.read_text())
    baselines[RELEASE] = {
        f"{loss}, {path}": round(compiled(loss, path, "sm_90").instructions, 1)
        for loss in jit_launches.LOSSES
        for path in PATHS
    }
    BASELINES.write_text(json.dumps(baselines, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", nargs="*", choices=list(jit_launches.LOSSES), metavar="LOSS")
    what.add_argument("--record", action="store_true", help=f"as the baselines of Triton {RELEASE}")
    arguments = parser.parse_args()
    if arguments.record:
        record()
        return 0
    return check(arguments.check or list(jit_launches.LOSSES))


if __name__ == "__main__":
    sys.exit(main())
