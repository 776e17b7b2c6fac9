"""The autograd graph from the output down to the parameters, walked without any work on a device.

What was computed is written in it: two batches with the same graph went through the same
operations in the same order. A use of a parameter that appears only in some batches shows, even
inside a function of one's own, and so does the precision of everything between the output and a
parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ewc_lib._precision import products_are_rounded


@dataclass(frozen=True, eq=False)
class Graph:
    """What was computed on the way to one output.

    Attributes
    ----------
    signature
        The kinds of all operations and how they are connected.
    has_custom_functions
        Whether some of them are nobody's but the user's: what they do with a batch is not known.
    """

    signature: int
    has_custom_functions: bool
    _coarsest: float
    _eps: dict[Node, float] | None
    _leaves: frozenset[int] = frozenset()

    @classmethod
    def of(cls, output: Tensor) -> Graph:
        """Walk from an output to the ends of its graph."""
        if output.grad_fn is None:
            return NOTHING
        number: dict[Node, int] = {output.grad_fn: 0}
        for node in (nodes := [output.grad_fn]):
            for child, _ in node.next_functions:
                if child is not None and child not in number:
                    number[child] = len(number)
                    nodes.append(child)
        signature = hash(tuple(_signature(node, number) for node in nodes))
        eps = [max(map(rounding, node._input_metadata), default=0.0) for node in nodes]
        uniform = len(set(eps) - {0.0}) < 2
        paths = None if uniform else _along_paths(nodes, eps)
        variables = (getattr(node, "variable", None) for node in nodes)
        leaves = frozenset(id(v) for v in variables if v is not None)
        return cls(signature, any(map(_is_custom, nodes)), max(eps), paths, leaves)

    def reaches(self, parameter: Tensor) -> bool:
        """Tell whether some way leads from the output to a parameter."""
        return id(parameter) in self._leaves

    def eps(self, node: Node | None = None) -> float:
        """Return the machine precision of the coarsest operation between the output and a node.

        Without a node, that of all operations.
        """
        if node is None or self._eps is None:
            return self._coarsest
        return self._eps.get(node, 0.0)

    def eps_of(self, parameter: Tensor) -> float:
        """Return the machine precision of the coarsest operation on the way to a parameter."""
        return self.eps(None if self._eps is None else get_gradient_edge(parameter).node)


def endmost(output: Tensor, nodes: Collection[Node]) -> set[Node]:
    """Return those of some nodes from which the way back leads to none of the others."""
    leads: dict[Node, bool] = {}
    pending = [output.grad_fn]
    while pending:
        node = pending[-1]
        if node is None or node in leads:
            pending.pop()
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if waiting := [child for child in children if child not in leads]:
            pending += waiting
        else:
            leads[node] = any(child in nodes or leads[child] for child in children)
    return {node for node in nodes if not leads.get(node, False)}


NOTHING = Graph(0, False, 0.0, None)
"""The graph of an output that depends on no parameter."""


def _signature(node: Node, number: dict[Node, int]) -> tuple[Any, ...]:
    ends = tuple(-1 if child is None else number[child] for child, _ in node.next_functions)
    variable = getattr(node, "variable", None)
    return type(node), ends, None if variable is None else id(variable)


def _is_custom(node: Node) -> bool:
    return isinstance(node, torch.autograd.function.BackwardCFunction) or (
        type(node).__name__ == "CppFunction"
    )


def rounding(result: Any) -> float:
    """Return the relative rounding error of an operation, given its result or a gradient of it."""
    dtype = result.dtype
    if not (dtype.is_floating_point or dtype.is_complex):
        return 0.0
    single = dtype in (torch.float32, torch.complex64)
    return torch.finfo(torch.float16 if single and products_are_rounded() else dtype).eps


def _along_paths(nodes: Iterable[Node], own: Iterable[float]) -> dict[Node, float]:
    """Return for each node the coarsest precision on any way from the output to it."""
    coarsest = dict(zip(nodes, own, strict=True))
    waiting = dict.fromkeys(coarsest, 0)
    for node in coarsest:
        for child, _ in node.next_functions:
            if child is not None:
                waiting[child] += 1
    ready = [next(iter(coarsest))]
    for node in ready:
        for child, _ in node.next_functions:
            if child is not None:
                coarsest[child] = max(coarsest[child], coarsest[node])
                waiting[child] -= 1
                if not waiting[child]:
                    ready.append(child)
    return coarsest
