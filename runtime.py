r"""What a training program needs that is not diffusion: processes, seeds, precision, EMA,
what to do when one of several is lost, and how programs end.

    torchrun --nproc_per_node 4 train.py     sets RANK, WORLD_SIZE, LOCAL_RANK; setup() reads them
    python train.py                          no such variables: one process, and the same code

Import this module before torch: it sets how OpenMP waits, which is read only once.

When one of several processes dies, the others find out: at once where the system closes its
connections, else after TIMEOUT. They say so in one line, and torchrun ends or restarts them all.

What this file does not do: anything about images, networks or noise.
"""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

# OpenMP threads spin while they wait; with two busy processes on few cores that costs 2 to 5
# times. A short spin keeps the speed when alone and the peace when not.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from tqdm import tqdm  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

TIMEOUT = timedelta(minutes=10)  # a process that the others wait longer for counts as dead
PATIENCE = timedelta(days=7)  # ... except where work takes as long as it takes: reading a data set


# ------------------------------------------------------------------ processes

class Processes:
    """Who am I among the processes: rank, world (how many), local_rank, device.

    with setup() as process: leaves the group on every path out."""

    def __init__(self, rank, world, local_rank, device, patient=None):
        self.rank, self.world, self.local_rank, self.device = rank, world, local_rank, device
        self.patient, self.held = patient, []  # the group for long waits; folders kept for us

    def __enter__(self):
        return self

    def __exit__(self, *exc):  # on errors too, or the other ranks would wait
        for folder in self.held:
            os.close(folder)
        self.held = []
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self):
        return self.rank == 0

    def say(self, *words):
        """Print from rank 0 alone."""
        if self.first:
            print(*words, flush=True)

    def sum(self, *values):
        """Sum of each number over all processes. CPU tensors over gloo: it never waits for a GPU's
        queue."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tuple(tensor.tolist())

    def total(self, tensor):
        """Sum of a CPU tensor over all processes."""
        if self.world > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait for all, however long that takes. A signal is heard meanwhile: Python acts on it
        only between two of its own lines, not inside a wait of gloo."""
        if self.world > 1:
            waiting = dist.barrier(self.patient, async_op=True)
            while not waiting.is_completed():
                time.sleep(0.01)
            waiting.wait()  # raises what went wrong

    def share(self, value):
        """Rank 0's value (any plain object), on every process, however long rank 0 takes."""
        if self.world == 1:
            return value
        self.barrier()
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.patient, device=torch.device("cpu"))
        return box[0]

    def hold(self, folder, seconds=2):
        """Nobody else writes to this folder until we end: rank 0 locks it, and the system unlocks
        it when we die, however that comes. ValueError: somebody else holds it.

        It waits a little, for one that is just ending.
        """
        if not self.first or fcntl is None:
            return
        handle, until = os.open(folder, os.O_RDONLY), time.time() + seconds
        self.held.append(handle)
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.time() > until:
                    raise ValueError(f"another process is writing to {folder}: stop it, or let it "
                                     "finish") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                return

    def first_does(self, work, *inputs):
        """work(*inputs) on rank 0 alone: what it returns, on every process. An error there is
        raised on rank 0, which says it; the others end without a word."""
        value, error = None, None
        if self.first:
            try:
                value = work(*inputs)
            except (ValueError, OSError) as e:
                error = e
        value, failed = self.share((value, error is not None))
        if error:
            raise error
        if failed:
            sys.exit(2)
        return value

    def first_then_all(self, work):
        """work() on every process, on rank 0 before the others: a download happens once, and an
        error is said once. Its result need not travel: every process has its own."""
        mine = []

        def keep():
            mine.append(work())

        self.first_does(keep)
        if not self.first:
            keep()
        self.barrier()  # here, with patience: the next thing we do together may have none
        return mine[0]

    def gather(self, value):
        """Every process's value (any plain object) as a list, on rank 0; None elsewhere."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values, dst=0)
        return values


def setup(tf32=True, deterministic=False, timeout=PATIENCE):
    """Join the other processes if torchrun started us, choose this process's device -> Processes.

    tf32           let GPUs round float32 products to 10 bits, for speed; no where digits count
    deterministic  only algorithms that give the same bits again; a RuntimeError where there is none
    timeout        how long to wait for the others; TIMEOUT, where all work in step
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
    names = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    words = {name: os.environ.get(name, usual) for name, usual in names.items()}
    if not all(map(str.isdecimal, words.values())) or int(words["RANK"]) >= int(
            words["WORLD_SIZE"]):
        raise ValueError(" ".join(f"{k}={v}" for k, v in words.items()) + " in the environment do "
                         "not fit together: start with torchrun, or unset them")
    rank, world, local_rank = map(int, words.values())
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        round_products(tf32)
    if world > 1:  # CPU tensors (flags, counts) go over gloo; gradients over NCCL where on GPUs
        # Addresses that processes leave for each other in torchrun's store outlive a restart
        # (PyTorch 2.13, issue 135712), and who reads an old one is refused: a shelf per attempt.
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                                timeout=timeout, store=store, rank=rank, world_size=world)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
    return Processes(rank, world, local_rank, device, patient)


