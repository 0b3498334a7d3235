"""Checks that student and teacher share no trained or mode-dependent parts."""

from __future__ import annotations

from torch import nn

from fastkd.messages import some

from .taps import unwrapped

# Layers without parameters or buffers that behave differently in train and eval mode.
_BY_MODE = (nn.modules.dropout._DropoutNd, nn.RReLU)


def check_apart(student: nn.Module, teacher: nn.Module | None) -> None:
    """Raise ``ValueError`` if the models share trained parameters or layers that depend on train mode.

    The teacher is frozen and in eval mode, so shared layers would silently be so in the student as well.
    Frozen parameters and layers such as ``nn.ReLU`` may be shared.
    """
    if teacher is None:
        return
    student, teacher = unwrapped(student), unwrapped(teacher)
    parameters = set(teacher.parameters())
    modules = set(teacher.modules())
    shared = [name for name, p in student.named_parameters() if p.requires_grad and p in parameters]
    shared += [
        name or "(all of it)"
        for name, module in student.named_modules()
        if module in modules and (isinstance(module, _BY_MODE) or any(True for _ in module.buffers(False)))
    ]
    if shared:
        raise ValueError(
            f"student and teacher share {some(shared, 4)} (of the student): the teacher is "
            "frozen and in eval mode, the student is trained; give the teacher its own copy (copy.deepcopy)"
        )
