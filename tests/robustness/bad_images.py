r"""A corpus of bad and odd image files, and what must become of each.

    PYTHONPATH=tests python tests/robustness/bad_images.py FOLDER     # writes it, to be looked at

`make(folder)` gives {name relative to the folder: Expect}. A name with a suffix of image_files.py
is "used" (with these pixels, at side 16), "named" in an error, or "either" (a cut may leave all
the pixels); others are "left out" and counted, or "hidden" and not counted.

Not here: zips and arrays (test_corpus.py builds those); the sweep of TIFF, BMP and PNG in
test_images.py, and what each cut leaves (test_cut_anywhere).
"""

import os
import struct
import sys
from collections import namedtuple

import numpy as np
from image_writers import PICTURE, UPRIGHT, X, Y, chunk, encode, png, rows, tiff
from PIL import Image, ImageCms

Expect = namedtuple("Expect", "what pixels tolerance word", defaults=(None, 0, ""))
SIDE = 16
GRAY = (X * 16 + Y).astype(np.uint8)
NAMED = Expect("named")


def colour(gray):
    return np.repeat(np.asarray(gray, np.uint8)[..., None], 3, axis=2)


def full(*rgb):
    return np.full((SIDE, SIDE, 3), rgb, np.uint8)


def gray_tiff(levels, kind=1, white=1, bits=None):
    """kind: 1 unsigned, 2 signed, 3 float; white: 0 if zero is white."""
    return tiff(levels[..., None], white, bits=bits, more=[(339, 3, [kind])])


def bmp_rle(rle):
    palette = b"".join(bytes([k, k, k, 0]) for k in range(256))
    head = struct.pack("<IHHI", 54 + 1024 + len(rle), 0, 0, 54 + 1024)
    info = struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 8, 1, len(rle), 0, 0, 256, 0)
    return b"BM" + head + info + palette + rle


