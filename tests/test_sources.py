"""sources.py: each kind of side gives the images it should, in one shape, or says what is wrong."""

import argparse
import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import denoiser as denoisers
import files
import metrics
import runtime
import sample
import sources

ALONE = runtime.Processes(0, 1, 0, torch.device("cpu"))


def pixels(n, size=8, channels=3, seed=0):
    shape = (n, size, size) + ((channels,) if channels > 1 else ())
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder_of(path, array):
    """A folder of one PNG per image, named so that their order is that of the array."""
    path.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(array):
        Image.fromarray(image).save(path / f"{i:03}.png")
    return path


def make_run(folder, name="run", channels=3, size=8, seed=0, **more):
    """runs/NAME/checkpoint.pt of a small untrained network whose images differ, EMA and raw
    likewise."""
    unet = dict(
        image_size=size,
        channels=8,
        channel_mult=(1,),
        res_blocks=1,
        patch=1,
        norm_groups=4,
        attention_resolutions=(),
        head_channels=None,
        resblock_updown=False,
        in_channels=channels,
        out_channels=channels,
        dropout=0.0,
    )
    settings = dict(
        schedule="cosine",
        T=1000,
        continuous=False,
        image_size=size,
        channels=channels,
        etsdm=False,
        etsdm_interval=100,
        etsdm_n=5,
        remap=None,
        prediction="v",
        unet=unet,
        data="shapes",
        seed=seed,
        **more,
    )
    net = denoisers.from_settings(settings).net
    weights = {}
    for kind, key in (("ema", seed), ("raw", seed + 100)):
        torch.manual_seed(key)
        weights[kind] = {k: v + 0.1 * torch.randn(v.shape) for k, v in net.state_dict().items()}
    path = folder / "runs" / name
    path.mkdir(parents=True)
    files.save_checkpoint(
        path / "checkpoint.pt",
        {
            **{name: kind() for name, kind in files.ENTRIES.items()},
            **dict(settings=settings, step=7, **weights),
        },
    )
    return path


def open_sides(*words, statistics=True):
    args = metrics.parse(["fid", *map(str, words)])
    return sources.open_all(args.images, args, ALONE, may_be_statistics=statistics)


def pictures(side, *indices):
    """uint8 (n, H, W, C), all of them or those asked for."""
    return side.batch(list(indices or range(side.n))).permute(0, 2, 3, 1).numpy()


def refused(*words):
    with pytest.raises((ValueError, OSError)) as info:
        open_sides(*words)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------ what is stored


