r"""Make pictures with a trained run.

    python sample.py                                     # newest run -> a grid and numbered PNGs
    python sample.py NAME --sampler dpm-solver --nfe 20 --spacing logsnr
    torchrun --nproc_per_node 8 sample.py NAME -n 50000 --npz
    python sample.py NAME --low-res SMALL_IMAGES         # a super-resolution run enlarges them
    python sample.py --guided-diffusion lsun_bedroom.pt --preset adm256

Everything about the model (size, schedule, prediction, time condition) comes from the checkpoint.
Image i is a function of (seed, i): its first noise and its fresh noise come from one generator. It
is the same picture (within one grey level) whatever the batch size and the number of processes, and
seeds share no image. What a stopped call has left is not made again: the same command goes on.

What this file does not do: the samplers' formulas (samplers.py), or scoring images.

C, H, W as the run was trained; pixels are written as uint8 = round((x + 1) 127.5).
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import contextlib
import hashlib
import json
import re
import shlex
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import covariance
import data
import denoiser as denoisers
import files
import samplers
import sampling
import unet


def parse(argv=None):
    """The command line; ValueError for flags that the chosen sampler would ignore."""
    parser = argparse.ArgumentParser(
        prog="sample.py", usage="python sample.py [RUN] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Make pictures with a trained run: a grid, and numbered PNGs or one .npz.",
        epilog="""examples
  python sample.py
      64 pictures from the newest run under runs/, by DDIM in 50 network calls
  python sample.py shapes-tiny-sa2 --sampler ddpm --nfe 200
      DDPM's ancestral sampling, 200 calls
  python sample.py shapes-tiny-sa2 --sampler dpm-solver --order 3 --nfe 20 --spacing logsnr
      the fast solver of E-TSDM's table 3
  python sample.py cifar10-cifar10-sa2 --precision bf16 --compile -n 10000
      fast: the compilation takes a minute or two, once; pictures move by part of a grey level
  torchrun --nproc_per_node 8 sample.py cifar10-cifar10-sa2 -n 50000 --npz --batch-size 500
      the images of an FID, on 8 GPUs
  python covariance.py shapes-tiny-sa2 && python sample.py shapes-tiny-sa2 --variance analytic
      Analytic-DPM: the best width of each reverse step; npr, sn: of a run trained with --head
  python sample.py photos-tiny-sr4 --low-res small/ --out large
      enlarge images 4 times; large-bicubic/ holds what a plain enlargement makes of them
  python sample.py --guided-diffusion lsun_bedroom.pt --preset adm256 --sampler ddpm --nfe 250
      weights that OpenAI released""")
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a name under runs/, a run folder, or a checkpoint "
        "(default: the newest run)")
    sampling.add_flags(parser)
    # -n too, since torchrun, given --num, takes it for the beginning of its own --numa-binding
    add("-n", "--num", type=int, help="number of images; under torchrun write -n (default: 64; all "
        "of --low-res)")
    add("--batch-size", type=int, default=64, help="images at a time, per process (default: 64)")
    add("--seed", type=int, default=0, help="image i is a function of (seed, i): seeds share no "
        "image (default: 0)")
    add("--out", type=Path, help="folder to write to (default: generated/SAMPLER-NFE in the run)")
    add("--npz", action="store_true", help="write images.npz, arr_0 (N, H, W, C), instead of PNGs: "
        "what ADM's evaluator reads")
    add("--low-res", metavar="IMAGES", help="super-resolution: what to enlarge, a file, folder, "
        "zip or array: images of the run's small size, or originals of its full size or more, "
        "which are cropped and shrunk first")
    add("--guided-diffusion", type=Path, metavar="FILE", help="weights of OpenAI's program, "
        "instead of a run")
    add("--preset", choices=list(unet.PRESETS), help="... and their size")
    add("--schedule", choices=("linear", "cosine"), help="... and noise schedule (default: linear)")
    args = parser.parse_args(argv)
    sampling.check_flags(args)
    if bool(args.guided_diffusion) != bool(args.preset) or args.run and args.guided_diffusion:
        raise ValueError("--guided-diffusion FILE goes with --preset, and without a run")
    if args.schedule and not args.guided_diffusion:
        raise ValueError("--schedule is for --guided-diffusion: a run knows its own")
    if args.low_res and (args.npz or args.guided_diffusion):
        raise ValueError("--low-res takes a run of train.py --task sr, and writes PNGs, to be "
                         "compared with: leave out --npz and --guided-diffusion")
    if args.guided_diffusion and (args.weights == "raw" or args.variance in covariance.KINDS):
        raise ValueError("--guided-diffusion has one set of weights, no Γ and no second head: "
                         "leave out --weights and --variance")
    sampling.check_counts(args, num=1, batch_size=1)
    samplers.check_seed(args.seed, args.num)
    if args.run == "":
        raise ValueError("RUN is empty: leave it out for the newest run")
    return args


def grid_path(out):
    """The grid lies beside the folder: whatever is in that is one image of the set."""
    return out.with_name(out.name + ".png")


def digest(*tensors):
    """A short hash of numbers."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()[:16]


