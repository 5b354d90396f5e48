"""A GPU, emulated on a CPU: tensors that claim to be on `mps` or `cuda`, computed on the CPU.
Both refuse to compute with tensors of two devices; mps also refuses what Apple's GPUs refuse,
float64 and copies that do not wait.

from emulated import emulated
with emulated("mps"): train.main([..., "--device", "mps"])
"""

import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from support import rng

waits = []  # whatever stops a program until the GPU has finished
now = SimpleNamespace(kind="mps")  # the kind of device


class OnGPU(torch.Tensor):
    """A wrapper; `.held` is the CPU tensor with the numbers."""

    @staticmethod
    def __new__(cls, real):
        if real.dtype == torch.float64 and now.kind == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            layout=real.layout,
            device="meta",  # what C++ sees: it has to know the device
            requires_grad=real.requires_grad,
        )

    device = property(lambda self: torch.device(now.kind, 0))
    is_meta, is_cuda = False, property(lambda self: now.kind == "cuda")

    def __init__(self, real):
        self.held = real

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"OnGPU({self.held})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # what torch.save writes
        return self.held.__reduce_ex__(protocol)


def dispatch(function, args, kwargs):
    """Compute on the CPU -> tensors on the GPU if an input was, or if the call asked for it."""
    inputs = tree_leaves((args, kwargs))
    wanted = kwargs.get("device")
    on_gpu = any(isinstance(v, OnGPU) for v in inputs)
    if wanted is not None:
        assert not (kwargs.get("non_blocking") and now.kind == "mps"), "copies must wait"
        on_gpu = torch.device(wanted).type == now.kind
        kwargs = {**kwargs, "device": "cpu"}
    elif on_gpu and function is not torch.ops.aten.copy_.default:
        others = [v for v in inputs if isinstance(v, torch.Tensor) and not isinstance(v, OnGPU)]
        indexing = function in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)
        assert indexing or all(v.dim() == 0 for v in others), f"{function}: two devices"
    real_args, real_kwargs = tree_map_only(OnGPU, lambda v: v.held, (args, kwargs))
    to_cpu = wanted is not None and any(isinstance(v, OnGPU) for v in inputs) and not on_gpu
    if to_cpu or function is torch.ops.aten._local_scalar_dense.default:
        waits.append(str(function))
    if function is torch.ops.aten._local_scalar_dense.default:
        return function(*real_args, **real_kwargs)
    same = {id(v.held): v for v in inputs if isinstance(v, OnGPU)}
    out = function(*real_args, **real_kwargs)
    if not on_gpu:
        return out
    return tree_map(
        lambda v: (
            same.get(id(v)) if id(v) in same else OnGPU(v) if isinstance(v, torch.Tensor) else v
        ),
        out,
    )


class Factories(TorchDispatchMode):
    """torch.zeros(..., device="mps") and x.to("mps") of CPU tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device == torch.device("meta"):  # zeros that autograd needs
            kwargs = {**kwargs, "device": (device := torch.device(now.kind))}
        if device is not None and torch.device(device).type == now.kind:
            return dispatch(function, args, kwargs)
        return function(*args, **kwargs)


TO = torch.Tensor.to


def to(self, *args, **kwargs):
    """Tensor.to, which in C++ fails for devices that this PyTorch was built without."""
    if args and isinstance(args[0], torch.Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type in (self.device.type, "meta"):
        layout = {} if layout is None else {"memory_format": layout}
        return TO(self, dtype or self.dtype, **layout)
    assert not (non_blocking and now.kind == "mps"), "copies must wait"
    if not non_blocking:
        waits.append("to")
    assert not (self.requires_grad and torch.is_grad_enabled()), "not emulated"
    real = self.held if isinstance(self, OnGPU) else self.detach()
    held = TO(real, dtype or self.dtype, copy=True)
    return OnGPU(held) if device.type == now.kind else held


class Generator(torch.Generator):
    device = property(lambda self: torch.device(now.kind, 0))


def generator(*key, device="cpu"):
    kind = Generator if torch.device(device).type == now.kind else torch.Generator
    g = kind()
    g.manual_seed(rng.hash_ints(*key))
    return g


CUDA = dict(  # what PyTorch without CUDA, or without a driver, does not have
    is_current_stream_capturing=lambda: False,
    _lazy_init=lambda: None,
    is_available=lambda: True,
    device_count=lambda: 1,
    set_device=lambda device: None,
    synchronize=lambda device=None: None,
    mem_get_info=lambda device: (10**9, 10**9),
    get_device_capability=lambda device: (9, 0),
)


@contextlib.contextmanager
def emulated(kind):
    """Inside, torch has such a device."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    now.kind = kind
    patches = [
        mock.patch.object(torch.Tensor, "to", to),
        mock.patch.object(torch.Tensor, "pin_memory", lambda self: self),
        mock.patch.object(rng, "generator", generator),
    ]
    if kind == "mps":
        patches.append(mock.patch.object(torch.backends.mps, "is_available", lambda: True))
    else:
        patches += [mock.patch.object(torch.cuda, k, v) for k, v in CUDA.items()]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(Factories())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
