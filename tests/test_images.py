"""images.py: the pixels of one picture. Every TIFF, BMP and PNG of a sweep is read rightly, or
refused in one line.

Pictures of each kind, alone and in a folder, are in robustness/test_corpus.py; here is the sweep.
image_writers.py writes the sweep, so its pixels are known without any decoder. The kinds that must
be read are listed: a reader that refuses everything would pass the rest.
"""

import io
import itertools
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import peak_below
from image_writers import PICTURE, bmp, bmp_rows, chunk, encode, pixels, png
from image_writers import png_rows, tiff
from PIL import Image

import data
from support import image_files
from support.images import bare_png, prepare
from support.readers import one_line

SIDE = 19  # no multiple of a tile, of a strip, of a byte, or of 4 bytes
RNG = np.random.default_rng(17)


def read(content, size=SIDE):
    """-> (mode, pixels (H, W, 3)), or the error."""
    files = image_files.Files(["x"], size, 3)
    files.content = lambda i: content
    try:
        mode, _, image = files.read(0, check=True)
    except Exception as error:
        text = one_line(error)
        assert text and text.isprintable() and "object at" not in text, text
        return text, None
    return mode, image.permute(1, 2, 0).numpy()


def integers(bits, samples, side=SIDE):
    return RNG.integers(0, 2**bits, (side, side, samples))


def to_eight(levels, bits):
    """What is documented: rounded, but for colour of 16 bits, whose high byte counts."""
    if bits == 16 and levels.shape[-1] > 2:
        return levels >> 8
    return np.rint(levels * 255 / (2**bits - 1)).astype(int)


def over_white(colour, alpha):
    """(H, W, 3) of 0..255 over white; `alpha` (H, W, 1) of 0..1."""
    return 255 + (colour - 255.0) * alpha


def close(found, expected, tolerance=1):
    return np.abs(found - expected).max() <= tolerance


def test_transparent_pictures_in_gray():
    """Over white, whatever the mode; colours become gray as Pillow has it."""
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 3] = [[0, 255], [51, 0]]  # 51/255 of black over white: 204
    image = Image.fromarray(rgba)
    palette = Image.new("P", (2, 2)).convert("PA")  # its only colour, 0, is black
    palette.putalpha(image.getchannel("A"))
    for source in (image, image.convert("LA"), palette):
        assert prepare(source, 2, 1).tolist() == [[[255, 0], [204, 255]]], source.mode
    colour = Image.fromarray(pixels(4, 4, 3))
    out = prepare(colour, 4, 1)
    assert np.array_equal(out[0], np.asarray(colour.convert("L"))) and out.dtype == torch.uint8


# ------------------------------------------------------------------ TIFF

# name: (photometric interpretation, samples of colour, kinds of the extra samples)
TIFFS = {
    **{"gray": (1, 1, ()), "inverted gray": (0, 1, ()), "gray and more": (1, 1, (0,))},
    **{"gray, premultiplied": (1, 1, (1,)), "gray and alpha": (1, 1, (2,))},
    **{"two grays": (1, 2, ()), "four grays": (1, 4, ()), "RGB": (2, 3, ())},
    **{"RGB and more": (2, 3, (0,)), "RGB, premultiplied": (2, 3, (1,)), "RGBA": (2, 3, (2,))},
    **{"RGBA, undeclared": (2, 3, None), "palette": (3, 1, ())},
    **{"CMYK": (5, 4, ()), "YCbCr": (6, 3, ())},
}


def tiff_colour(white, levels, palette):
    """What the samples of colour mean, as 0..255."""
    if white == 0:
        return 255 - levels
    if white == 3:
        return palette[levels[..., 0]]
    if white == 5:
        return (255 - levels[..., :3]) * (255 - levels[..., 3:]) / 255
    if white == 6:  # JFIF
        y, blue, red = np.split(levels - [0, 128, 128], 3, axis=2)
        parts = y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue
        return np.clip(np.concatenate(parts, 2), 0, 255)
    return levels