def how_made(args, denoiser, arguments, known):
    """All that the pictures depend on, as plain values: the settings.json beside them."""
    made = dict(source=denoiser.source, step=denoiser.step, weights=denoiser.weights,
                digest=denoiser.digest, seed=args.seed, **{**arguments, "variance": args.variance})
    if args.seed:  # earlier versions had seed + i: those pictures are others
        made["generator_seeds"] = "seed * 2^20 + i"
    if args.precision != "fp32":
        made["precision"] = args.precision
    if args.variance == "analytic":  # estimated anew, it is another
        made["gamma"] = digest(covariance.read_gamma(denoiser))
    if known:
        made["low_res"] = digest(*(known.set[i] for i in range(min(args.num, 4096))))
    return json.loads(json.dumps(made, default=torch.Tensor.tolist))  # as it will be read back


def what(made):
    """A settings.json without the path of the weights: their digest says what they are, and a run
    that was moved draws the same pictures."""
    source = made.get("source") if isinstance(made, dict) else None
    return {**made, "source": source[1:] if isinstance(source, list) else None} if source else made


def refuse_foreign(out, known):
    """ValueError where files would be mixed with, or put in place of, what is not ours."""
    strange = out if out.exists() and any(out.iterdir()) else grid_path(out)
    if not (out / "settings.json").exists() and strange.exists():
        raise ValueError(f"{out} would mix with what sample.py did not write, {strange}: "
                         "give an empty or new folder with --out")
    for folder in beside(out, known):  # what is in them is replaced: it must be ours
        if folder.exists() and any(folder.iterdir()) and not (folder / "settings.json").exists():
            raise ValueError(f"{folder} holds something else, and what the pictures are compared "
                             "with goes there: give another --out")


def prepare_folder(args, process, denoiser, arguments, known):
    """The output folder. Pictures of ours that were made differently are removed, others never."""
    tag = f"{args.sampler}-{args.nfe}" + (f"-{args.variance}" if args.variance else "")
    out = (args.out or denoiser.folder / "generated" / tag).resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if not out.exists():
        refuse_foreign(out, known)  # now, so that a refusal leaves no folder behind
        out.mkdir(parents=True)
    process.hold(out)  # what is in it from here on does not change but by us
    refuse_foreign(out, known)
    files.remove_leftovers(out)
    # If how pictures are made has changed, a longer run or another seed, the old ones would mix
    # with the new: a set for an FID must be of one kind.
    note, made = out / "settings.json", how_made(args, denoiser, arguments, known)
    try:
        same = note.exists() and what(json.loads(note.read_text(encoding="utf-8"))) == what(made)
    except ValueError:
        same = False
    if not same:
        for old in out.iterdir():
            if re.fullmatch(r"\d{6,}\.png|images\.npz|part-\d{6,}\.npz", old.name):
                old.unlink()
    files.write_text(note, json.dumps(made, indent=1) + "\n")
    return out