def round_products(tf32):
    """Let GPUs round float32 products and convolutions to 10 bits (TF32), or not."""
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    # The old switch sets the new ones (cudnn.conv.fp32_precision) too. The new ones leave the old
    # one as it was, and then torch.export, which reads it, raises (PyTorch issue 179445).
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = tf32


def nothing():
    """A `with` block that does nothing."""
    return contextlib.nullcontext()


def keep_memory():
    """Ask glibc to keep freed memory rather than return it: large tensors otherwise get fresh
    pages at every step."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: nothing to ask
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def choose_precision(name, device):
    """auto | fp32 | bf16 -> the dtype that autocast computes in, or None for plain float32."""
    if name == "auto":
        name = "bf16" if has_bf16_units(device) else "fp32"
    if name == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(
            including_emulation=False):
        raise ValueError("--precision bf16: this GPU has no units for it, use --precision fp32")
    return torch.bfloat16 if name == "bf16" else None


def has_bf16_units(device):
    """True where bf16 is faster than float32: GPUs since Ampere, CPUs with AMX or AVX-512 BF16
    (Linux says so)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        words = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = words.split("flags", 1)[-1].split("\n", 1)[0].split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def for_inference(net, device, precision="fp32", compiled=False):
    """A network that is trained no more, made fast -> a function of the same arguments.

    The module itself is changed: moved to the device, in eval mode, and with bf16 its convolutions
    hold bf16 weights. Autocast gives the same numbers, but casts frozen weights at every call: it
    keeps the copies of trained ones alone. ValueError: a GPU without bf16.
    """
    dtype = choose_precision(precision, device)
    net.to(device).eval().requires_grad_(False)
    for layer in net.modules():
        if dtype is not None and isinstance(layer, torch.nn.Conv2d):
            layer.to(dtype)
    if compiled:
        # freezing: weights become constants, laid out once as the CPU's convolutions want them
        net = torch.compile(net, options={"freezing": device.type == "cpu"})

    @torch.no_grad()
    def call(*inputs):
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            return net(*inputs)

    return call


def generator(*key, device="cpu"):
    """A random generator that is a function of integers, e.g. (seed, step): nothing to save,
    nothing to restore.

    The words are mixed (splitmix64), so that (0, 1) and (1, 0) and neighbouring seeds give
    unrelated streams.
    """
    return torch.Generator(device).manual_seed(mix(*key))


