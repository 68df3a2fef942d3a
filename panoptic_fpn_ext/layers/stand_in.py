"""Modules that stand in for Detectron2's and PyTorch's own, and know when not to."""

import copy
from typing import Any

import torch
from torch import nn


class StandIn:
    """Mixin of a module that does what the class after it does, in a better way.

    A stand-in is made of the module that it stands in for and shares its parameters, buffers and
    children. Beside them it has nothing but its settings.
    """

    @classmethod
    def stands_in_for(cls) -> type[nn.Module]:
        return next(base for base in cls.__mro__[1:] if not issubclass(base, StandIn))

    @classmethod
    def of(cls, module: nn.Module, **settings: Any) -> nn.Module:
        """A stand-in for ``module``, an instance of :meth:`stands_in_for` or a stand-in itself.

        Args:
            module: stays as it is.
            settings: of those, the stand-in gets what its class annotates.
        """
        chosen = {name: settings[name] for name in cls.__annotations__}
        return _twin(module, cls, chosen)

    def plain(self) -> nn.Module:
        """A module as the one that this was made of."""
        twin = _twin(self, self.stands_in_for(), {})
        for name in type(self).__annotations__:
            delattr(twin, name)
        return twin


def _twin(module: nn.Module, cls: type[nn.Module], attributes: dict[str, Any]) -> nn.Module:
    """An instance of ``cls`` with what ``module`` has; adding to one does not add to the other."""
    twin = cls.__new__(cls)
    for name, value in vars(module).items():
        vars(twin)[name] = copy.copy(value) if isinstance(value, (dict, list)) else value
    vars(twin).update(attributes)
    return twin


def is_eager(*tensors: torch.Tensor) -> bool:
    """Whether what is done to ``tensors`` happens now: not traced, compiled or exported, and not
    under a transform of ``torch.func``."""
    return (
        all(type(x) in (torch.Tensor, nn.Parameter) for x in tensors)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_compiling()
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def is_eager_on_gpu(*tensors: torch.Tensor) -> bool:
    """Whether what is done to ``tensors`` happens now, on a GPU."""
    return all(x.is_cuda for x in tensors) and is_eager(*tensors)


def is_eager_on_cpu_in_any_precision(*tensors: torch.Tensor) -> bool:
    """Whether what is done to ``tensors`` happens now, on a CPU."""
    return all(x.device.type == "cpu" for x in tensors) and is_eager(*tensors)


def is_eager_on_cpu(*tensors: torch.Tensor) -> bool:
    """Whether what is done to ``tensors`` happens now, on a CPU, in float32."""
    return (
        all(x.dtype == torch.float32 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and is_eager_on_cpu_in_any_precision(*tensors)
    )