def open_denoiser(args):
    """The run, or the imported weights, and the words to announce it by."""
    if args.guided_diffusion:
        denoiser = denoisers.load_guided_diffusion(args.guided_diffusion, args.preset,
                                                   args.schedule or "linear")
        file = args.guided_diffusion.resolve()
        denoiser.source = [str(file), args.preset, args.schedule or "linear"]
        denoiser.digest = digest(*denoiser.net.state_dict().values())
        return denoiser, f"weights: {file}, as {args.preset}"
    path = files.find_checkpoint(args.run).resolve()
    denoiser, name = denoisers.load_run(path, args.weights), path.parent.name
    # Of the same name and step, a run made anew has other weights.
    denoiser.source, denoiser.digest = str(path), digest(*denoiser.net.state_dict().values())
    enlarges = denoiser.settings.get("task") == "sr"
    if enlarges and not args.low_res:
        raise ValueError(f"{name} was trained to enlarge images: say which, with --low-res IMAGES")
    if args.low_res and not enlarges:
        raise ValueError(f"{name} was not trained to enlarge images: --low-res takes a run of "
                         "train.py --task sr")
    return denoiser, f"run: {path.parent}, step {denoiser.step}, {args.weights} weights"


def sizes_of(images, source):
    """{(width, height)} of a loaded data set as it is on the disk."""
    if len(images) >= data.ENDLESS:  # drawn at any size
        return {tuple(images[0].shape[:0:-1])}
    if not (paths := getattr(images, "paths", [])):  # an array has one size, which its summary has
        return {tuple(map(int, re.search(r"(\d+)x(\d+) -> ", images.summary).groups()))}
    with contextlib.ExitStack() as stack:
        find = open
        if zipfile.is_zipfile(source):
            find = stack.enter_context(zipfile.ZipFile(source)).open
        sizes = set()
        for path in paths:  # the header alone is read
            with find(path, *["rb"] * (find is open)) as file, Image.open(
                    file, formats=data.FORMATS) as image:
                sizes.add(image.size)
        return sizes


class Known:
    """The images of --low-res, as a super-resolution run is given them.

    Those of its small size are taken as they are. Those of its full size or more are originals:
    they are cropped to the full size and shrunk as in training, and the result can be compared with
    them. ValueError, OSError: anything else.
    """

    def __init__(self, source, denoiser):
        s, self.space = denoiser.settings, denoiser.space
        full, small, self.notes = s["image_size"], s["image_size"] // s["factor"], []
        try:
            self.set = data.load(source, None, s["channels"])
        except (ValueError, FileNotFoundError):  # not of one size, or bad: the next load names it
            self.set = None
        self.shrunk = self.set is None or self.set[0].shape[-1] != small
        if self.shrunk:
            try:
                self.set = data.load(source, full, s["channels"])
            except (ValueError, FileNotFoundError) as error:  # its advice is train.py's
                words = str(error).split("; --skip-bad-images")[0]
                raise ValueError(f"--low-res: {words}") from error
            sizes = sizes_of(self.set, source)
            least = min(sizes, key=min)
            if min(least) < full:
                raise ValueError("--low-res {} has images of {}x{}: give {}x{}, this run's small "
                                 "size, or originals of at least {}x{}".format(
                                     source, *least, small, small, full, full))
            if sizes != {(full, full)}:
                self.notes = [f"images of other sizes than {full}x{full} are resized and cropped "
                              "to it: the originals to compare with are the crops"]
        self.summary = self.set.summary + f", shrunk to {small}x{small}" * self.shrunk

    def given(self, indices, device="cpu"):
        """The small images, enlarged (b, C, H, W): what the network sees beside x_t."""
        images = data.to_float(torch.stack([self.set[i] for i in indices]).to(device))
        return self.space.given(images) if self.shrunk else self.space.enlarge(images)

    def columns(self, indices):
        """What the results are to be seen beside, each uint8 (b, C, H, W): bicubic and, where it
        is known, original."""
        originals = [torch.stack([self.set[i] for i in indices])] if self.shrunk else []
        return [data.to_uint8(self.given(indices)), *originals]