def write(path, kind, array):
    if kind == "folder":
        return folder_of(path / "folder", array)
    if kind == "zip":
        folder_of(path / "unpacked", array)
        with zipfile.ZipFile(path / "x.zip", "w") as archive:
            for file in reversed(sorted((path / "unpacked").iterdir())):
                archive.write(file, file.name)
        return path / "x.zip"
    if kind in ("npz", "npz:key"):
        extra = {"other": array[:1]} if kind == "npz:key" else {}
        np.savez(path / "x.npz", images=array, **extra)
        return path / ("x.npz:images" if extra else "x.npz")
    if kind == "npy":
        np.save(path / "x.npy", array)
        return path / "x.npy"
    header = struct.pack(">4I", 0x803, *array.shape)
    (path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return path if kind == "idx folder" else path / "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "npz:key", "npy", "idx", "idx folder"])
def test_stored_images_keep_every_bit_and_their_own_size(tmp_path, kind):
    array = pixels(5, 12, channels=1 if "idx" in kind else 3)
    (side,) = open_sides(write(tmp_path, kind, array))
    assert side.n == 5 and side.shape == (3, 12, 12) and "5 images" in side.summary
    expected = array[..., None].repeat(3, 3) if array.ndim == 3 else array
    assert np.array_equal(pictures(side), expected)
    assert np.array_equal(pictures(side, 3, 0), expected[[3, 0]])
    names = [Path(path).name for path in side.paths]
    assert names == ([f"{i:03}.png" for i in range(5)] if kind in ("folder", "zip") else [])


def test_streamed_files_are_the_same(here, monkeypatch):
    """A set beyond the memory limit is read when asked for, by threads."""
    folder_of(here / "set", pixels(9))
    load = sources.data.load
    monkeypatch.setattr(sources.data, "load", lambda *a, **k: load(*a, **k, memory_limit=0))
    (side,) = open_sides("set")
    assert "streamed" in side.summary
    assert np.array_equal(pictures(side, 8, 2, 4), pixels(9)[[8, 2, 4]])


def test_shapes_are_endless_and_num_says_how_many(here):
    (side,) = open_sides("shapes", "--image-size", "16")
    assert side.n == 10_000 and side.shape == (3, 16, 16)
    (side,) = open_sides("shapes", "-n", "4", "--image-size", "16")
    assert side.n == 4
    drawn = [sources.data.draw_shape((0, i), 16) for i in range(4)]
    assert np.array_equal(pictures(side), np.stack(drawn))
    folder_of(here / "set", pixels(3))
    assert open_sides("set")[0].n == 3
    assert "sets on disk are used whole" in refused("set", "-n", "2")
    assert [s.n for s in open_sides("set", "shapes", "-n", "2", "--image-size", "8")] == [3, 2]


def test_sizes(here):
    folder_of(here / "small", pixels(2, 8))
    folder_of(here / "large", pixels(2, 12))
    folder_of(here / "mixed", [pixels(1, size)[0] for size in (8, 9, 10)])
    folder_of(here / "oblong", pixels(2, 8)[:, :6])
    message = refused("small", "large")
    assert "3x8x8 and 3x12x12" in message and "--image-size" in message
    message = refused("mixed")
    assert "mixed" in message and "8x8 9x9 10x10" in message and "--image-size" in message
    assert "8x6" in refused("oblong")
    assert "--image-size" in refused("oblong")
    for side in open_sides("small", "large", "--image-size", "10"):
        assert side.shape == (3, 10, 10)
    assert open_sides("mixed", "--image-size", "6", "--channels", "1")[0].shape == (1, 6, 6)
    assert "at least 1" in refused("small", "--image-size", "0")


def test_names_that_are_nothing(here):
    make_run(here, "mine")
    message = refused("myne")
    assert "myne is no file, folder, data set (shapes cifar10) or run" in message
    assert "mine" in message.split("there are:")[1]
    assert "nothing.zip" in refused("nothing.zip")
    (here / "empty").mkdir()
    assert "empty folder" in refused("empty")
    (here / "runs" / "half").mkdir()
    assert "half is no file" in refused("half"), "a run that never saved"


def test_bad_images_are_named_or_left_out(here):
    folder_of(here / "set", pixels(3))
    (here / "set" / "001.png").write_text("<html>")
    assert "001.png" in refused("set") and "--skip-bad-images" in refused("set")
    (side,) = open_sides("set", "--skip-bad-images")
    assert side.n == 2 and np.array_equal(pictures(side), pixels(3)[[0, 2]])


# ------------------------------------------------------------------ statistics


def test_statistics_of_every_make(here):
    mu, sigma = np.arange(3.0), np.eye(3)
    np.savez("theirs.npz", mu=mu, sigma=sigma)  # pytorch-fid and EDM alike
    np.savez("ours.npz", mu=mu, sigma=sigma, n=50, size=8, network="net", sha256="ab")
    np.savez("openai.npz", arr_0=pixels(4), mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma)
    np.savez("images.npz", pixels(4))
    theirs = sources.read_statistics("theirs.npz")
    assert theirs.keys() == {"mu", "sigma"} and np.array_equal(theirs["sigma"], sigma)
    ours = sources.read_statistics("ours.npz")
    assert (int(ours["n"]), str(ours["network"]), str(ours["sha256"])) == (50, "net", "ab")
    assert sources.read_statistics("openai.npz").keys() == {"mu", "sigma"}
    for other in ("images.npz", "nothing.npz", "images.png", "."):
        assert sources.read_statistics(other) is None
    assert isinstance(open_sides("openai.npz")[0], dict)
    (side,) = open_sides("openai.npz", statistics=False)
    assert np.array_equal(pictures(side), pixels(4))


def test_broken_npz_files_are_one_line(here):
    np.savez("a.npz", mu=np.zeros(50), sigma=np.eye(50))
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:9000])
    np.savez_compressed("b.npz", mu=np.random.default_rng(0).normal(size=50), sigma=np.eye(50))
    raw = bytearray(Path("b.npz").read_bytes())
    raw[150:190] = bytes(40)  # zlib has errors of its own
    Path("spoilt.npz").write_bytes(raw)
    np.save("c.npy", np.zeros(3))
    Path("c.npy").rename("array.npz")  # np.load gives an array, not an archive
    Path("page.npz").write_text("<html>not found</html>")
    Path("empty.npz").touch()
    np.savez("object.npz", mu=np.array([None]), sigma=np.eye(1))  # a pickle: never opened
    np.savez("words.npz", mu=np.array(["a"]), sigma=np.eye(1))
    np.savez("shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    for name in "cut spoilt array page empty object words shape".split():
        assert f"{name}.npz" in refused(f"{name}.npz")
    assert "web page" in refused("page.npz")


# ------------------------------------------------------------------ runs


def test_a_run_by_name_folder_and_checkpoint(here):
    path = make_run(here, "mine")
    for source in ("mine", "runs/mine", path / "checkpoint.pt"):
        (side,) = open_sides(source, "-n", "6", "--nfe", "2")
        assert side.n == 6 and side.shape == (3, 8, 8)
        assert "6 images by mine at step 7, ema weights, seed 0, ddim --nfe 2" in side.summary
    assert open_sides("mine")[0].n == 10_000
    words = "--sampler dpm-solver --order 2 --spacing logsnr --weights raw --seed 3 --clip on"
    (side,) = open_sides("mine", *words.split())
    for part in (
        "raw weights, seed 3, dpm-solver",
        "--order 2",
        "--spacing logsnr",
        "--clip on",
    ):
        assert part in side.summary


def test_a_folder_of_images_comes_before_a_run_of_its_name(here):
    make_run(here, "both")
    assert isinstance(open_sides("both", "-n", "1")[0], sources.Generated)
    folder_of(here / "both", pixels(3))
    (side,) = open_sides("both")
    assert isinstance(side, sources.Stored) and side.n == 3
    assert isinstance(open_sides("runs/both", "-n", "1")[0], sources.Generated)


@pytest.mark.parametrize(
    "words", ["--nfe 3", "--nfe 4 --sampler ddpm --weights raw", "--nfe 3 --eta 0.5 --clip off"]
)
def test_images_of_a_run_are_those_of_sample(here, words):
    make_run(here, "mine")
    sample.main(f"mine --num 5 --seed 11 --out out {words}".split())
    files = np.stack([np.asarray(Image.open(p)) for p in sorted((here / "out").glob("0*.png"))])
    (side,) = open_sides("mine", "-n", "5", "--seed", "11", *words.split())
    ours = side.batch([0, 1, 2, 3, 4])
    assert ours.dtype == torch.uint8 and ours.shape == (5, 3, 8, 8)
    assert files.std() > 20 and not np.array_equal(files[0], files[1])
    assert np.abs(pictures(side).astype(int) - files).max() <= 1
    # alone, or in another order, they are the same
    assert np.abs(pictures(side, 3, 1).astype(int) - files[[3, 1]]).max() <= 1


def test_sets_are_brought_to_the_shape_of_the_run(here):
    make_run(here, "gray", channels=1, size=8)
    make_run(here, "colour", channels=3, size=12)
    array = pixels(3, 16)
    folder_of(here / "set", array)
    generated, stored = open_sides("gray", "set", "-n", "2", "--nfe", "1")
    assert generated.shape == stored.shape == (1, 8, 8)
    assert stored.batch([1]).shape == generated.batch([1]).shape == (1, 1, 8, 8)
    by_pillow = Image.fromarray(array[1]).resize((8, 8), Image.Resampling.LANCZOS)
    by_pillow = np.asarray(by_pillow.convert("L")).astype(int)
    assert np.abs(pictures(stored, 1)[0, :, :, 0].astype(int) - by_pillow).max() <= 2
    assert [side.shape for side in open_sides("set", "colour")] == [(3, 12, 12)] * 2
    assert "1x8x8 and 3x12x12" in refused("gray", "colour")
    for flag, value in (("--image-size", "16"), ("--channels", "3")):
        message = refused("gray", "set", flag, value)
        assert message == f"{flag}: leave it out, the run's images are 1x8x8"
    open_sides("gray", "set", "--image-size", "8", "--channels", "1")  # says what is so anyway


def test_own_data(here):
    make_run(here, "mine")
    folder_of(here / "set", pixels(2))
    np.savez("s.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert sources.own_data("mine") == "shapes"
    for other in ("set", "s.npz", "shapes"):
        with pytest.raises(ValueError, match="is no run: say what to compare it with"):
            sources.own_data(other)


def test_files_that_are_no_runs(here):
    torch.save({"a": torch.zeros(2)}, "x.pt")
    assert "x.pt is not a checkpoint of train.py" in refused("x.pt")
    Path("page.pt").write_text("<html>")
    assert "web page" in refused("page.pt")
    Path("x.txt").write_text("hello")
    assert "x.txt is no data set of a known kind" in refused("x.txt")


def test_flags_about_sampling_need_a_run(here):
    folder_of(here / "set", pixels(3))
    for words in (["--nfe", "7"], ["--seed", "1"], ["--weights", "raw"], ["--sampler", "ddpm"]):
        assert f"{words[0]} is for sampling a run" in refused("set", *words)


def test_runs_are_measured_on_the_same_images(here, capsys):
    folder_of(here / "set", pixels(7))
    make_run(here, "one")
    args = argparse.Namespace(runs=["one", "one"], weights="ema", data="set", num=4, seed=5)
    (first, _, x0), (second, _, again) = sources.opened(args, torch.device("cpu"))
    assert (first, second) == ("one", "one'") and "one: 4 of 7 images" in capsys.readouterr().out
    assert x0.dtype == torch.float32 and x0.shape == (4, 3, 8, 8) and torch.equal(x0, again)
    args.num = 100
    ((_, _, every), _) = sources.opened(args, torch.device("cpu"))
    assert len(every) == 7 and torch.equal(every[:4], x0)
    rows = torch.from_numpy(pixels(7)).permute(0, 3, 1, 2).float() / 127.5 - 1
    found = [next(i for i in range(7) if torch.allclose(row, rows[i])) for row in x0]
    assert len(set(found)) == 4


def test_data_that_are_not_there(here):
    make_run(here, "one")
    args = argparse.Namespace(runs=["one"], weights="ema", data="nowhere", num=4, seed=5)
    with pytest.raises(FileNotFoundError, match="^--data: no such file or folder: nowhere"):
        next(sources.opened(args, torch.device("cpu")))


def test_a_run_may_be_given_a_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.labelled("E-TSDM=a/run") == ("E-TSDM", "a/run")
    assert sources.labelled("run") == (None, "run")
    assert sources.labelled("=run") == (None, "=run")
    assert sources.labelled(None) == (None, None)
    (tmp_path / "lr=1").mkdir()
    assert sources.labelled("lr=1") == (None, "lr=1")  # a folder that is called so
    assert sources.labelled("a=lr=1") == ("a", "lr=1")
