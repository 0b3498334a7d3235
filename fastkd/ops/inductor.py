"""A pass for Inductor, torch's compiler: a compiled loss scales its gradient in place."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.utils import get_donated_idxs
from torch.fx import Graph, Node


class ScaleInPlace(CustomGraphPass):
    """Scales the gradient of a compiled loss in place; a pass for ``torch.compile``.

    A loss computes its gradient with its value, and ``backward`` multiplies it by ``grad_output``. Compiled
    code does so in a kernel of its own, which makes five accesses per logit of three. With this pass they are
    three if ``grad_output`` is 1::

        step = torch.compile(step, options={"post_grad_custom_post_pass": fastkd.ScaleInPlace()})

    (Beside a ``mode``, set ``torch._inductor.config.post_grad_custom_post_pass``.) Results are the same. Only
    gradients that autograd will not need again are scaled in place, those that torch itself hands over for
    reuse: ``torch._functorch.config.donated_buffer``, on by default, with which ``retain_graph=True`` is an
    error in compiled code. Losses of ``LinearLogits`` are not changed, nor those in float16, whose gradient
    is computed in ``backward``. Inductor's passes are not a public interface of torch: with a release in
    which this one finds nothing, the gradient is copied first. Not yet run on a GPU, nor with a torch other
    than 2.14.
    """

    def __call__(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        donated = {inputs[index] for index in get_donated_idxs() or ()}
        for node in list(graph.nodes):
            if not _scales(node):
                continue
            bases = node.kwargs.get("_all_bases", ())
            results = [user for user in node.users if user.args[1:] == (1,)]
            if len(bases) == len(results) == 1 and bases[0] in donated and list(bases[0].users) == [node]:
                _write_back(graph, bases[0], results[0])

    def uuid(self) -> bytes:
        """What Inductor's cache keeps compiled code by."""
        return get_hash_for_files((__file__,))


def _scales(node: Node) -> bool:
    return node.target is auto_functionalized_v2 and node.args[0] is torch.ops.fastkd.scale_rows_.default


def _write_back(graph: Graph, gradient: Node, result: Node) -> None:
    """Say that the result is the input's new value: Inductor then copies neither before nor after."""
    with graph.inserting_before(graph.output_node()):
        copy = graph.call_function(torch.ops.aten.copy_.default, (gradient, result))
    copy.meta.update(gradient.meta)


def is_used() -> bool:
    """Whether the code that is being compiled gets this pass."""
    config: Any = sys.modules["torch._inductor.config"]
    passes = config.post_grad_custom_post_pass
    return any(
        isinstance(one, ScaleInPlace) for one in (passes if isinstance(passes, list | tuple) else [passes])
    )