@pytest.mark.parametrize("bits", [8, 16])
def test_every_tiff_is_right_or_refused(bits):
    counts, refused, top = Counter(), {}, 2**bits - 1
    ways = itertools.product((False, True), (1, 8), (False, True), "<>", (False, True))
    for planar, compression, tile, order, predictor in ways:
        if predictor and compression == 1:
            continue
        for name, (white, samples, extra) in TIFFS.items():
            more, palette = [], integers(8, 3, 16).reshape(256, 3)
            alphas = len(extra) if extra is not None else 1
            if white == 3 and bits == 16:
                continue
            levels = integers(bits, samples + alphas)
            expected = tiff_colour(white, to_eight(levels[..., :samples], bits), palette)
            if extra is None or extra and extra[0]:
                alpha = RNG.integers(0, 2, (SIDE, SIDE, 1))
                levels[..., samples:] = alpha * top
                if extra == (1,):
                    levels *= alpha
                expected = over_white(expected, alpha)
            if white == 3:
                more = [(320, 3, (palette.T * 257).flatten().tolist())]
            if white == 6:
                more = [(530, 3, [1, 1])]
            levels, how = levels.astype(f"u{bits // 8}"), (order, planar, compression, predictor)
            text, found = read(tiff(levels, white, extra or (), *how, tile, more=more))
            way = name, "planes" if planar else "pixels"
            if found is None:
                refused[way] = text
            else:
                assert close(found, expected, 3 if white == 6 else 1), (name, *how, tile)
                counts[way] += 1
    every = 12  # 2 orders of bytes, strips and tiles, plain or deflated, this with predictors too
    must = {(name, way) for name in TIFFS for way in ("pixels", "planes") if name[0] in "RC"}
    must |= {("gray", "pixels"), ("gray", "planes")}
    if bits == 8:
        grays = ("inverted gray", "gray and more", "gray and alpha", "gray, premultiplied")
        must |= {(name, "pixels") for name in (*grays, "palette")} | {("YCbCr", "planes")}
        assert "two planes" in refused["gray and alpha", "planes"]
    assert {counts[way] for way in must} == {every} and len(must) == 14 + 6 * (bits == 8), refused


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("white", [0, 1, 3])
def test_tiffs_of_few_bits(bits, white):
    backwards = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)], np.uint8)
    ways = ((1, 1, "<", 0), (1, 1, ">", 1), (1, 2, ">", 0), (1, 2, "<", 1))
    for compression, fill, order, planar in (*ways, (8, 1, ">", 1), (8, 1, "<", 0)):
        levels, palette = integers(bits, 1, 24), integers(8, 3, 4).reshape(16, 3)[: 2**bits]
        rows = [row[1:] for row in np.split(np.frombuffer(png_rows(levels, bits), "u1"), 24)]
        packed = np.stack(rows)[..., None]
        more = [(266, 3, [fill])]  # the first pixel in the low or the high bit
        more += [(320, 3, (palette.T * 257).flatten().tolist())] if white == 3 else []
        packed = backwards[packed] if fill == 2 else packed
        content = tiff(packed, white, (), order, bool(planar), compression, bits=bits, more=more)
        _, found = read(content, 24)
        expected = tiff_colour(white, to_eight(levels, bits) if white != 3 else levels, palette)
        assert np.abs(found - expected).max() == 0, (compression, fill, order)


# ------------------------------------------------------------------ BMP