def cut(files):
    """Seven formats, whole and cut."""
    palette = Image.fromarray(PICTURE).quantize(64)
    whole = {
        "png": (encode(PICTURE), PICTURE),
        "jpg": (encode(PICTURE, "JPEG", quality=100, subsampling=0), PICTURE, 8),
        "gif": (encode(palette, "GIF"), np.asarray(palette.convert("RGB"))),
        "webp": (encode(PICTURE, "WEBP", lossless=True), PICTURE),
        "bmp": (encode(PICTURE, "BMP"), PICTURE),
        "tif": (encode(PICTURE, "TIFF"), PICTURE),
        "lzw.tiff": (encode(PICTURE, "TIFF", compression="tiff_lzw"), PICTURE),
    }
    for suffix, (content, *pixels) in whole.items():
        files[f"whole.{suffix}"] = content, Expect("used", *pixels)
        files[f"cut.{suffix}"] = content[: len(content) * 7 // 10], NAMED
    files["rle-cut.bmp"] = bmp_rle(b"\x10\x09\0\0" * 9 + b"\2\7"), NAMED
    files["rle-ends-early.bmp"] = bmp_rle(b"\x10\x09\0\0" * 9 + b"\0\1"), NAMED
    files["rle.bmp"] = bmp_rle(b"\x10\x09\0\0" * 16 + b"\0\1"), Expect("used", full(9, 9, 9))


def other_contents(files):
    """Contents that are not what the suffix says."""
    good = encode(PICTURE)
    files["a-png.jpg"] = good, Expect("used", PICTURE)
    files["UPPER.PNG"] = good, Expect("used", PICTURE)
    for name, content in {
        "text.png": b"hello\n",
        "page.jpg": b"<!DOCTYPE html>\n<html><body>404</body></html>\n",
        "eps.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "pdf.png": b"%PDF-1.4\n1 0 obj <<>> endobj\n%%EOF\n",
        "svg.png": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "zeros.png": bytes(1000),
        "pfm.pgm": b"Pf\n1 1\n-1.0\n\0\0\0\0",
    }.items():
        files[name] = content, NAMED
    files["empty.png"] = b"", Expect("named", word="empty file")


def broken_pngs(files):
    """PNGs that are whole, and yet lie."""
    good = encode(PICTURE, "PNG", compress_level=0)
    bomb = bytearray(good)
    bomb[16:33] = chunk(b"IHDR", struct.pack(">2I", 60000, 60000) + bomb[24:29])[8:]
    files["bomb.png"] = bytes(bomb), Expect("named", word="bomb")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # stored, not compressed: a pixel is a byte
    files["flipped-pixel.png"] = bytes(flipped), NAMED
    flipped = bytearray(good)
    flipped[29] ^= 1
    files["bad-crc-of-header.png"] = bytes(flipped), NAMED
    flipped = bytearray(good)
    flipped[-13] ^= 1
    files["bad-crc-of-pixels.png"] = bytes(flipped), Expect("either", PICTURE)
    some = rows(GRAY)[: 17 * 9]
    files["nine-rows-of-16.png"] = png(16, 16, 8, 0, some), Expect("named", word="missing")
    files["no-rows.png"] = png(16, 16, 8, 0, b""), Expect("named", word="missing")
    files["interlaced-cut.png"] = png(16, 16, 8, 0, some, interlace=1), NAMED
    files["filter-9.png"] = png(16, 16, 8, 0, b"\x09" + rows(GRAY)[1:]), NAMED
    files["too-many-rows.png"] = png(16, 16, 8, 0, rows(GRAY) * 2), Expect("used", colour(GRAY))
    garbage = good[:33] + chunk(b"IDAT", b"not zlib") + chunk(b"IEND", b"")
    files["no-zlib.png"] = garbage, NAMED
    files["zero-wide.png"] = png(0, 16, 8, 0, b"\0" * 16), NAMED


def depths(files):
    """Numbers of bits, kinds of numbers, transparency."""
    levels = (X * 4096 + Y * 17).astype(np.uint16)
    eight = colour(np.rint(levels / 257))
    wide = np.stack([levels, levels[::-1], levels.T], 2)
    files["16-gray.tif"] = encode(levels, "TIFF"), Expect("used", eight)
    files["16.pgm"] = b"P5 16 16 65535\n" + levels.astype(">u2").tobytes(), Expect("used", eight)
    content = b"P6 16 16 65535\n" + wide.astype(">u2").tobytes()
    files["16-rgb.ppm"] = content, Expect("used", wide / 257, 1)
    bits = (X + Y) % 2 * 255
    image = Image.fromarray(bits.astype(np.uint8)).convert("1")
    files["1-bit.png"] = encode(image), Expect("used", colour(bits))
    files["1-bit.tif"] = encode(image, "TIFF", compression="group4"), Expect("used", colour(bits))
    files["float.tif"] = encode(levels.astype(np.float32), "TIFF"), NAMED
    files["int32.tif"] = encode(levels.astype(np.int32), "TIFF"), NAMED
    files["uint32.tif"] = gray_tiff(levels.astype(np.uint32)), NAMED
    files["double.tif"] = gray_tiff(levels.astype(float), 3), NAMED
    files["int16.tif"] = gray_tiff(levels, 2), NAMED
    files["int8.tif"] = gray_tiff(GRAY, 2), NAMED
    files["12-bit.tif"] = gray_tiff(np.zeros((16, 24), np.uint8), bits=12), NAMED
    more = [(320, 3, (np.arange(768) % 256).tolist())]
    files["palette-8-bit.tif"] = (
        tiff(GRAY[..., None], 3, more=more),
        Expect("named", word="palette"),
    )
    lies = tiff(PICTURE, tile=True)  # libtiff would ask for 1 GiB, and fill it
    for number in (322, 323):
        tag, large = (struct.pack("<HHII", number, 4, 1, side) for side in (16, 2**14))
        assert tag in lies
        lies = lies.replace(tag, large)
    files["huge-tiles.tif"] = lies, Expect("named", word="tiles far larger")
    files["16-white-at-zero.tif"] = gray_tiff(levels, white=0), NAMED

    alpha = np.where(X < 8, 0, 255).astype(np.uint8)
    over = np.where(alpha[..., None] == 0, 255, PICTURE)
    rgba = np.dstack([PICTURE, alpha])
    for kind in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        files[f"rgba.{kind.lower()}"] = encode(rgba, kind, **options), Expect("used", over)
    indexed = Image.fromarray((X // 8).astype(np.uint8), "L")
    indexed.putpalette([200, 30, 40, 10, 220, 60])
    two = np.where((X < 8)[..., None], (200, 30, 40), (10, 220, 60))
    files["palette.png"] = encode(indexed), Expect("used", two)
    clear = np.where((X < 8)[..., None], 255, two)
    for kind in ("png", "gif"):
        content = encode(indexed, kind, transparency=0)
        files[f"palette-transparent.{kind}"] = content, Expect("used", clear)


def colours(files):
    """Colour spaces."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ink = Image.merge("CMYK", [*Image.fromarray(255 - PICTURE).split(), Image.new("L", (16, 16))])
    # Adobe's way, 255 for no ink, is how Pillow writes a JPEG; a TIFF has 0 for none
    for name, options in {"cmyk": {}, "cmyk-icc": {"icc_profile": profile}}.items():
        content = encode(ink, "JPEG", quality=100, subsampling=0, **options)
        assert b"Adobe" in content
        files[f"{name}.jpg"] = content, Expect("used", PICTURE, 6)
    files["cmyk.tif"] = encode(ink, "TIFF"), Expect("used", PICTURE)
    files["icc.png"] = encode(PICTURE, "PNG", icc_profile=profile), Expect("used", PICTURE)
    files["icc-broken.png"] = encode(PICTURE, "PNG", icc_profile=b"?"), Expect("used", PICTURE)
    # L* = 53.3: Y = ((L* + 16) / 116)^3 = 0.2135, which in sRGB is 127
    lab = Image.new("LAB", (16, 16), (136, 128, 128))
    files["lab.tif"] = encode(lab, "TIFF"), Expect("used", full(127, 127, 127), 2)


def shapes(files):
    """Orders of pixels, shapes, frames."""
    for number, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = number
        content = encode(PICTURE, "PNG", exif=exif)
        files[f"exif-{number}.png"] = content, Expect("used", upright(PICTURE))
        content = encode(PICTURE, "TIFF", exif=exif)  # Pillow turns a TIFF itself: not twice, then
        files[f"exif-{number}.tif"] = content, Expect("used", upright(PICTURE))
        content = encode(PICTURE, "JPEG", exif=exif, quality=100, subsampling=0)
        files[f"exif-{number}.jpg"] = content, Expect("used", upright(PICTURE), 8)
    for number in (0, 9, 65535):
        exif[0x0112] = number
        content = encode(PICTURE, "PNG", exif=exif)
        files[f"exif-{number}.png"] = content, Expect("used", PICTURE)
    for i, block in enumerate((b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0" + b"?" * 40)):
        for kind in ("PNG", "JPEG", "WEBP"):
            options = {"quality": 100} | ({"subsampling": 0} if kind == "JPEG" else {})
            options |= {"lossless": True} if kind == "WEBP" else {}
            content = encode(PICTURE, kind, exif=block, **options)
            files[f"exif-broken-{i}.{kind.lower()}"] = content, Expect("either", PICTURE, 8)
    for size in ((1, 1), (20000, 1), (1, 20000), (7, 3000)):
        content = encode(Image.new("RGB", size, (9, 99, 199)), "PNG")
        files["{}x{}.png".format(*size)] = content, Expect("used", full(9, 99, 199))
    strip = Image.new("L", (20001, 1))
    strip.putpixel((10000, 0), 255)  # the centre, which alone is kept: one pixel, spread over 16
    files["bright-centre.png"] = encode(strip), Expect("used", full(255, 255, 255), 200)
    first, later = Image.new("RGB", (16, 16), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        options = {"lossless": True} if kind == "WEBP" else {}
        content = encode(first, kind, save_all=True, append_images=[later, first], **options)
        files[f"animated.{kind.lower()}"] = content, Expect("used", full(255, 0, 0))


def make(folder):
    """Write all of it below `folder` -> {relative name: Expect}."""
    files = {}
    for part in (cut, other_contents, broken_pngs, depths, colours, shapes):
        part(files)
    good = encode(PICTURE)
    used = Expect("used", PICTURE)
    odd = ["two  spaces .png", "new\nline.png", "tab\tand \x1b[31mred.png", "é ü 図 🙂.png"]
    odd += [os.fsdecode(b"latin1-\xe9.png"), "n" * 240 + ".png", "percent %s {0}.png"]
    odd += ["a folder.png/inside.png", "deep/er/x.png", "semi;colon, comma (and this).png"]
    for name in odd:
        files[name] = good, used
    files[os.fsdecode(b"bad-\xff\nname.png")] = b"broken", NAMED
    files["..two.jpg"] = good, Expect("hidden")
    for name in (".hidden.png", "__MACOSX/x.png", ".git/x.png", "__MACOSX/notes.txt"):
        files[name] = b"broken, but never opened", Expect("hidden")
    for name in ("a.heic", "b.HEIC", "c.avif", "notes.txt", "no suffix", "photo.png.bak"):
        files[name] = good, Expect("left out")
    files[os.fsdecode(b"x.\xff\n")] = good, Expect("left out")

    for name, (content, _) in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(content)
    expected = {name: expect for name, (_, expect) in files.items()}
    os.makedirs(os.path.join(folder, "an empty folder.png"))
    links = {"link.png": "whole.png", "dangling.png": "nowhere.png"}
    links |= {"loop-a.png": "loop-b.png", "loop-b.png": "loop-a.png", "up": "."}
    links |= {"dirs-a": "dirs-b", "dirs-b": "dirs-a"}
    for name, target in links.items():
        os.symlink(target, os.path.join(folder, name))
    expected["link.png"] = used
    for name in ("dangling.png", "loop-a.png", "loop-b.png", "pipe.png"):
        expected[name] = NAMED
    expected["dirs-a"] = expected["dirs-b"] = Expect("left out")  # "up" leads to a folder already
    os.mkfifo(os.path.join(folder, "pipe.png"))  # read, seen
    with open(os.path.join(folder, "huge.png"), "wb") as file:
        file.truncate(2**30 + 1)  # a hole: takes no room
    expected["huge.png"] = Expect("named", word="too many")
    if os.geteuid():  # root may read everything
        path = os.path.join(folder, "forbidden.png")
        with open(path, "wb") as file:
            file.write(good)
        os.chmod(path, 0)
        expected["forbidden.png"] = Expect("named", word="ermission")
    return expected


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    made = make(sys.argv[1])
    for key, value in made.items():
        print(ascii(key), value.what)
    print(len(made), "entries")