def main(argv=None):
    args = parse(argv)
    with runtime.setup(tf32=False, deterministic=args.deterministic) as process:
        runtime.keep_memory()
        # tf32=False: a picture must not depend on how its batch was rounded
        denoiser, words = process.first_then_all(lambda: open_denoiser(args))
        denoiser.net = runtime.for_inference(denoiser.net, process.device, args.precision,
                                             args.compile)
        process.say(words)
        arguments = sampling.from_flags(args, denoiser)
        for note in sampling.notes(args, denoiser):
            process.say(f"note: {note}")
        T, start = denoiser.schedule.T, arguments["t_start"]
        if start < T:
            process.say(f"eps-prediction knows no x_0 at t = {T}, where alpha_bar = 0: starting at "
                        f"t = {start}")
        known = None
        if args.low_res:
            known = process.first_then_all(lambda: Known(args.low_res, denoiser))
            n = len(known.set)
            args.num = min(args.num or (64 if n >= data.ENDLESS else n), n)
            process.say(f"to be enlarged: {args.num} of {known.summary}")
            for note in known.notes:
                process.say(f"note: {note}")
        args.num = args.num or 64
        samplers.check_seed(args.seed, args.num)  # all of --low-res may be more than a seed has
        out = process.first_does(prepare_folder, args, process, denoiser, arguments, known)
        generate(args, process, denoiser, arguments, out, known)
        process.barrier()
        finish(args, process, out, known)


def generate(args, process, denoiser, arguments, out, known):
    """Write what is missing of the images: PNGs, or parts of the .npz, a batch in each."""
    # Who makes image i does not matter to it: its noise has a generator of its own. So the list of
    # what is missing is simply dealt out, like cards. It must be one list: a process that looked
    # for itself would miss what another has finished meanwhile.
    space = denoiser.space
    there = process.first_does(on_disk, args, out)
    todo = [i for i in range(args.num) if i not in there]
    if len(todo) < args.num:
        process.say(f"{args.num - len(todo)} of {args.num} images are there already")
    todo = todo[process.rank::process.world]
    bar = tqdm(total=len(todo), unit="image", disable=not process.first, dynamic_ncols=True)
    for start in range(0, len(todo), args.batch_size):
        batch = todo[start:start + args.batch_size]
        given = known and known.given(batch, process.device)
        seeds = samplers.image_seeds(args.seed, batch)
        x = samplers.from_seeds(denoiser.but(given=given), seeds, space.shape, process.device,
                                **arguments)
        pixels = data.to_uint8(space.decode(x)).permute(0, 2, 3, 1).cpu().numpy()  # (b, H, W, C)
        if args.npz:
            write_npz(out / f"part-{batch[0]:06d}.npz", arr_0=pixels, indices=batch)
        else:
            for i, image in zip(batch, pixels, strict=True):
                write_png(png_path(out, i), Image.fromarray(image.squeeze()))
        bar.update(len(batch))
    bar.close()


def png_path(out, i):
    """Where image i is."""
    return out / f"{i:06d}.png"


def write_png(path, image):
    """A PIL image -> a file, whole or not at all."""
    with files.atomic_write(path, sweep=False) as temporary:  # prepare_folder has swept, once
        image.save(temporary, format="png")


def write_npz(path, **arrays):
    """Arrays -> an .npz file, whole or not at all."""
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **arrays)


def read_parts(out):
    """Yields (indices, images (n, H, W, C)) of images.npz, if a call has finished, and of what
    others have left."""
    for path in [out / "images.npz", *sorted(out.glob("part-*.npz"))]:
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as archive:
                    # earlier versions called it images
                    images = archive["arr_0" if "arr_0" in archive else "images"]
                    indices = archive["indices"] if "indices" in archive else range(len(images))
            except Exception as error:  # of zip, zlib, NumPy
                raise ValueError(f"{path} is damaged: delete it, and the same command makes its "
                                 "images again") from error
            yield indices, images


