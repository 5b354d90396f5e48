r"""One image: a PIL image of any mode and shape -> the pixels for a network.

    prepare(image, size, channels) -> uint8 (C, H, W)
    bare_png(content) -> content        without the text and profiles of a PNG
    missing_pixels(content)             bytes of pixels that a truncated PNG lacks

Pillow opens nearly everything, and gives no error for some things that it cannot represent: a
truncated PNG gets black rows, and a transparent level is compared with pixels of another scale. The
network would learn wrong pixels. So such files are read correctly or refused.

Not here: colour management (ICC profiles and gamma are ignored); 16-bit *colour* (Pillow keeps the
high byte; 16-bit gray is exact); hidden damage: JPEG, GIF and BMP have no checksum, so that only a
truncated file is noticed.

C channels, H height, W width.

    python -c "from support.images import *; print(prepare(Image.new('L', (9, 5), 7), 4, 3).shape)"
"""
import math
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

ASPECT = 8  # images with a larger aspect ratio are also cropped before resizing
# Pillow's reader assumes 8 bits in the planes of an uncompressed TIFF, which gives wrong pixels.
# libtiff, its reader of compressed TIFFs, reads them correctly.
TiffImagePlugin.READ_LIBTIFF = True


def refuse(image):
    """ValueError: Pillow would read this file wrongly without an error. Before loading only."""
    if image.format == "TIFF":
        bits, white, kind = (image.tag_v2.get(tag, 1) for tag in (258, 262, 339))
        if (image.mode.startswith("I;16") and (white == 0 or set(bits) != {16})
                or image.mode == "L" and tuple(np.atleast_1d(kind)) == (2,)):
            raise ValueError("a TIFF of 12 bits, of 16 with 0 for white, or of signed bytes: "
                             "convert it to plain 8 or 16 bits first")
        tile = image.tag_v2.get(322, 1) * image.tag_v2.get(323, 1)
        if tile > max(2**22, 4 * math.prod(image.size)):  # libtiff would request all that memory
            raise ValueError("a TIFF with tiles far larger than the image: save it without tiles")
        if image.mode in ("LA", "La", "PA") and image.tag_v2.get(284) == 2:
            raise ValueError("a TIFF with gray and alpha in two planes: save it without planes")
        if image.mode == "P" and 0 < max(image.tag_v2[320]) < 256:  # it would become black
            raise ValueError("a TIFF whose palette has 8 bits instead of 16: save it as RGB")
    if image.format == "BMP" and image.tile:
        image.fp.seek(0)
        head = image.fp.read(70)
        kind, bits = head[14], head[24 if head[14] == 12 else 28]
        # With a gray palette, Pillow assumes pixels of 1 or 8 bits.
        if bits != {"1": 1, "L": 8}.get(image.mode, bits):
            raise ValueError(f"a BMP of {bits} bits with a gray palette: save it with 24 bits")
        if bits == 16 and kind >= 56 and image.info["compression"] == 3 and any(head[66:70]):
            raise ValueError("a BMP of 16 bits with alpha: save it with 32 bits")


def transparent_level(image):
    """The transparent level of a gray PNG, or None. Before loading only."""
    if image.format != "PNG" or "transparency" not in image.info or image.mode == "P":
        return None
    level = image.info["transparency"]
    packing = image.tile[0].args if image.tile else ""  # no tile: the caller has loaded it
    if packing == "RGB;16B":  # Pillow has the colour in 16 bits, but pixels in 8
        raise ValueError("a transparent colour of 16 bits: convert it to 8 bits first")
    # Pillow scales pixels of 2 and 4 bits to 0..255, but not the level: no pixel would match.
    return level * {"L;2": 85, "L;4": 17}.get(packing, 1) if image.mode != "RGB" else level


