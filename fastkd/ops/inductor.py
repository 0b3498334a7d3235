"""A pass for Inductor, torch's compiler: a compiled loss scales its gradient in place."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.utils import get_donated_idxs
from torch._ops import OpOverload
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
        _give_each_its_own(graph)
        scaling = [node for node in graph.nodes if _scales(node)]
        if not scaling:  # the graph of a forward pass, whose inputs are not those that are donated
            return
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        donated = {inputs[index] for index in get_donated_idxs() or () if index < len(inputs)}
        for node in scaling:
            bases = node.kwargs.get("_all_bases", ())
            results = [user for user in node.users if user.args[1:] == (1,)]
            if len(bases) == len(results) == 1 and bases[0] in donated and list(bases[0].users) == [node]:
                _write_back(graph, bases[0], results[0])

    def uuid(self) -> bytes:
        """What Inductor's cache keeps compiled code by."""
        return get_hash_for_files((__file__,))


def _give_each_its_own(graph: Graph) -> None:
    """Copy a gradient that the forward pass returns twice: torch merges equal calls, and each is scaled."""
    output = graph.output_node()
    seen: set[tuple[Any, ...]] = set()
    for node in output.args[0] if isinstance(output.args[0], tuple | list) else ():
        if not isinstance(node, Node) or not _is_result(made := _memory_of(node)):
            continue
        if made.args in seen:
            with graph.inserting_before(output):
                copy = graph.call_function(torch.ops.aten.clone.default, (node,))
            copy.meta.update(node.meta)
            output.replace_input_with(node, copy)
        seen.add(made.args)


def _memory_of(node: Node) -> Node:
    """The node whose memory a view shares."""
    while isinstance(node.target, OpOverload):
        returned = node.target._schema.returns
        if len(returned) != 1 or returned[0].alias_info is None or not isinstance(node.args[0], Node):
            break
        node = node.args[0]
    return node


def _is_result(node: Node) -> bool:
    """Of one of our operators, as (operator, number) in ``args``."""
    maker = node.args[0] if node.target is operator.getitem else None
    return isinstance(maker, Node) and getattr(maker.target, "namespace", "") == "fastkd"


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