def unmask(pixels, mask):
    """The bits of `pixels` under `mask`, as 0..255."""
    low = mask & -mask
    return np.rint((pixels & mask) // low * 255 / (mask // low)).astype(int)


def colours(pixels, masks):
    return np.stack([unmask(pixels, mask) for mask in masks[:3]], 2)


A, R, G, B = 0xFF000000, 0xFF0000, 0xFF00, 0xFF
RGB = (R, G, B)
MASKS = [(32, n, RGB + alpha, True) for n, alpha in ((40, ()), (52, ()), (56, (0,)), (108, (A,)))]
MASKS += [(32, 124, m, True) for m in ((R, G, B, A), (B, G, R, A), (A, R, G, B), (A, R, G, 0))]
MASKS += [(16, 40, (0xF800, 0x7E0, 0x1F), True), (16, 40, (0x7C00, 0x3E0, 0x1F), True)]
MASKS += [(16, 124, (0xF800, 0x7E0, 0x1F, 0), True)]
MASKS += [(32, 40, (B, G, R), False), (32, 124, (R, B, G, A), False)]  # those may be refused
MASKS += [(32, 124, (0x3FF00000, 0xFFC00, 0x3FF, 0), False)]
MASKS += [(16, n, (0x7C00, 0x3E0, 0x1F, 0x8000), False) for n in (124, 56)]
MASKS += [(16, 124, (0xF00, 0xF0, 0xF, 0xF000), False), (16, 40, (0x1F, 0x7E0, 0xF800), False)]


@pytest.mark.parametrize("bits, header, masks, must", MASKS)
def test_bmp_with_masks(bits, header, masks, must):
    for up in (True, False):
        pixels = integers(bits, 1)[..., 0]
        raw = bmp_rows(pixels if up else pixels[::-1], bits)
        content = bmp(raw, SIDE, SIDE if up else -SIDE, bits, masks, (), header, 3)
        expected = colours(pixels, masks)
        if len(masks) == 4 and masks[3]:
            expected = over_white(expected, unmask(pixels, masks[3])[..., None] / 255)
        text, found = read(content)
        assert found is not None or not must, text
        assert found is None or close(found, expected)


@pytest.mark.parametrize("header", [12, 40, 64, 108, 124])
@pytest.mark.parametrize("bits", [16, 24, 32])
def test_bmp_without_masks(bits, header):
    pixels = integers(bits, 1)[..., 0]  # of 32 bits, the highest 8 are undefined, of 16 one
    expected = colours(pixels, (0x7C00, 0x3E0, 0x1F) if bits == 16 else RGB)
    for up in (True, False) if header > 12 else (True,):
        raw = bmp_rows(pixels if up else pixels[::-1], bits)
        _, found = read(bmp(raw, SIDE, SIDE if up else -SIDE, bits, header=header))
        assert close(found, expected)


GRAYS = [(k, k, k) for k in range(256)]
COLOURS = [tuple(colour) for colour in integers(8, 3, 16).reshape(256, 3).tolist()]
PALETTES = {"gray": GRAYS, "dark grays": GRAYS[:16], "two dark grays": GRAYS[:2]}
PALETTES |= {"colours": COLOURS, "two colours": COLOURS[:2]}
PALETTES |= {"black and white": GRAYS[::255], "white and black": GRAYS[::-255]}


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("name", PALETTES)
def test_bmp_with_palettes(bits, name):
    palette = PALETTES[name][: 2**bits]
    levels = RNG.integers(0, len(palette), (SIDE, SIDE))
    expected = np.array(palette)[levels]
    colours = 0 if len(palette) == 2**bits else len(palette)
    text, found = read(bmp(bmp_rows(levels, bits), SIDE, SIDE, bits, (), palette, 40, 0, colours))
    if found is None:
        assert "gray palette" in text and len(palette) <= 16 and bits > 1
    else:
        assert np.array_equal(found, expected)
    if not colours:
        _, found = read(bmp(bmp_rows(levels, bits), SIDE, SIDE, bits, (), palette, 12))
        assert found is None and bits == 4 or np.array_equal(found, expected)


# ------------------------------------------------------------------ PNG

KINDS = {0: (1, (1, 2, 4, 8, 16)), 2: (3, (8, 16)), 3: (1, (1, 2, 4, 8)), 4: (2, (8, 16))}
KINDS[6] = (4, (8, 16))


@pytest.mark.parametrize("interlace", [0, 1])
@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_png_is_right_or_refused(kind, clear, interlace):
    """Of a side of 1 and 3, some passes are empty. Without its last byte, each is refused."""
    samples, depths = KINDS[kind]
    for depth, side in itertools.product(depths, (1, 3, SIDE)):
        levels, before = integers(depth, samples, side), b""
        expected = to_eight(levels, depth)
        palette = integers(8, 3, 16).reshape(256, 3)[: 2**depth]
        if kind == 3:
            before = chunk(b"PLTE", palette.astype("u1").tobytes())
            expected = palette[levels[..., 0]]
            if clear:  # an alpha for some of the palette
                alphas = RNG.integers(0, 256, max(1, len(palette) // 2))
                before += chunk(b"tRNS", alphas.astype("u1").tobytes())
                alphas = np.append(alphas, [255] * (len(palette) - len(alphas)))
                expected = over_white(expected, alphas[levels] / 255)
        elif kind in (0, 2) and clear:  # one transparent colour
            level = levels[side // 5, side // 4]
            levels[::2, ::2] = level
            before = chunk(b"tRNS", level.astype(">u2").tobytes())
            white = (levels == level).all(2, keepdims=True)
            expected = np.where(white, 255, to_eight(levels, depth))
        elif kind in (4, 6):
            if clear:
                levels[..., -1] = 0  # but the colours vary
            eight = to_eight(levels, depth) if depth < 16 else levels >> 8
            expected = over_white(eight[..., :-1], eight[..., -1:] / 255)
        raw = png_rows(levels, depth, interlace)
        text, found = read(png(side, side, depth, kind, raw, before, interlace), side)
        if found is None:
            assert clear and (kind in (4, 6) and "alpha is 0" in text or (kind, depth) == (2, 16))
        else:
            exact = not (clear and kind == 3 or kind in (4, 6))
            assert close(found, expected, 0 if exact else 1), (depth, side)
        text, _ = read(png(side, side, depth, kind, raw[:-1], before, interlace), side)
        assert text == "1 bytes of pixels are missing"


def big_pngs():
    """Whole pictures that Pillow refuses for what surrounds them."""
    good = encode(PICTURE)
    head, rest, end = good[:33], good[33:-12], good[-12:]
    bomb = zlib.compress(bytes(2**22), 9)
    texts = {
        "text": chunk(b"iTXt", b"prompt\0\1\0\0\0" + bomb),
        "old-text": chunk(b"zTXt", b"parameters\0\0" + bomb),
        "profile": chunk(b"iCCP", b"p\0\0" + bomb),
        "many": chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20), 9)) * 66,
        "plain": chunk(b"tEXt", b"k\0" + bytes(2**26 + 1)),
        "broken": chunk(b"gAMA", b"?") + chunk(b"acTL", b"") + chunk(b"iCCP", b"p\0\1"),
    }
    for name, text in texts.items():
        yield f"{name}-before", head + text + rest + end
        if name not in ("profile", "broken"):
            yield f"{name}-after", head + rest + text + end


@pytest.mark.parametrize("name, content", [pytest.param(*pair, id=pair[0]) for pair in big_pngs()])
def test_pngs_with_much_text_are_read(name, content):
    with pytest.raises((ValueError, SyntaxError, OSError, IndexError)):
        with Image.open(io.BytesIO(content)) as image:  # else this test has no point
            image.load()
    with peak_below(2**22):  # the text is not unpacked
        _, found = read(content, 16)
    assert np.array_equal(found, PICTURE)


def test_pixels_beyond_those_declared_are_not_inflated():
    bomb = png(1, 1, 8, 0, bytes(2**25))
    with peak_below(2**23):
        assert read(bomb, 1)[1].tolist() == [[[0, 0, 0]]]


def test_what_turns_a_picture_survives_the_text():
    exif = Image.Exif()
    exif[0x0112] = 3
    code = exif.tobytes()
    raw = f"\nexif\n{len(code):8}\n{code.hex()}\n".encode()
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"/>'
    good = encode(PICTURE)
    for kind in (
        chunk(b"eXIf", code.removeprefix(b"Exif\0\0")),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)),
        chunk(b"tEXt", b"Raw profile type exif\0" + raw),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
    ):
        for at in (33, len(good) - 12):
            _, found = read(good[:at] + kind + good[at:], 16)
            assert np.array_equal(found, PICTURE[::-1, ::-1]), (kind[:20], at)


