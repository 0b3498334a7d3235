"""Finding a network's classifier, whose input is the pooled features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .taps import FeatureError, unwrapped

# Attribute names in torchvision's, timm's and fastkd's networks.
_NAMES = ("fc", "classifier", "head", "heads", "linear")
_REMEDY = "name the layer whose output is the pooled features, or PATH:input for the input of the layer PATH"


def find_classifier(model: nn.Module, role: str = "student") -> tuple[str, nn.Linear]:
    """Path and module of the last linear layer of ``model``.

    timm's networks have ``get_classifier``; for others it is the last ``nn.Linear`` in ``fc``,
    ``classifier``, ``head``, ``heads`` or ``linear``, or the only one in the network. Raises
    ``FeatureError``, also if several of these have linear layers.
    """
    model = unwrapped(model)
    tell = getattr(model, "get_classifier", None)
    named: list[Any] = [tell()] if callable(tell) else [getattr(model, name, None) for name in _NAMES]
    paths = {module: path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {_last_linear(module) for module in named if isinstance(module, nn.Module)} - {None}
    found = found or set(paths)
    if len(found) == 1:
        (linear,) = found
        assert linear is not None
        return paths[linear], linear
    linears = list(paths.values())
    shown = f"its linear layers are {', '.join(linears[-8:])}" if linears else "it has no linear layer"
    raise FeatureError(
        f"the classifier of the {role} ({type(model).__name__}) cannot be found: {shown}; {_REMEDY}"
    )


def check_makes_logits(role: str, path: str, outputs: int, logits: object) -> None:
    """Raise ``FeatureError`` if stored logits have not as many classes as the layer found has outputs."""
    if isinstance(logits, Tensor) and logits.shape[-1] != outputs:
        raise FeatureError(
            f"the {role}'s layer {path!r} was taken for its classifier, but has {outputs} outputs, "
            f"and the logits {logits.shape[-1]} classes; {_REMEDY}"
        )


def _last_linear(module: nn.Module) -> nn.Linear | None:
    linears = [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
    return linears[-1] if linears else None