def mix(*key):
    """Integers -> one 63-bit integer, well mixed (splitmix64's finaliser after each)."""
    z, mask = 0, 2**64 - 1
    for word in key:
        z = (z + word + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1


# ------------------------------------------------------------------ EMA

@torch.no_grad()
def update_ema(ema, net, decay, updates):
    r"""ema ← d ema + (1 − d) net,  d = min(decay, (1 + n)/(10 + n)) after n updates.

    Without the warm-up an average with decay 0.9999 is still its random start after a thousand
    steps ("EMA gives noise"). net must be the bare module: inside DDP or compile the names differ
    and nothing would match.
    """
    d = min(decay, (1 + updates) / (10 + updates))
    mine, theirs = ema.state_dict(), net.state_dict()
    floats = [k for k, v in mine.items() if v.is_floating_point()]
    torch._foreach_lerp_([mine[k] for k in floats], [theirs[k] for k in floats], 1 - d)


# ------------------------------------------------------------------ programs

class Interrupted(KeyboardInterrupt):
    """A signal came when there was no step to finish."""


class Stop:
    """Inside `with Stop() as stop`, Ctrl-C, SIGTERM and SIGHUP raise Interrupted; once the program
    has set stop.gently, they only set stop.asked to their name, so that a loop can finish its step
    and save. A second Ctrl-C means now."""

    SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def __enter__(self):
        self.asked, self.gently = "", False
        # One that is ignored stays so: nohup relies on it.
        caught = [n for n in self.SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.ask) for number in caught}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is Interrupted:
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped by {self.asked} before the first step. Run the same command to go "
                      "on.", flush=True)
            return True

    def ask(self, number, frame):
        if self.asked == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if not self.gently:
            raise Interrupted(self.asked)


class Forgiving:
    """A text stream that loses words rather than a run: its file is on a full disk, its terminal is
    gone, its pipe is closed."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, words):
        with contextlib.suppress(OSError):
            self.stream.write(words)
        return len(words)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def forgive_output():
    """From here on, what cannot be printed is lost, and nothing else. For programs whose output is
    in files of their own."""
    sys.stdout, sys.stderr = Forgiving(sys.stdout), Forgiving(sys.stderr)


def run_program(main):
    """Run main(); a bad argument or file ends in one line and exit status 2. TRACEBACK=1 shows
    where it came from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal cannot show ends no program
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        complain(error)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
                "can't allocate memory" in str(error)):
            complain(f"out of memory ({(str(error).splitlines() or [''])[0]}): try a smaller "
                     "--batch-size or, in train.py, --microbatch or --recompute")
            sys.exit(2)
        if not_compiled(error) and not os.environ.get("TRACEBACK"):
            complain(f"--compile: torch.compile failed ({str(error).strip().splitlines()[0]}): "
                     "install a C++ compiler, which CXX may name, or leave out --compile")
            sys.exit(2)
        if os.environ.get("TRACEBACK") or not lost(error):
            raise
        # The one that failed may want to speak first. torchrun, meanwhile, asks us to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1)
        folder = attempt_folder()
        if not (folder and list(folder.glob("said-*"))):
            complain("another process of this job has ended, or did not answer for "
                     f"{TIMEOUT.total_seconds() / 60:g} minutes. The same command goes on from the "
                     "last checkpoint")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def not_compiled(error):
    """Is this RuntimeError one of torch.compile?"""
    dynamo = sys.modules.get("torch._dynamo.exc")  # takes long to import, and may not be needed
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


def lost(error):
    """Does this RuntimeError say that another process did not answer?"""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return several and (isinstance(error, dist.DistError) or bool(re.search(
        "gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out", str(error))))


def attempt_folder():
    """A folder that the processes of this machine share, which torchrun makes anew whenever it
    starts them; None without torchrun."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/RANK/error.json
    return Path(report).parents[1] if report else None


def complain(error):
    """One line on stderr, and in torchrun's own report; once, where several processes of one
    machine find the same."""
    words = f"{Path(sys.argv[0]).name}: error: " + " ".join(str(error).splitlines())
    words = words.encode(errors="backslashreplace").decode()  # of file names that are not text
    if folder := attempt_folder():
        mark = hashlib.sha256(words.encode()).hexdigest()[:16]
        try:
            (folder / f"said-{mark}").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
        stamp = dict(timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
                json.dumps(dict(message=dict(message=words, extraInfo=stamp))), encoding="utf-8")
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the error gets a line of its own
    print(words, file=sys.stderr, flush=True)
