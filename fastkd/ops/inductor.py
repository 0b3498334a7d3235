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
    """Scales the gradient of a compiled loss in place, where ``torch.compile`` writes a product of its own.

    A loss computes its gradient with its value, and ``backward`` multiplies it by ``grad_output``: two of
    five accesses per logit, and none of the three with this pass if ``grad_output`` is 1::

        step = torch.compile(step, options={"post_grad_custom_post_pass": fastkd.ScaleInPlace()})

    Results are the same. Only gradients that autograd will not need again are scaled in place, those that
    torch itself hands over for reuse: ``torch._functorch.config.donated_buffer``, on by default, with which
    ``retain_graph=True`` is an error in compiled code. Losses of ``LinearLogits`` are not changed, nor those
    in float16, whose gradient is computed in ``backward``. Inductor's passes are not a public interface of
    torch: with a release in which this one finds nothing, the gradient is copied first.
    """

    def __call__(self, graph: Graph) -> None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        donated = {inputs[index] for index in get_donated_idxs() or ()}
        for node in list(graph.nodes):
            if _scales(node) and (gradient := node.kwargs["_all_bases"][0]) in donated:
                self._write_back(graph, gradient, node)

    @staticmethod
    def _write_back(graph: Graph, gradient: Node, scaling: Node) -> None:
        """Say that the result is the input's new value: Inductor then copies neither before nor after."""
        (result,) = (user for user in scaling.users if user.args[1] == 1)
        if list(gradient.users) != [scaling]:
            return
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(torch.ops.aten.copy_.default, (gradient, result))
        copy.meta.update(gradient.meta)

    def uuid(self) -> bytes:
        """What Inductor's cache keeps compiled code by."""
        return get_hash_for_files((__file__,))


def _scales(node: Node) -> bool:
    return node.target is auto_functionalized_v2 and node.args[0] is torch.ops.fastkd.scale_rows_.default


def is_used() -> bool:
    """Whether the code that is being compiled gets this pass."""
    config: Any = sys.modules["torch._inductor.config"]
    passes = config.post_grad_custom_post_pass
    return any(
        isinstance(one, ScaleInPlace) for one in (passes if isinstance(passes, list | tuple) else [passes])
    )