def test_only_whole_pngs_are_made_bare():
    good = encode(PICTURE)
    jpeg = encode(PICTURE, "JPEG")
    for content in (jpeg, good, *(good[:at] for at in (8, 20, 50, -3))):  # cut: for Pillow to judge
        assert bare_png(content) == content
    text, found = read(good[:8] + chunk(b"CgBI", bytes(4)) + good[8:], 16)
    assert found is None and "does not begin with its size" in text


# ------------------------------------------------------------------ alpha, 12 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_alpha_that_hides_everything(kind):
    """A white picture would silently be learnt; only one that hides nothing becomes white."""
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    nothing = np.zeros((16, 16, 1), np.uint8)
    text, found = read(encode(np.dstack([PICTURE, nothing]), kind, **options), 16)
    assert found is None and "alpha is 0 everywhere" in text
    _, found = read(encode(np.dstack([PICTURE * 0, nothing]), kind, **options), 16)
    assert (found == 255).all()
    with pytest.raises(ValueError, match="alpha is 0 everywhere"):
        prepare(Image.fromarray(np.dstack([PICTURE, nothing])), 16, 3)


@pytest.mark.parametrize("masks", [(R, G, B, A), (0, 0, 0, 0)])
def test_a_bmp_whose_alpha_is_unused(masks):
    pixels = integers(24, 1)[..., 0]
    _, found = read(bmp(bmp_rows(pixels, 32), SIDE, SIDE, 32, masks, (), 124, 3))
    assert np.array_equal(found, colours(pixels, RGB))


