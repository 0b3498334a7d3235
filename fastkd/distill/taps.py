"""Features of inner layers, by module path: forward hooks that exist only while a model runs."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

INPUT = ":input"


class FeatureError(ValueError):
    """A layer does not exist, did not run, or does not return a tensor of features."""


class Taps:
    """Reads the outputs of the layers of ``model`` that ``paths`` name; ``path:input`` is a layer's input.

    Paths are those of ``model.named_modules()``, without wrappers such as DDP's. ``role`` ("student",
    "teacher") is for messages.
    """

    def __init__(self, model: nn.Module, role: str) -> None:
        self._model = model
        self._plain = unwrapped(model)
        self._role = role
        self._layers: dict[str, tuple[nn.Module, bool]] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self._layers)

    def add(self, path: str) -> str:
        """Read ``path`` from now on; returns it. Raises ``FeatureError`` if there is no such layer."""
        self._layers[path] = (self.find(path), path.endswith(INPUT))
        return path

    def find(self, path: str) -> nn.Module:
        """The layer of ``path``. Raises ``FeatureError`` with similar names if there is none."""
        name = path.removesuffix(INPUT)
        layers: dict[str, nn.Module] = dict(self._plain.named_modules())
        if not name or name not in layers:
            raise FeatureError(f"the {self._role} has no layer {name!r}; {_near(name, layers)}")
        return layers[name]

    @contextlib.contextmanager
    def reading(self) -> Iterator[dict[str, Tensor]]:
        """``with taps.reading() as features: model(inputs)``; ``features`` is complete after the block."""
        found: dict[str, Any] = {}
        versions: dict[str, int] = {}

        def keep(path: str, value: Any) -> None:
            if isinstance(value, tuple) and len(value) == 1:
                (value,) = value
            where = f"the {self._role}'s layer {path!r}"
            if path in found:
                raise FeatureError(
                    f"{where} runs more than once in a forward pass; name a layer that runs once"
                )
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2:
                raise FeatureError(
                    f"{where} gives {_describe(value)}; expected a tensor of features [N, D, ...]"
                )
            found[path], versions[path] = value, _version(value)

        with self._eagerly(), contextlib.ExitStack() as hooks:
            for path, (layer, is_input) in self._layers.items():
                if is_input:
                    # Default arguments: a closure would see the last values of the loop's variables.
                    handle = layer.register_forward_pre_hook(lambda _, args, path=path: keep(path, args))
                else:
                    handle = layer.register_forward_hook(lambda _, __, output, path=path: keep(path, output))
                hooks.callback(handle.remove)
            yield found
        for path in self._layers:
            if path not in found:
                raise FeatureError(f"the {self._role}'s layer {path!r} did not run in the forward pass")
            if _version(found[path]) != versions[path]:
                raise FeatureError(
                    f"the output of the {self._role}'s layer {path!r} is changed in place by a later layer "
                    "(an in-place ReLU?); name that later layer"
                )

    def _eagerly(self) -> contextlib.AbstractContextManager[Any]:
        """Compiled code of a pass without the hooks, or with others, would run again without these."""
        if not self._layers or torch.compiler.is_compiling() or "torch._dynamo" not in sys.modules:
            return contextlib.nullcontext()
        stance: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance

    @torch.no_grad()
    def shapes(self, example: Tensor) -> tuple[dict[str, torch.Size], torch.Size]:
        """Shapes of features and logits for a batch; runs the model in eval mode without changing it."""
        with eval_mode(self._model), self.reading() as features:
            logits = logits_of(self._model, example, self._role)
        return {path: feature.shape for path, feature in features.items()}, logits.shape


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel or torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        else:
            inner = getattr(model, "_orig_mod", None)
        if inner is None:
            return model
        model = inner


def logits_of(model: nn.Module, inputs: Any, role: str) -> Tensor:
    """The logits ``[N, C]`` that ``model(inputs)`` is or names. Raises ``ValueError``.

    A dict or Hugging Face's ModelOutput names them by an entry ``logits``. Tuples are refused, since the
    meaning of further entries, such as auxiliary logits, is unknown.
    """
    output = model(inputs)
    value = named_logits(output)
    if not isinstance(value, Tensor) or value.dim() != 2:
        auxiliary = any("aux" in name for name in getattr(type(output), "_fields", ()))
        remedy = (
            "; build it with aux_logits=False"
            if auxiliary
            else "; wrap it in a module that returns them"
            if not isinstance(output, Tensor)
            else ""
        )
        mode = " in train mode" if model.training and auxiliary else ""
        raise ValueError(
            f"the {role} returns {_describe(output)}{_entries(output)}{mode}; expected logits, a tensor "
            f"[N, C]{remedy}"
        )
    return value


def named_logits(output: Any) -> Any:
    """``output["logits"]`` of a mapping (such as a ModelOutput); any other output unchanged."""
    return output.get("logits", output) if isinstance(output, Mapping) else output


@contextlib.contextmanager
def eval_mode(*models: nn.Module | None) -> Iterator[None]:
    """Put the models into eval mode; restore each module's mode afterwards."""
    modes = {module: module.training for model in models if model is not None for module in model.modules()}
    try:
        for model in models:
            if model is not None:
                model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version  # inference tensors have no version


def _near(name: str, layers: Iterable[str]) -> str:
    paths = [path for path in layers if path]
    near = difflib.get_close_matches(name, paths, n=5, cutoff=0.3)
    if not near:
        near = [path for path in paths if "." not in path][:10]
    return f"the nearest are {', '.join(near)}" if near else "it has no inner layers"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def _entries(value: Any) -> str:
    """The entries of a mapping or a tuple, appended to ``_describe``."""
    if isinstance(value, Mapping):
        return f" with {', '.join(map(str, value)) or 'nothing'}"
    if not isinstance(value, tuple | list):
        return ""
    parts = getattr(value, "_fields", None) or [
        f"tensor {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__ for part in value
    ]
    return f" ({', '.join(parts[:6])})"


def pooled(feature: Tensor) -> Tensor:
    """``[N, D]`` of a feature map: the mean over space of ``[N, D, H, W]``, over tokens of ``[N, L, D]``."""
    if feature.dim() == 2:
        return feature
    return feature.mean(1) if feature.dim() == 3 else feature.flatten(2).mean(2)


def width_of(shape: torch.Size) -> int:
    """Channels D of features ``[N, D]``, ``[N, L, D]`` or ``[N, D, H, W]``."""
    return shape[-1] if len(shape) == 3 else shape[1]
