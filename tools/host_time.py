"""Host time of a Triton launch of 256 x 1000 logits, as a compiled kernel and by Triton's JIT, without a GPU.

    python tools/host_time.py [--losses kd dkd ce-kd]

A launch goes through NVIDIA's launcher into a stub of libcuda (``fake_gpu.py``), so the time is the
host's alone. "Launch": key of the compiled kernel, or the JIT's binder, and the launcher in C; "call": with
the plan and the arguments before it. All take turns; processor time, median of 200 turns of 20. What
autograd and the checks of a loss's arguments take: docs/speed/cpu.md.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import fake_gpu
import jit_launches
import torch
import triton

from fastkd.ops.call import Call, Outputs
from fastkd.ops.triton import launch as launcher
from fastkd.ops.triton import launch_options

ROWS, CLASSES, TURNS, REPEATS = 256, 1000, 200, 20


def call_of(name: str) -> Callable[[], None]:
    """What fills the outputs of a reduced bfloat16 loss with its gradient, by one launch."""
    loss, case = jit_launches.LOSSES[name]
    target = torch.zeros(ROWS, dtype=torch.int64) if case.labelled else None
    options = tuple(map(float, case.options))
    call = Call(target, torch.ones(ROWS), ROWS, loss.name, options, None, "triton", True, False, True, None)
    student, teacher, gradient = (torch.empty(ROWS, CLASSES, dtype=torch.bfloat16) for _ in range(3))
    outputs = launcher.with_sums(Outputs(torch.empty(ROWS), None, gradient), 1, call)
    return lambda: launcher.row_loss([student], [teacher], call, outputs)


def launch_of(call: Callable[[], None]) -> Callable[[], None]:
    """The launch that ``call`` makes."""
    launches: list[tuple[Any, ...]] = []
    launcher.launch = lambda *arguments: launches.append(arguments)
    try:
        call()
    finally:
        launcher.launch = launch_options.launch
    (arguments,) = launches
    return lambda: launch_options.launch(*arguments)


def microseconds(function: Callable[[], None]) -> float:
    started = time.process_time_ns()
    for _ in range(REPEATS):
        function()
    return (time.process_time_ns() - started) / REPEATS / 1000


def medians(functions: list[Callable[[], None]]) -> list[float]:
    """Of each function with compiled kernels launched directly, then of each by the JIT."""
    times: list[list[float]] = [[] for _ in range(2 * len(functions))]
    for turn in range(TURNS + 1):
        for number, one in enumerate(times):
            launch_options._KNOWN = number < len(functions)
            taken = microseconds(functions[number % len(functions)])
            if turn:  # the first compiles
                one.append(taken)
    return [statistics.median(one) for one in times]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    losses = list(jit_launches.LOSSES)
    parser.add_argument("--losses", nargs="+", default=["kd", "dkd", "ce-kd"], choices=losses)
    args = parser.parse_args()
    if not launch_options._KNOWN:
        parser.exit(1, f"Triton {triton.__version__}: only the JIT's way is known\n")
    versions = f"Triton {triton.__version__}, torch {torch.__version__}"
    print(f"Microseconds, {ROWS} x {CLASSES} bfloat16; {versions}\n")
    print("| loss | launch | by the JIT | ratio | call | by the JIT |\n|---|---|---|---|---|---|")
    with fake_gpu.on_target("sm_90"):
        for name in args.losses:
            call = call_of(name)
            launch, whole, launch_jit, whole_jit = medians([launch_of(call), call])
            row = (
                f"{launch:.1f} | {launch_jit:.1f} | {launch / launch_jit:.2f} | {whole:.1f} | {whole_jit:.1f}"
            )
            print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
