r"""How much memory a training step takes on a GPU: calculated from shapes, without a GPU.

    step_bytes(make, (3, 256, 256), 24)     bytes of a step of 24 images of this network
    notes(net, config, dist)                a line, if that is more than this GPU has

The calculation is for bf16 in eager mode. torch.compile keeps less: a third for `ffhq256`. No
number was compared with a GPU yet.

Not here: the table of all presets (python -m benchmarks memory).

    python -c "from support import memory; print(memory.step_bytes.__doc__)"
"""

import math
import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from support.precision import autocast_dtype


class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = weakref.WeakKeyDictionary(), 0, 0

    def count(self, tensor):
        """Count the tensor's storage until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage], self.now = size, self.now + size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out


def norm_in_float32(x, *arguments, norm=F.group_norm):
    """group_norm as CUDA's autocast has it; the CPU's leaves it in bf16."""
    return norm(x.float(), *arguments)


def step_bytes(make, shape, images, recompute=False, dtype=torch.bfloat16):
    """Bytes of a training step on a GPU, eager: shapes alone go through the network.

    make() builds it, net(x, c) with x (images, *shape) and c (images,). Weights and their average
    take 8 bytes a parameter, and Adam's two moments 8 for each that is trained. On top comes the
    most that forward and backward hold at once, weights' gradients included."""
    # The tensors are the CPU's: as `is_cuda`, the network gives them to the fused attention.
    with (FakeTensorMode(), mock.patch.object(FakeTensor, "is_cuda", True, create=True),
          mock.patch.object(F, "group_norm", norm_in_float32)):
        net = make()
        net.recompute = recompute
        x = torch.empty(images, *shape)
        c = x.new_ones(images)
        with Peak() as peak:
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = net(x, c).float().square().mean()
            loss.backward()
    return peak.most + sum(8 * p.numel() * (1 + p.requires_grad) for p in net.parameters())


def notes(net, config, dist):
    """A line, in a list, if a training step may not fit this GPU. It names a --microbatch."""
    arguments = config.settings().get("unet")
    if dist.device.type != "cuda" or not dist.is_main or not arguments:
        return []
    b, dtype = config.batch_size // dist.world_size, autocast_dtype(config.precision, dist.device)
    micro = min(config.microbatch or b, b)

    def make():
        """The same network, with the same weights frozen."""
        other = type(net)(**arguments)
        for p, real in zip(other.parameters(), net.parameters(), strict=True):
            p.requires_grad_(real.requires_grad)
        return other

    def need(images):  # each of them at k timesteps
        shape = (arguments["in_channels"], *[arguments["image_size"]] * 2)
        return step_bytes(make, shape, config.sa_k * images, config.recompute, dtype)

    card, whole = torch.cuda.mem_get_info(dist.device)[1], need(micro)
    if whole <= card:
        return []
    each = (whole - need(1)) / max(1, micro - 1)
    fits = micro - math.ceil((whole - card) / each) if each else 0
    advice = "--recompute takes less" if not config.recompute else "a larger GPU is needed"
    if fits > 0:  # in parts of one size
        advice = f"--microbatch {math.ceil(b / math.ceil(b / fits))} fits"
    return [f"{micro} images at a time take about {whole / 1e9:.0f} GB (with --compile, perhaps a "
            f"third), and this GPU has {card / 1e9:.0f}. If memory runs out: {advice}"]
