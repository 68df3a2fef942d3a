"""CUDA graphs of the part of inference whose shapes follow from the size of the images.

A GPU runs the hundred kernels of backbone, pyramid, semantic branch and RPN head faster than a
processor can launch them one by one; captured in a graph they are launched together.
"""

import functools
import itertools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..layers.stand_in import is_eager

logger = logging.getLogger(__name__)

# A graph keeps the memory of all it computes: of no more sizes than these, and only of those that
# come again.
MAX_GRAPHS = 8
MAX_SEEN = 2**12
WARM_UPS = 2


class FixedPart:
    """Runs a function of a batch of images, compiled, or as graphs for the sizes that come again.

    A graph has the addresses of parameters and buffers, whose values may change; should one be put
    elsewhere or another in its place, it is captured anew. Hooks of modules run while it is
    captured, not when it runs. Copied or pickled, this has no graphs.
    """

    def __init__(self, *, cuda_graphs: bool = False, compiled: bool = False) -> None:
        """
        Args:
            cuda_graphs: whether to run graphs; where there is no GPU, has no effect.
            compiled: whether ``torch.compile`` compiles the function first.
        """
        self.cuda_graphs = cuda_graphs
        self.compiled = compiled
        self._compiled: dict[Callable, Callable] = {}
        self._graphs: dict[Any, _Graph | None] = {}
        self._seen: set[Any] = set()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return functools.partial(
            FixedPart, cuda_graphs=self.cuda_graphs, compiled=self.compiled
        ), ()

    def __call__(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        images: torch.Tensor,
        **options: bool,
    ) -> Any:
        """``function(images, **options)``.

        Args:
            function: computes with parameters and buffers of ``module``, without waiting for the
                GPU or looking at what it computes. The same one in each call.
            module: see above.
            images: (N, C, H, W).
            options: of ``function``.

        Returns:
            Tensors, in dicts, lists or tuples. They are valid until the next call.
        """
        if not is_eager(images):
            return function(images, **options)
        if self.compiled:
            if function not in self._compiled:
                self._compiled[function] = torch.compile(function)
            function = self._compiled[function]
        if self.cuda_graphs and images.is_cuda and not torch.is_grad_enabled():
            return self._by_graph(function, module, images, options)
        return function(images, **options)

    def _by_graph(
        self,
        function: Callable[..., Any],
        module: nn.Module,
        images: torch.Tensor,
        options: dict[str, bool],
    ) -> Any:
        """See :meth:`__call__`; without a graph where none is worth it."""
        precision = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        size = (images.shape, images.dtype, images.device)
        tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        key = (function, *size, precision, *tf32, *sorted(options.items()))
        graph = self._graphs.get(key)
        if graph and not graph.is_current():
            del self._graphs[key], graph
            graph = None
        if graph is None and self._is_worth_a_graph(key):
            try:
                graph = _Graph(functools.partial(function, **options), module, images)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                logger.warning("No CUDA graph of %s: %s", "x".join(map(str, images.shape)), reason)
            self._graphs[key] = graph
        return graph(images) if graph else function(images, **options)

    def _is_worth_a_graph(self, key: Any) -> bool:
        """Whether a size has come before, and neither failed nor comes too late."""
        if key in self._graphs or len(self._graphs) >= MAX_GRAPHS:
            return False
        if key in self._seen:
            return True
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(key)
        return False


class _Graph:
    """A function captured for one size."""

    def __init__(
        self, function: Callable[[torch.Tensor], Any], module: nn.Module, images: torch.Tensor
    ) -> None:
        """
        Raises:
            RuntimeError: what the function does cannot be captured.
        """
        self._places = [
            (place, name, value)
            for m in module.modules()
            for place in (m._parameters, m._buffers, m._modules)
            for name, value in place.items()
        ]
        self._addresses = [
            (value, value.data_ptr())
            for value in itertools.chain(module.parameters(), module.buffers())
        ]
        self._images = images.clone()
        self._graph = torch.cuda.CUDAGraph()
        # Weights that autocast has converted and kept would be gone when the graph runs.
        dtype = torch.get_autocast_dtype("cuda")
        enabled = torch.is_autocast_enabled("cuda")
        with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(self._images)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._outputs = function(self._images)

    def is_current(self) -> bool:
        """Whether all parameters and buffers are where they were."""
        return all(place.get(name) is value for place, name, value in self._places) and all(
            value.data_ptr() == address for value, address in self._addresses
        )

    def __call__(self, images: torch.Tensor) -> Any:
        self._images.copy_(images)
        self._graph.replay()
        # Views: what is done to them in place is of no consequence to the next run.
        return tree_map_only(torch.Tensor, lambda x: x.view_as(x), self._outputs)
