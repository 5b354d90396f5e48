r"""Where the numbers are computed, cuda, mps or cpu, and how tensors get there.

    choose_device("auto")             a torch.device
    move(tensor, device)              without a wait, if the device allows it
    double(tensor)                    float64, on the CPU if the device has none

Apple's GPUs (mps) have no float64, and a copy to them that does not wait silently gives wrong
numbers (PyTorch issues 139550, 189690). They run one process, in float32. This was not tried on
a Mac yet: auto never chooses mps.

Not here: precision and compilation (precision.py), several processes (distributed.py).

    python -c "from support import device; print(device.choose_device('auto'))"
"""

import torch


def choose_device(name="auto", local_rank=0, world_size=1):
    """The torch.device of this process. ValueError: there is none of that name."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU. Check nvidia-smi, and install a "
                             "CUDA build of PyTorch")
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: PyTorch sees no Apple GPU; use --device cpu")
    if name == "mps" and world_size > 1:
        raise ValueError("--device mps takes one process: start without torchrun")
    return torch.device(name)


def move(tensor, device):
    """The tensor on the device. To CUDA the copy is queued: the program does not wait for it."""
    return tensor.to(device, non_blocking=torch.device(device).type == "cuda")


def double(tensor):
    """The tensor in float64, on the CPU if its device has no such numbers."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def keep_near(images, device, share=0.25):
    """Move a data set's images (N, ...) to the GPU if they take at most this share of its free
    memory. Else, and for other devices, they stay on the CPU."""
    if torch.device(device).type != "cuda":
        return images
    fits = images.nbytes < share * torch.cuda.mem_get_info(device)[0]
    return images.to(device) if fits else images


def pick(images, indices):
    """images[indices], for images on a GPU and a list of integers, without a wait."""
    return images[move(torch.tensor(indices).pin_memory(), images.device)]


def pinned(batch, device):
    """A batch on the CPU, in memory that a GPU reads from without a wait; on others, as it is."""
    if batch.is_cuda or torch.device(device).type != "cuda":
        return batch
    return batch.pin_memory()
