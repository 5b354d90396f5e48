r"""One picture: a PIL image of any mode and shape -> the pixels that a network is shown.

    prepare(image, size, channels) -> uint8 (C, H, W)
    missing_pixels(content)                            what a PNG that was cut does not have

Pillow opens nearly everything, and is silent about some of what it cannot represent: a PNG whose
data end early becomes black rows, a transparent level is compared with pixels of another scale. A
wrong number would be learnt; so such files are read as they were meant, or refused.

What this file does not do: colour management (ICC profiles and gamma are ignored), 16-bit *colour*
(Pillow keeps the high byte; 16-bit gray is exact), or prove that pixels are right: JPEG, GIF and
BMP have no checksum, and only a cut is seen in them.

C channels, H height, W width.

    python -c "from pictures import *; print(prepare(Image.new('L', (9, 5), 7), 4, 3).shape)"
"""
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps

ASPECT = 8  # images longer than this are cropped before resizing, too


def transparent_level(image):
    """The one level of a gray PNG that is transparent, or None; to be asked before loading.

    ValueError: what Pillow reads without a word, but not as it is meant.
    """
    if image.format == "TIFF":
        bits, white, kind = (image.tag_v2.get(tag, 1) for tag in (258, 262, 339))
        if (image.mode.startswith("I;16") and (white == 0 or tuple(bits) != (16,))
                or image.mode == "L" and tuple(np.atleast_1d(kind)) == (2,)):
            raise ValueError("a TIFF of 12 bits, of 16 with 0 for white, or of signed bytes: "
                             "convert it to plain 8 or 16 bits first")
    if image.format != "PNG" or "transparency" not in image.info or image.mode == "P":
        return None
    level = image.info["transparency"]
    packing = image.tile[0].args if image.tile else ""  # no tile: loaded before, by someone else
    if packing == "RGB;16B":  # Pillow has the colour in 16 bits, but pixels in 8
        raise ValueError("a transparent colour of 16 bits: convert it to 8 bits first")
    # Pillow stretches the pixels of 2 and 4 bits to 0..255, and not the level: none would match.
    return level * {"L;2": 85, "L;4": 17}.get(packing, 1) if image.mode != "RGB" else level


def prepare(image, size, channels):
    """PIL image of any mode and shape -> uint8 tensor (channels, size, size).

    The shortest side is resized to `size`, then the centre is cropped; an upright 8-bit image of
    that size already keeps every bit. Transparent parts become white; of an animation, the first
    frame counts. ValueError: a mode whose range is unknown (floats, 32-bit integers).
    """
    source_format = image.format  # lost by every operation below
    level = transparent_level(image)
    image.load()  # before EXIF: by loading, Pillow turns a TIFF itself (some versions need this)
    image = ImageOps.exif_transpose(image)
    # 20,000 x 1 would be resized to 5,120,000 x 256 before its centre is cropped. What is kept is
    # wider than the filter reaches, and no image of ordinary shape comes here.
    width, height = (min(side, ASPECT * min(image.size)) for side in image.size)
    if (width, height) != image.size:
        width += (image.width - width) % 2  # odd stays odd: the centre stays the centre
        height += (image.height - height) % 2
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if image.mode.startswith("I;16") or image.mode == "I" and source_format in ("PNG", "PPM"):
        # 65535 = 255 * 257. convert("L") would clip at 255 and give an almost white image.
        numbers = np.asarray(image).astype(np.int64)
        levels = np.where(numbers == level, 255, (numbers + 128) // 257)
        image = Image.fromarray(levels.astype(np.uint8))
    elif level is not None:
        image.info["transparency"] = level
    if image.mode in ("F", "I"):
        raise ValueError(f"mode {image.mode} has no fixed range, convert it to 8 or 16 bits first")
    if image.has_transparency_data:  # an alpha channel, or a colour or palette entry declared so
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "1":
        image = image.convert("L")
    if channels == 3 or image.mode != "L":
        image = image.convert("RGB")  # also for gray: CMYK and palettes have no good way to L
    image = image.convert("L" if channels == 1 else "RGB")

    width, height = image.size
    if min(width, height) != size:
        scale = size / min(width, height)
        width, height = max(size, round(width * scale)), max(size, round(height * scale))
        # Pillow widens its filter by the factor of shrinking, and so averages over all the pixels
        # that fall into one. Plain interpolation (torch, OpenCV) skips most of them and aliases,
        # which a network learns as texture and FID counts as distance.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # interlaced PNG: first x, first y and steps of its seven passes


def missing_pixels(content):
    """How many bytes of pixels the PNG `content` lacks; Pillow would leave them black, and mute."""
    width, height, depth, kind = struct.unpack(">IIBB", content[16:26])
    bits, need = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind], 0
    for x, y, dx, dy in ADAM7 if content[28] else ((0, 0, 1, 1),):
        w, h = -((x - width) // dx), -((y - height) // dy)  # rounded up
        if w > 0 and h > 0:
            need += h * (1 + (w * bits + 7) // 8)
    inflate, at = zlib.decompressobj(), 8
    while need > 0 and at + 8 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        if content[at + 4:at + 8] == b"IDAT":
            rest = content[at + 8:at + 8 + length]
            while rest and need > 0 and not inflate.eof:  # in pieces: it may be a bomb
                need -= len(inflate.decompress(rest, 2**20))
                rest = inflate.unconsumed_tail
        at += 12 + length
    return max(0, need - len(inflate.flush())) if need > 0 else 0
