r"""float32, TF32 or bf16: what the hardware computes in, and networks made fast for inference.

    autocast_dtype("auto", device)     bf16 if the hardware has units for it, else None (float32)
    for_training(net, device, flag)    compiled, or as it is
    for_inference(net, device)         a frozen network as a plain function

Not here: when to use which (the programs' --precision).

    python -c "from support import precision; print(precision.for_inference)"
"""

import warnings
from pathlib import Path

import torch

GRAPH_PIXELS = 2**16  # of a step on one GPU, 64 images of 32×32: an estimate, not measured


def set_tf32(allowed):
    """Let GPUs round float32 products to 10 bits (TF32), for speed, or forbid it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The old switch sets the new ones too. Setting only the new ones makes torch.export and
        # inductor raise when they read the old one (PyTorch issue 179445).
        torch.backends.cudnn.allow_tf32 = allowed


def autocast_dtype(name, device):
    """auto | fp32 | tf32 | bf16, a torch.device -> the dtype of autocast, or None. ValueError: the
    device has no units for it."""
    if name == "tf32" and device.type != "cuda":
        raise ValueError("--precision tf32 is for GPUs (--device cuda): use fp32 or bf16")
    if device.type == "mps":  # autocast to bf16 depends on the version of macOS there
        if name == "bf16":
            raise ValueError("--precision bf16 is for cuda and cpu: leave it out with --device mps")
        return None
    if name == "auto":
        name = "bf16" if has_bf16_units(device) else "fp32"
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(
            including_emulation=False):
        raise ValueError("--precision bf16: this GPU has no units for it; use --precision fp32")
    return torch.bfloat16 if name == "bf16" else None


def has_bf16_units(device):
    """True if bf16 is faster than float32: GPUs since Ampere, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        return False
    flags = text.split("flags", 1)[-1].split("\n", 1)[0].split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


class GroupNorm(torch.nn.GroupNorm):
    """In float32 under autocast to bf16, too. CUDA's autocast does that itself. On CPUs it is the
    faster way, since then the maps can have their channels last (unet.lay_out)."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype))


def for_inference(net, device, precision="fp32", compiled=False):
    """Freeze a network and make it fast -> a function of the same arguments.

    The module is changed: it moves to the device, goes into eval mode, and with bf16 its
    convolutions hold bf16 weights. Autocast gives the same numbers, but casts frozen weights at
    every call. ValueError: a GPU without bf16.

    On GPUs, and if compiled, a batch smaller than the largest so far is filled up with copies of
    its first image, and the results of these are cut off: another size would be compiled again.
    """
    dtype = autocast_dtype(precision, device)
    net.to(device).eval().requires_grad_(False)
    for layer in net.modules():
        if dtype is not None and isinstance(layer, torch.nn.Conv2d):
            layer.to(dtype)
    if compiled:
        # freezing: weights become constants, in the layout that the CPU's convolutions prefer
        layout_for_compile(net, device)
        net = torch.compile(net, dynamic=False, options={"freezing": device.type == "cpu"})
    largest = 0

    @torch.no_grad()
    def call(*inputs):
        nonlocal largest
        n = len(inputs[0])
        if compiled or device.type == "cuda":
            largest = max(largest, n)
            inputs = [torch.cat([v, v[:1].expand(largest - n, *v.shape[1:])]) if n < largest else v
                      for v in inputs]
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            out = net(*inputs)
        return out[:n] if isinstance(out, torch.Tensor) else tuple(v[:n] for v in out)

    return call


def compiles(flag, device):
    """--compile, --no-compile, or neither (None): on for CUDA, where it halves a step's time."""
    return device.type == "cuda" if flag is None else flag


def place(net, device, flag):
    """Move a network that is to be trained to its device, in the layout that for_training needs."""
    net.to(device)
    if compiles(flag, device):
        layout_for_compile(net, device)


def for_training(net, device, flag, graphs=False):
    """The network as training calls it: compiled, or as it is. Static shapes: with a batch size
    that is a symbol, inductor gives up channels_last.

    graphs: as CUDA graphs, which start all kernels of a pass at once."""
    if not compiles(flag, device):
        return net
    graphs = dict(mode="reduce-overhead") if graphs and device.type == "cuda" else {}
    return torch.compile(net, dynamic=False, **graphs)


def suits_graphs(config, world_size):
    """True if a step is so small that a GPU waits for the program, and has a single pass: a graph's
    next pass writes over the gradients of the last, which must not add up in place. One process
    only: graphs under DDP were never tried."""
    b = config.batch_size
    small = b * config.sa_k * config.image_size**2 <= GRAPH_PIXELS
    return world_size == 1 and small and (config.microbatch or b) >= b


def layout_for_compile(net, device):
    """On CUDA, channels_last: cuDNN's bf16 convolutions need it, and inductor keeps the weights'
    layout. In eager mode it only costs, since GroupNorm returns NCHW (PyTorch issue 111824)."""
    if device.type == "cuda":
        net.to(memory_format=torch.channels_last)
