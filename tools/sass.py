"""Counts what the threads of a compiled kernel do per element, from its binary.

An element is one class of one row: one logit of each model that the kernel reads. The binary is read with the
cuobjdump inside Triton.
"""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?(.*?);", re.M)
_BRANCH = re.compile(r"^BRA\b.*?0x([0-9a-f]+)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


class Pass(NamedTuple):
    """A loop over tiles, or a kernel without such loops; what a thread executes."""

    instructions: int
    special: int  # exponentials, logarithms, reciprocals, square roots
    barriers: int
    shuffles: int
    loaded: int  # bytes of global memory
    width: int  # bytes of the narrowest load, those of a label and its logits (less than a quarter) aside


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def passes_of(cubin: bytes) -> list[Pass]:
    """The innermost loops that read global memory, in order; the whole kernel if there are none."""
    code = [(int(at, 16), what) for at, what in _INSTRUCTION.findall(disassembled(cubin))]
    position = {at: number for number, (at, _) in enumerate(code)}
    loops = []
    for end, (_, what) in enumerate(code):
        branch = _BRANCH.match(what)
        start = position.get(int(branch.group(1), 16), end) if branch else end
        if start < end:
            loops.append((start, end + 1))
    inner = [
        (start, end)
        for start, end in sorted(loops)
        if not any(start <= other and stop <= end and (other, stop) != (start, end) for other, stop in loops)
    ]
    names = [what.split()[0] for _, what in code]
    passes = [_pass(names[start:end]) for start, end in inner]
    return [one for one in passes if one.loaded] or [_pass(names)]


def vector_loops(text: str) -> dict[str, list[int]]:
    """What each loop of the CUDA kernels over a thread's vectors executes per vector, by the function's name:
    the shortest way through it that reads a vector from shared memory, and fetches another or writes the
    gradient if the loop can. Branches to what few vectors need are not taken."""
    parts = re.split(r"\n\s+Function : (\S+)\n", text)
    return {name: _vector_loops(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


_PREDICATED = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+\s+)?(.*?);", re.M)
_TASKS = tuple(map(re.compile, (r"LDS\S*\.128", r"LDGSTS", r"STG\S*\.128")))
_READS, _FETCHES, _WRITES = 1, 2, 4


def _vector_loops(body: str) -> list[int]:
    code = [(int(at, 16), bool(predicate), what) for at, predicate, what in _PREDICATED.findall(body)]
    position = {at: number for number, (at, _, _) in enumerate(code)}
    tasks, targets = [], []
    for number, (_, _, what) in enumerate(code):
        tasks.append(sum(1 << bit for bit, task in enumerate(_TASKS) if task.match(what)))
        branch = _BRANCH.match(what)
        targets.append(position.get(int(branch.group(1), 16), number) if branch else None)
    lengths = []
    for end, start in enumerate(targets):
        if start is None or start >= end:
            continue
        able = 0
        for task in tasks[start : end + 1]:
            able |= task
        if able & _READS:
            needed = _READS | (able & _WRITES or able & _FETCHES)
            lengths.append(_shortest(code, tasks, targets, start, end, needed))
    return [length for length in lengths if length]


def _shortest(code, tasks, targets, start: int, end: int, needed: int) -> int:
    """The fewest instructions from ``start`` back to it that do what is needed; 0 if there is no such way."""
    queue, seen = [(0, start, 0)], set()
    while queue:
        length, number, done = heapq.heappop(queue)
        if (number, done) in seen:
            continue
        seen.add((number, done))
        done |= tasks[number]
        _, predicated, what = code[number]
        target = targets[number]
        if target == start and done & needed == needed:
            return length + 1
        following = [] if target is None or target <= number else [target]
        # "BRA P3, 0x10" falls through as a predicated branch does.
        if target is None or predicated or re.match(r"BRA\S*\s+!?U?P", what):
            following.append(number + 1)
        for one in following:
            if start <= one <= end:
                heapq.heappush(queue, (length + 1, one, done))
    return 0


def _pass(names: list[str]) -> Pass:
    kinds = Counter(name.partition(".")[0] for name in names)
    loads = [_width(name) for name in names if name.startswith("LDG")]
    bulk = [width for width, number in Counter(loads).items() if 4 * width * number >= sum(loads)]
    return Pass(len(names), kinds["MUFU"], kinds["BAR"], kinds["SHFL"], sum(loads), min(bulk, default=0))


def _width(name: str) -> int:
    return next((width for part, width in _WIDTHS.items() if part in name.split(".")), 4)
