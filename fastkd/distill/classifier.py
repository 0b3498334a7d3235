"""Finding a network's classifier, whose input is the pooled features."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .taps import FeatureError, unwrapped

# Attribute names in torchvision's, timm's and fastkd's networks, by priority.
_NAMES = ("fc", "classifier", "head", "heads", "linear")


def find_classifier(model: nn.Module, role: str = "student") -> tuple[str, nn.Linear]:
    """Path and module of the last linear layer of ``model``.

    timm's networks have ``get_classifier``; for others it is the last ``nn.Linear`` in ``fc``,
    ``classifier``, ``head``, ``heads`` or ``linear``, or the only one in the network. Raises
    ``FeatureError``.
    """
    model = unwrapped(model)
    tell = getattr(model, "get_classifier", None)
    candidates: Iterable[nn.Module | None] = [getattr(model, name, None) for name in _NAMES]
    if callable(tell):
        candidates = [tell()]
    for candidate in candidates:
        if isinstance(candidate, nn.Module) and (linear := _last_linear(candidate)) is not None:
            return _path_of(model, linear), linear
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if len(linears) == 1:
        module = model.get_submodule(linears[0])
        assert isinstance(module, nn.Linear)
        return linears[0], module
    shown = f"its linear layers are {', '.join(linears[-8:])}" if linears else "it has no linear layer"
    raise FeatureError(
        f"the classifier of the {role} ({type(model).__name__}) cannot be found: {shown}; name the layer "
        "whose output is the pooled features, or PATH:input for the input of the layer PATH"
    )


def _last_linear(module: nn.Module) -> nn.Linear | None:
    linears = [inner for inner in module.modules() if isinstance(inner, nn.Linear)]
    return linears[-1] if linears else None


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    paths: dict[nn.Module, str] = {module: path for path, module in model.named_modules()}
    return paths[wanted]