def on_disk(args, out):
    """The set of those i, of the images asked for, that are made already."""
    if args.npz:
        return {int(i) for indices, _ in read_parts(out) for i in indices}
    return {i for i in range(args.num) if png_path(out, i).exists()}


def missing(out, gone, num):
    """The refusal of a folder that lacks some of the images."""
    return (f"{out} lacks {gone} of {num} images: do all machines share that folder? The same "
            "command makes what is missing")


def put_together(args, out):
    """The parts -> images.npz; the array, uint8 (num, H, W, C). A longer one stays as long."""
    found = {}
    for indices, images in read_parts(out):
        found.update(zip(map(int, indices), images, strict=True))
    whole = next(i for i in range(len(found) + 1) if i not in found)  # images 0 .. whole - 1
    if whole < args.num:
        raise ValueError(missing(out, args.num - len(found), args.num))
    pixels = np.stack([found[i] for i in range(whole)])
    write_npz(out / "images.npz", arr_0=pixels)  # the name that ADM's evaluator knows
    for part in out.glob("part-*.npz"):
        part.unlink()
    return pixels


def beside(out, known):
    """The folders of what enlarged images are to be compared with."""
    names = ("bicubic", "original") if known and known.shrunk else ("bicubic",) * bool(known)
    return [out.with_name(f"{out.name}-{name}") for name in names]


def write_beside(out, known, num):
    """Fill them, pair by pair."""
    for folder in beside(out, known):
        folder.mkdir(exist_ok=True)
        files.remove_leftovers(folder)
        files.write_text(folder / "settings.json",
                         (out / "settings.json").read_text(encoding="utf-8"))
        for old in folder.glob("[0-9]*.png"):  # partners of pictures that are gone
            if not (out / old.name).exists():
                old.unlink()
    for i in range(num):
        for folder, images in zip(beside(out, known), known.columns([i]), strict=True):
            write_png(png_path(folder, i), data.grid(images, 1))


def finish(args, process, out, known):
    """Rank 0 puts the .npz together or reads the PNGs back, makes the grid, and says where all
    is."""
    if not process.first:
        return
    # The grid is made of what is on the disk, whoever made it: it shows what the user has.
    first = min(args.num, 64)
    if args.npz:
        pixels = put_together(args, out)
    elif gone := args.num - len(on_disk(args, out)):
        raise ValueError(missing(out, gone, args.num))
    else:
        pixels = np.stack([np.asarray(Image.open(png_path(out, i))) for i in range(first)])
        pixels = pixels.reshape(*pixels.shape[:3], -1)
    grid = shown = torch.from_numpy(pixels[:first]).permute(0, 3, 1, 2)
    columns = max(1, round(first**0.5))
    if known:  # bicubic, result, original, if there is one
        bicubic, *originals = known.columns(range(first))
        parts = [bicubic, grid, *originals]
        shown, columns = torch.stack(parts, dim=1).flatten(0, 1), len(parts) * -(-columns // 2)
    with files.atomic_write(grid_path(out)) as temporary:
        data.grid(shown, columns).save(temporary, format="png")
    # A colour tint of the whole set is the commonest silent fault of a sampler.
    means = ", ".join(f"{m:.1f}" for m in grid.double().mean((0, 2, 3)))
    more = (len(pixels) if args.npz else len(list(out.glob("[0-9]*.png")))) - args.num
    if more > 0:
        print(f"note: an earlier call made {more} more like these, which are there too")
    print(f"{args.num} images; mean of each channel: {means} of 255")
    print(f"images: {(out / 'images.npz' if args.npz else out).resolve()}")
    print(f"grid: {grid_path(out).resolve()}")
    if known:
        write_beside(out, known, args.num)
        folders = beside(out, known)
        print("for comparison: " + ", ".join(map(str, folders)))
        if known.shrunk:
            command = ["python", "metrics.py", "psnr", str(out), str(folders[-1])]
            print(f"next: {shlex.join(command)}")


if __name__ == "__main__":
    runtime.run_program(main)
