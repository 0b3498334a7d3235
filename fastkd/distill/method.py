"""The base class of methods: two models, tapped features, named terms, and the training interface.

A training step, with whatever around it::

    terms = method((inputs, target))       # or DistributedDataParallel(method)((inputs, target))
    method.backward(terms)
    method.finish_gradients()              # after the last micro-batch and unscaling, before clipping
    optimizer.step()
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fastkd.imports import import_named
from fastkd.losses.forms import Form, LinearLogits, TopKLogits
from fastkd.messages import nearest

from .classifier import check_makes_logits, find_classifier
from .features import Hint, Projection, angle_loss, distance_loss, over_all_ranks
from .given import GivenTeacher
from .options import GIVEN, Weight, check_options
from .precision import dtype_of_parts, in_dtype_of_parts
from .sharing import check_apart
from .taps import INPUT, Taps, eval_mode, logits_of, unwrapped
from .terms import Terms, total_of, with_features

Batch = tuple[Tensor, ...]  # inputs, target; optionally the teacher's logits, or outputs of a GivenTeacher


@dataclass(frozen=True)
class Seen:
    """Outputs of both models for a batch. Teacher logits are None without a teacher."""

    student_logits: Tensor  # [N, C]
    teacher_logits: Any  # Tensor [N, C], without gradient; see ``Method.takes_forms``
    target: Tensor  # int64 [N], or probabilities [N, C] for mixed images
    student: dict[str, Tensor]  # features by path
    teacher: dict[str, Tensor]


class Method(nn.Module):
    """A way to train ``student`` with ``teacher``. Subclasses define ``terms``.

    A recipe names the class by its name in lower case, by the name given in ``class MyMethod(Method,
    name="other")``, or by ``module:Class``, which is imported. The keyword arguments of ``__init__`` are the
    options; their annotations (``fastkd.distill.Weight``, ``Literal[...]``, ...) are checked on construction.

    Args:
        student: any module from inputs to logits ``[N, C]``; trained in place.
        teacher: likewise, or None for a method that uses none. It is put into eval mode, runs without
            gradient and is not a submodule: not in ``parameters()`` or ``state_dict()``, not wrapped by DDP.
        example: a batch of inputs on the student's device, for methods that need the shapes of features.
        hint_weight: weight of FitNets' hint, the mean squared error between the teacher's feature and a
            projection of the student's. Published: 100 (CRD's benchmark, with its projection). The larger of
            two feature maps is average-pooled.
        hint_layer, hint_teacher_layer: paths of the two layers; the teacher's is by default the student's.
        hint_projection: a 1x1 convolution (a linear layer for vectors and tokens), BatchNorm and ReLU, as in
            CRD's benchmark, for features of the teacher that follow a ReLU; "linear": without the last two,
            for any features, with a far smaller weight: begin at 1.
        distance_weight, angle_weight: weights of RKD's relations. Published: 25 and 50.
        relation_layer, relation_teacher_layer: paths of the features for relations; by default the pooled
            features, which are the inputs of the classifiers.

    Raises:
        OptionError: an unknown option or a bad value.
        ValueError: a missing teacher, or parts that both models share.
        FeatureError: a layer does not exist or returns no features, or features cannot be compared.
    """

    name: ClassVar[str] = ""
    uses_teacher: ClassVar[bool] = True
    needs_one_label: ClassVar[str] = ""  # why soft targets [N, C] are refused; empty if they are supported
    # Whether ``terms`` takes the teacher's logits as LinearLogits too; if not, they are computed for it.
    takes_forms: bool = False
    _known: ClassVar[dict[str, type[Method]]] = {}

    def __init_subclass__(cls, name: str | None = None, abstract: bool = False, **more: Any) -> None:
        super().__init_subclass__(**more)
        if abstract:
            return
        cls.name = name or cls.__name__.lower()
        taken = Method._known.get(cls.name)
        if taken is not None and (taken.__module__, taken.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(
                f"the method name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}; "
                f'choose another: class {cls.__name__}(Method, name="...")'
            )
        Method._known[cls.name] = cls

    def __new__(cls, *models: Any, **options: Any) -> Method:
        given = {name: value for name, value in options.items() if name not in GIVEN}
        check_options(cls, given, partial=True)
        return super().__new__(cls)

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        example: Tensor | None = None,
        hint_weight: Weight = 0.0,
        hint_layer: str | None = None,
        hint_teacher_layer: str | None = None,
        hint_projection: Projection = "bn_relu",
        distance_weight: Weight = 0.0,
        angle_weight: Weight = 0.0,
        relation_layer: str | None = None,
        relation_teacher_layer: str | None = None,
    ) -> None:
        super().__init__()
        check_apart(student, teacher)
        if teacher is None and (self.uses_teacher or hint_weight or distance_weight or angle_weight):
            what = self.name or type(self).__name__ if self.uses_teacher else "a hint or a relation"
            raise ValueError(f"teacher is None, but {what} distils from one")
        self.student = student
        self._example = example
        self.epoch = 0
        self._notes: list[str] = []
        self._started = False
        # Set by a trainer that runs the teacher in another format; None: the current autocast.
        self.teacher_dtype: torch.dtype | None = None
        # In a tuple, so that it does not become a submodule.
        self._teacher = (None if teacher is None else teacher.eval(),)
        self.student_taps = Taps(student, "student")
        self.teacher_taps = Taps(nn.Identity() if teacher is None else teacher, "teacher")
        self._hint_weight = hint_weight
        self._distance_weight, self._angle_weight = distance_weight, angle_weight
        self._classifiers: dict[str, tuple[str, int]] = {}  # found by their names: path and outputs, by role
        self.hint: Hint | None = None
        # Also those that a weight of 0 leaves unread.
        self._find_both(hint_layer, hint_teacher_layer)
        self._find_both(relation_layer, relation_teacher_layer)
        if hint_weight:
            if hint_layer is None:
                raise ValueError("hint_layer is missing: the path of the student's layer that gets the hint")
            self._hint_layers = self.tap_both(hint_layer, hint_teacher_layer)
            (of_student, _), (of_teacher, _) = self.all_shapes()
            layers = self._hint_layers
            hint = Hint(of_student[layers[0]], of_teacher[layers[1]], layers, hint_projection)
            self.hint = hint.to(self.example.device, dtype_of_parts(student))
        if distance_weight or angle_weight:
            if relation_layer is None:
                relation_layer = self.classifier_of("student")[0] + INPUT
                relation_teacher_layer = relation_teacher_layer or self.classifier_of("teacher")[0] + INPUT
            self._relation_layers = self.tap_both(relation_layer, relation_teacher_layer)

    @property
    def teacher(self) -> nn.Module | None:
        return self._teacher[0]

    # Defined by subclasses.

    def terms(self, seen: Seen) -> Terms:
        """The named scalar terms of a batch, including weights.

        Those that require grad are summed and trained; detached ones are only logged. Terms of a fused loss
        are wrapped by ``fastkd.distill.fused_terms``.
        """
        raise NotImplementedError

    def describe_start(self, seen: Seen) -> list[str]:
        """What a user should know of the first training batch; ``take_notes`` returns it once."""
        return []

    def needs_teacher(self) -> bool:
        """Whether this epoch's terms use the teacher; if not, it does not run."""
        return self.uses_teacher

    @classmethod
    def reads_layers(cls, options: Mapping[str, Any]) -> bool:
        """Whether the terms read the teacher's layers, with these ``options`` (all of them, by name)."""
        return any(options.get(name) for name in ("hint_weight", "distance_weight", "angle_weight"))

    @classmethod
    def top_k_temperature(cls, options: Mapping[str, Any]) -> float:
        """The temperature at which ``terms`` reads the teacher's logits as ``TopKLogits``.

        Raises ``ValueError`` with the reason if the terms are not defined for them.
        """
        raise ValueError("its class does not say at which temperature (top_k_temperature)")

    def leaves_parameters_out(self) -> bool:
        """Whether a step may leave a trained parameter without gradient, which DDP must know in advance."""
        return False

    # Called by training loops.

    def forward(self, batch: Batch) -> Terms:
        return self.loss(batch)

    def loss(self, batch: Batch) -> Terms:
        """The weighted, named terms of ``(inputs, target)``, which sum to the loss. Both models run once.

        ``target`` is int64 labels ``[N]`` or, for MixUp and CutMix, probabilities ``[N, C]``. A third entry
        is the teacher's logits; then the teacher does not run. If the teacher is a ``GivenTeacher``, the
        further entries are its outputs, for example from a cache.

        Raises ``ValueError`` for soft targets if the loss needs one label, for given logits if it needs the
        teacher's features, and for logits of K classes if it needs all.
        """
        inputs, target, *given = batch
        if self.needs_one_label and target.is_floating_point():
            raise ValueError(f"soft targets are not defined for {self.name}: {self.needs_one_label}")
        has_extra = bool(self.hint or self._distance_weight or self._angle_weight)
        teacher_logits: Form | None = None
        teacher_features: dict[str, Tensor] = {}
        if given:
            if self.teacher_taps.paths:
                layers = ", ".join(self.teacher_taps.paths)
                raise ValueError(f"it needs the teacher's layers {layers}, but got only its logits")
            with torch.no_grad(), self._teacher_format(inputs):
                teacher_logits = self._given_logits(given)
        elif self.teacher is not None and (has_extra or self.needs_teacher()):
            taps = self.teacher_taps.reading()
            # Not inference mode: tensors that a teacher caches for all models of its class (such as a table
            # of positions) could not be used in a student's backward pass.
            with torch.no_grad(), self._teacher_format(inputs), taps as teacher_features:
                teacher_logits = logits_of(self.teacher, inputs, "teacher")
        with self.student_taps.reading() as student_features:
            student_logits = logits_of(self.student, inputs, "student")
        parts = [part for name, part in self.named_children() if name != "student"]
        student_features = in_dtype_of_parts(student_features, parts)
        teacher_features = in_dtype_of_parts(teacher_features, parts)
        for role, found in self._classifiers.items():
            check_makes_logits(role, *found, student_logits if role == "student" else teacher_logits)
        seen = Seen(student_logits, teacher_logits, target, student_features, teacher_features)
        terms = self.terms(seen)
        total_of(terms)  # raises for invalid terms
        # After the terms, which refuse what they are not defined for.
        if self.training and not self._started and not torch.compiler.is_compiling():
            self._started = True
            self._notes += self.describe_start(seen)
            if self.hint is not None:
                self._notes += self.hint.describe(seen.teacher[self._hint_layers[1]])
        return with_features(terms, self._feature_terms(seen))

    def backward(self, terms: Terms, *, scaler: GradScaler | None = None, micro_batches: float = 1) -> Tensor:
        """Add the gradient of the terms to ``.grad``; returns the detached loss.

        Args:
            scaler: for mixed precision; call ``scaler.unscale_(optimizer)`` before ``finish_gradients``.
            micro_batches: micro-batches per step, by which the gradient is divided. If their sizes differ:
                the rows of the step divided by the rows of this one.
        """
        total = total_of(terms)
        loss = total / micro_batches if micro_batches != 1 else total
        (loss if scaler is None else scaler.scale(loss)).backward()
        return total.detach()

    def finish_gradients(self) -> None:
        """Call once per step after the last ``backward`` and unscaling, before clipping; aligns gradients.

        Also for a step that is dropped: it resets what is accumulated for the alignment.
        """

    def take_notes(self) -> list[str]:
        """Notes that have come up since the last call, for the user to see."""
        notes, self._notes = self._notes, []
        return notes

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that begins, from 0, for warm-ups and stops."""
        self.epoch = epoch

    def export(self) -> nn.Module:
        """The plain student: the module that was given, without wrappers or parts of the method."""
        return unwrapped(self.student)

    def parts_state(self) -> dict[str, Tensor]:
        """The state of everything but the student: heads and projections; see ``load_parts_state``."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("student.")}

    def load_parts_state(self, state: dict[str, Tensor]) -> None:
        unfit = self.load_state_dict(state, strict=False)
        missing = [key for key in unfit.missing_keys if not key.startswith("student.")]
        if missing or unfit.unexpected_keys:
            raise ValueError(
                f"the state of the method's parts lacks {missing}, and has no place for {unfit[1]}"
            )

    @torch.no_grad()
    def check(self, batch: Batch) -> None:
        """Run a step in eval mode without gradient or side effects; raises if something does not fit."""
        with eval_mode(self, self.teacher):
            self.loss(batch)

    def _feature_terms(self, seen: Seen) -> Terms:
        """Hint and relations, which any method may have."""
        terms: Terms = {}
        if self.hint is not None:
            student, teacher = self._hint_layers
            terms["hint"] = self._hint_weight * self.hint(seen.student[student], seen.teacher[teacher])
        if self._distance_weight or self._angle_weight:
            student, teacher = self._relation_layers
            # Pairs and triples of the whole batch, over all ranks.
            pair = over_all_ranks(seen.student[student], seen.teacher[teacher])
            if self._distance_weight:
                terms["distance"] = self._distance_weight * distance_loss(*pair)
            if self._angle_weight:
                terms["angle"] = self._angle_weight * angle_loss(*pair)
        return terms

    def _given_logits(self, given: Sequence[Tensor]) -> Form:
        if not isinstance(self.teacher, GivenTeacher):
            if len(given) != 1:
                raise ValueError(
                    f"the batch has {2 + len(given)} entries; expected (inputs, target), or also the "
                    "teacher's logits; more are for a GivenTeacher"
                )
            return given[0]
        form = self.teacher.logits(*given)
        if isinstance(form, TopKLogits) and not self.takes_forms:
            raise ValueError(f"{self.name} needs all of the teacher's logits, but got those of K classes")
        # In a format of the teacher's own, which the loss does not know.
        in_its_format = self.teacher_dtype is not None
        if isinstance(form, LinearLogits) and (in_its_format or not self.takes_forms):
            return form.dense()
        return form

    def _find_both(self, student_path: str | None, teacher_path: str | None) -> None:
        """Raise ``FeatureError`` for layers that do not exist."""
        if student_path is not None:
            self.student_taps.find(student_path)
        of_teacher = teacher_path or student_path
        # A teacher whose outputs are given has no layers.
        if of_teacher is not None and not isinstance(self.teacher, GivenTeacher | None):
            self.teacher_taps.find(of_teacher)

    def _teacher_format(self, inputs: Any) -> contextlib.AbstractContextManager[Any]:
        if self.teacher_dtype is None or not isinstance(inputs, Tensor):
            return contextlib.nullcontext()
        wanted = self.teacher_dtype != torch.float32
        return torch.autocast(
            inputs.device.type, dtype=self.teacher_dtype if wanted else None, enabled=wanted
        )

    # For use in subclasses.

    def tap_both(self, student_path: str, teacher_path: str | None) -> tuple[str, str]:
        """Read a layer of each model in every forward pass; the teacher's path defaults to the student's."""
        return self.student_taps.add(student_path), self.teacher_taps.add(teacher_path or student_path)

    def classifier_of(self, role: str) -> tuple[str, nn.Linear]:
        """As ``find_classifier``; that it makes the logits is checked in each forward pass."""
        model = self.student if role == "student" else self.teacher
        assert model is not None
        path, linear = find_classifier(model, role)
        self._classifiers[role] = path, linear.out_features
        return path, linear

    def all_shapes(self) -> tuple[tuple[dict[str, torch.Size], torch.Size], ...]:
        """For student and teacher: the shapes of the tapped features, by path, and of the logits."""
        return tuple(taps.shapes(self.example) for taps in (self.student_taps, self.teacher_taps))

    @property
    def example(self) -> Tensor:
        if self._example is None:
            raise ValueError(
                f"example is missing: {self.name} needs it for the shapes of features; give a batch of "
                "inputs such as images[:2]"
            )
        return self._example

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()  # in case it was put into train mode since
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Method:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.teacher is not None:
            self.teacher._apply(fn)  # .to(device) moves the teacher along
        return self


def find_method(name: str) -> type[Method]:
    """The method with a name, or the class ``module:Class``, which is imported. Raises ``ValueError``."""
    if ":" not in name:
        if name not in Method._known:
            known = ", ".join(sorted(Method._known))
            raise ValueError(
                f"unknown method {name!r}{nearest(name, Method._known)}; expected one of {known}"
            )
        return Method._known[name]
    found = import_named(name, "the method")
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ValueError(
            f"the method {name!r} is {found!r}; expected a class derived from fastkd.distill.Method"
        )
    return found