def prepare(image, size, channels):
    """PIL image of any mode and shape -> uint8 tensor (channels, size, size).

    The shortest side is resized to `size`, then the centre is cropped; an upright 8-bit image of
    this size keeps every bit. Transparent parts become white; an animation gives its first frame.
    ValueError: a mode of unknown range (floats, 32-bit integers), alpha that hides all colours, and
    the files that `refuse` names.
    """
    source_format = image.format  # every operation below drops it
    refuse(image)
    level = transparent_level(image)
    try:  # before EXIF, since in some versions only load() rotates a TIFF
        image.load()
    except OSError as error:  # libtiff's messages are numbers
        if "decoder error" not in str(error):
            raise
        raise ValueError(f"the file ends early or is damaged ({error})") from error
    image = ImageOps.exif_transpose(image)
    # 20,000 x 1 would be resized to 5,120,000 x 256 before its centre is cropped. The part that is
    # kept is wider than the filter. Images of ordinary shape do not change.
    width, height = (min(side, ASPECT * min(image.size)) for side in image.size)
    if (width, height) != image.size:
        width += (image.width - width) % 2  # odd stays odd, so that the centre does not move
        height += (image.height - height) % 2
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    if image.mode.startswith("I;16") or image.mode == "I" and source_format in ("PNG", "PPM"):
        # 65535 = 255 * 257. convert("L") would clip at 255: an almost white image.
        numbers = np.asarray(image).astype(np.int64)
        levels = np.where(numbers == level, 255, (numbers + 128) // 257)
        image = Image.fromarray(levels.astype(np.uint8))
    elif level is not None:
        image.info["transparency"] = level
    if image.mode in ("F", "I"):
        raise ValueError(f"mode {image.mode} has no fixed range: convert it to 8 or 16 bits first")
    if image.has_transparency_data:  # an alpha channel, or a transparent colour or palette entry
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        *colours, alpha = image.getextrema()
        if alpha == (0, 0) and source_format == "BMP":
            # The fourth byte of a BMP is often unused, even if its masks declare alpha; browsers
            # also show such an image as opaque.
            image.putalpha(255)
        elif alpha == (0, 0) and any(low < high for low, high in colours):
            # Either alpha is unused or the image is empty: the file does not record which. The
            # network would learn white. An empty sprite hides only one colour and becomes white.
            raise ValueError("alpha is 0 everywhere and hides colours: remove the alpha channel")
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
        # Pillow widens its filter when it shrinks, so that it averages over all source pixels.
        # Plain interpolation (torch, OpenCV) skips most of them. The aliasing would be texture to
        # a network, and distance to FID.
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels.reshape(size, size, channels)).permute(2, 0, 1).contiguous()


def grid(images, columns):
    """Arrange uint8 images (N, C, H, W) row by row -> one PIL image; empty places are white."""
    n, c, h, w = images.shape
    sheet = torch.full((-(-n // columns), columns, c, h, w), 255, dtype=torch.uint8)
    sheet.flatten(0, 1)[:n] = images.cpu()
    pixels = sheet.permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)  # (rows H, columns W, C)
    return Image.fromarray(pixels.squeeze(2).numpy() if c == 1 else pixels.numpy())


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # interlaced PNG: first x, first y and steps of its seven passes


def chunks(content):
    """Yield (name, start, length of the data) of each chunk of a PNG that is there."""
    at = 8
    while at + 8 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        yield content[at + 4:at + 8], at, length
        at += 12 + length


# Texts in which Pillow finds an image's orientation. All other text is dropped.
EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def bare_png(content):
    """`content`; from a PNG, only the chunks that affect its (first) image.

    Pillow unpacks text and profiles. As a protection from bombs, it refuses a file with more than
    1 MB of them, and image generators write such files.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept = [content[:8]]
    for name, at, length in chunks(content):
        optional = name.isalpha() and name[0] & 32  # a lower-case first letter
        if (not optional or name in (b"tRNS", b"eXIf")
                or content.startswith(EXIF_TEXTS, at + 8)):
            kept.append(content[at:at + 12 + length])
    return b"".join(kept)


def missing_pixels(content):
    """Number of bytes of pixels that the PNG `content` lacks; Pillow would leave them black."""
    if content[12:16] != b"IHDR":  # Apple's variant, for example
        raise ValueError("a PNG that does not begin with its size: convert it to a plain PNG")
    width, height, depth, kind = struct.unpack(">IIBB", content[16:26])
    bits, need = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind], 0
    for x, y, dx, dy in ADAM7 if content[28] else ((0, 0, 1, 1),):
        w, h = -((x - width) // dx), -((y - height) // dy)  # rounded up
        if w > 0 and h > 0:
            need += h * (1 + (w * bits + 7) // 8)
    inflate = zlib.decompressobj()
    for name, at, length in chunks(content):
        rest = content[at + 8:at + 8 + length] if name == b"IDAT" else b""
        while rest and need > 0 and not inflate.eof:  # in pieces, since it may be a bomb
            need -= len(inflate.decompress(rest, 2**20))
            rest = inflate.unconsumed_tail
    return max(0, need - len(inflate.flush())) if need > 0 else 0