def test_12_bits_in_16_are_counted(tmp_path):
    twelve = (np.mgrid[:16, :16][1] * 273).astype(np.uint16)  # 0 .. 4095
    rgb = png_rows(np.repeat(twelve[..., None], 3, 2), 16)
    files = {
        "gray.png": encode(twelve),
        "gray.tif": encode(twelve, "TIFF"),
        "gray.pgm": b"P5 16 16 65535\n" + twelve.astype(">u2").tobytes(),
        "colour.png": png(16, 16, 16, 2, rgb),
        "colour.tif": tiff(np.repeat(twelve[..., None], 3, 2)),
        "bright.png": encode(twelve * 16),
        "black.png": encode(twelve * 0),
        "maximum.pgm": b"P5 16 16 4095\n" + twelve.astype(">u2").tobytes(),
        "dark-8-bit.png": encode((twelve // 300).astype(np.uint8)),
        "565.bmp": bmp(bmp_rows(np.ones((16, 16), int), 16), 16, 16, 16),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    d = data.load(tmp_path, 16, 3)
    assert d.summary == (
        "10 images (2 I, 4 I;16, 1 L, 3 RGB), 16x16 -> 3x16x16, in memory, 5 of them 16-bit and "
        "nearly black (12-bit values? multiply them by 16)"
    )
    (tmp_path / "gray.png").rename(tmp_path / "gray")  # no image any more
    (tmp_path / "bad.png").write_bytes(b"?")
    d = data.load(tmp_path, 16, 3, skip_bad=True)
    assert ", 1 bad skipped, 4 of them 16-bit" in d.summary
