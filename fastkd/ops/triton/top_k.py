"""The launch of a loss whose teacher is known at K classes, as one of K + 1 classes between two passes over
the student's logits."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd.ops.call import Call, Outputs
from fastkd.ops.plan import MAX_PARTS, Plan, device_of, plan_known
from fastkd.ops.spec import Needs
from fastkd.ops.triton import top_k_rows
from fastkd.ops.triton.launch_options import common_vector, compile_options, launch, on_device, row_strides

# Of ``Needs``, those that the student's kernels test.
OF_STUDENT = Needs.CROSS_ENTROPY | Needs.STUDENT_AT_T1 | Needs.LABEL_SMOOTHING
# The most known classes per step of a program.
MAX_KNOWN = 256


def row_loss(
    student: Tensor, teacher: Tensor, call: Call, outputs: Outputs, *, dense: Callable[..., None]
) -> None:
    """``launch.row_loss`` of a call with indices: the teacher's logits are [N, K + 1].

    ``dense`` is the same function, for the loss of K + 1 classes.

    The memory traffic per student logit is that of two reads, and one write for the gradient.
    """
    spec, indices, dynamic = call.spec, call.indices, call.dynamic
    rows, terms, gradient = outputs[:3]
    assert indices is not None
    indices = indices if indices.stride(1) == 1 else indices.contiguous()
    count, classes, known = rows.shape[0], student.shape[-1], indices.shape[1]
    needs, small = call.needs, call.at_k
    cross_entropy = bool(needs & Needs.CROSS_ENTROPY and needs & Needs.LABELLED)
    positioned = bool(small.needs & Needs.LABELLED)
    needs = int(needs & ((OF_STUDENT if cross_entropy else 0) | Needs.OWN_SLOPES))
    # Kernels without a cross-entropy read the student's temperature only.
    temperature = float(spec.temperatures(spec.options(*call.options))[0])
    numbers = tuple(map(float, call.options)) if cross_entropy else (temperature,)
    from_memory = spec.dynamic if cross_entropy else int(math.isnan(temperature))

    plan = plan_known(count, classes, device_of(student.device))
    written = student if gradient is None else gradient
    vector = common_vector((student, written), classes, *row_strides(student), written.stride(0))
    strides = (*row_strides(student), indices.stride(0))
    inner_rows = 1 if student.dim() == 2 else student.shape[1]
    # Unused pointers must be valid arguments too: `rows` and `indices` are placeholders.
    weight = rows if call.row_weight is None else call.row_weight
    target = indices if call.target is None else call.target
    target_stride = target.stride(0)
    values = rows if dynamic is None else dynamic
    partials = rows.new_empty(count, plan.parts, top_k_rows.PARTIALS.value)
    results = rows.new_empty(count, top_k_rows.RESULTS.value)
    of_student = rows.new_empty(2, count) if cross_entropy else rows
    logits = rows.new_empty(count, known + 1)
    position = call.target.new_empty(count) if positioned and call.target is not None else None
    fixed = {
        "NEEDS": needs,
        "WEIGHTED": call.row_weight is not None,
        "DYNAMIC": 0 if dynamic is None else from_memory,
    }
    per_step = min(MAX_KNOWN, max(16, 1 << (known - 1).bit_length()))
    tiles = {
        "TILE": plan.tile,
        "V": 16 // student.element_size() if vector > 1 else 8,
        "VECTOR": vector,
    }
    # Arguments that the kernels share.
    pointers = (student, indices, target, weight)
    shape = (inner_rows, plan.parts, classes, known, *strides, target_stride)
    grid = (count, plan.parts, 1)
    with on_device(student):
        launch(
            top_k_rows.rest_sums, grid, (*pointers, partials, values, *shape, numbers),
            fixed | tiles | compile_options(plan),
        )  # fmt: skip
        of_known = Plan(1, per_step, True, max(1, per_step // 64), None, 1, count)
        of_position = {"POSITION": position is not None, "KNOWN": per_step, "PARTS": MAX_PARTS}
        launch(
            top_k_rows.known_logits, (count, 1, 1),
            (*pointers, partials, values, results, of_student, logits,
             indices if position is None else position, *shape, 1.0 / call.divisor, numbers),
            fixed | of_position | compile_options(of_known),
        )  # fmt: skip
        # Dynamic options of the student's own terms stay: without their needs, they multiply a loss of 0.
        small = small._replace(target=position, with_gradient=gradient is not None)
        of_logits = None if gradient is None else torch.empty_like(logits)
        dense([logits], [teacher], small, Outputs(rows, terms, of_logits))
        if cross_entropy:
            rows += of_student[0]
            if terms is not None:
                terms[spec.terms.index("ce")] = of_student[1]
        if gradient is not None:
            of_step = {"KNOWN": min(per_step, 64 * plan.warps)}
            launch(
                top_k_rows.expand, grid,
                (*pointers, results, values, of_logits, gradient, *shape, gradient.stride(0), numbers),
                fixed | tiles | of_step | compile_options(plan),
            )  # fmt: skip
