r"""One picture: a PIL image of any mode and shape -> the pixels that a network is shown.

    prepare(image, size, channels) -> uint8 (C, H, W)
    bare_png(content) -> content        without the text and profiles of a PNG
    missing_pixels(content)             what a PNG that was cut does not have

Pillow opens nearly everything, and is silent about some of what it cannot represent: a PNG whose
data end early becomes black rows, a transparent level is compared with pixels of another scale. A
wrong number would be learnt; so such files are read as they were meant, or refused.

Not here: colour management (ICC profiles and gamma are ignored), 16-bit *colour*
(Pillow keeps the high byte; 16-bit gray is exact), and damage without a trace: JPEG, GIF and BMP
have no checksum, and only a cut is seen in them.

C channels, H height, W width.

    python -c "from support.images import *; print(prepare(Image.new('L', (9, 5), 7), 4, 3).shape)"
"""
import math
import struct
import zlib

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin

ASPECT = 8  # images longer than this are cropped before resizing, too
# By itself, Pillow takes the planes of an uncompressed TIFF for 8 bits, whatever they have, and
# makes garbage of them; by libtiff, as all that is compressed, it reads them rightly.
TiffImagePlugin.READ_LIBTIFF = True


def refuse(image):
    """ValueError: what Pillow reads silently, but not as it is meant. Before loading only."""
    if image.format == "TIFF":
        bits, white, kind = (image.tag_v2.get(tag, 1) for tag in (258, 262, 339))
        if (image.mode.startswith("I;16") and (white == 0 or set(bits) != {16})
                or image.mode == "L" and tuple(np.atleast_1d(kind)) == (2,)):
            raise ValueError("a TIFF of 12 bits, of 16 with 0 for white, or of signed bytes: "
                             "convert it to plain 8 or 16 bits first")
        tile = image.tag_v2.get(322, 1) * image.tag_v2.get(323, 1)
        if tile > max(2**22, 4 * math.prod(image.size)):  # libtiff would ask for all that memory
            raise ValueError("a TIFF whose tiles are far larger than its picture")
        if image.mode in ("LA", "La", "PA") and image.tag_v2.get(284) == 2:
            raise ValueError("a TIFF with gray and alpha in two planes: save it without planes")
        if image.mode == "P" and 0 < max(image.tag_v2[320]) < 256:  # shown as black
            raise ValueError("a TIFF whose palette has 8 bits instead of 16: save it as RGB")
    if image.format == "BMP" and image.tile:
        image.fp.seek(0)
        head = image.fp.read(70)
        kind, bits = head[14], head[24 if head[14] == 12 else 28]
        # A palette of grays makes Pillow take the pixels for 1 or 8 bits, whatever they have.
        if bits != {"1": 1, "L": 8}.get(image.mode, bits):
            raise ValueError(f"a BMP of {bits} bits with a gray palette: save it with 24 bits")
        if bits == 16 and kind >= 56 and image.info["compression"] == 3 and any(head[66:70]):
            raise ValueError("a BMP of 16 bits with alpha: save it with 32 bits")


def transparent_level(image):
    """The one level of a gray PNG that is transparent, or None. Before loading only."""
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
    frame counts. ValueError: a mode whose range is unknown (floats, 32-bit integers), colours that
    alpha hides everywhere, and all that `refuse` names.
    """
    source_format = image.format  # lost by every operation below
    refuse(image)
    level = transparent_level(image)
    try:  # before EXIF: by loading, Pillow turns a TIFF itself (some versions need this)
        image.load()
    except OSError as error:  # libtiff's are numbers
        if "decoder error" not in str(error):
            raise
        raise ValueError(f"the file ends early or is damaged ({error})") from error
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
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        *colours, alpha = image.getextrema()
        if alpha == (0, 0) and source_format == "BMP":
            # The fourth byte of a BMP is often unused, whatever its masks say; browsers, too, show
            # such a picture, and not an empty one.
            image.putalpha(255)
        elif alpha == (0, 0) and any(low < high for low, high in colours):
            # Either alpha is unused, or the picture is empty: the file does not say which. White
            # would be learnt. An empty sprite, which hides only one colour, does become white.
            raise ValueError("alpha is 0 everywhere, and hides colours: remove the alpha channel")
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


def grid(images, columns):
    """uint8 images (N, C, H, W), row by row -> one PIL image; empty places are white."""
    n, c, h, w = images.shape
    sheet = torch.full((-(-n // columns), columns, c, h, w), 255, dtype=torch.uint8)
    sheet.flatten(0, 1)[:n] = images.cpu()
    pixels = sheet.permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)  # (rows H, columns W, C)
    return Image.fromarray(pixels.squeeze(2).numpy() if c == 1 else pixels.numpy())


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
         (0, 1, 1, 2))  # interlaced PNG: first x, first y and steps of its seven passes


def chunks(content):
    """(name, start, length of its data) of each chunk of a PNG, as far as there are any."""
    at = 8
    while at + 8 <= len(content):
        length = int.from_bytes(content[at:at + 4], "big")
        yield content[at + 4:at + 8], at, length
        at += 12 + length


# Where Pillow finds how a picture is turned. All other text may go.
EXIF_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def bare_png(content):
    """`content`; of a PNG, only the chunks that matter to its (first) picture.

    Pillow unpacks text and profiles, which are of no use here, and to be safe from bombs refuses
    all of a file that has over 1 MB of them; image generators write such.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    kept = [content[:8]]
    for name, at, length in chunks(content):
        optional = name.isalpha() and name[0] & 32  # a small first letter
        if (not optional or name in (b"tRNS", b"eXIf")
                or content.startswith(EXIF_TEXTS, at + 8)):
            kept.append(content[at:at + 12 + length])
    return b"".join(kept)


def missing_pixels(content):
    """How many bytes of pixels the PNG `content` lacks; Pillow would leave them black, and mute."""
    if content[12:16] != b"IHDR":  # Apple's own kind, for example
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
        while rest and need > 0 and not inflate.eof:  # in pieces: it may be a bomb
            need -= len(inflate.decompress(rest, 2**20))
            rest = inflate.unconsumed_tail
    return max(0, need - len(inflate.flush())) if need > 0 else 0
