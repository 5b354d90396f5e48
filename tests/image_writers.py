r"""Writers of images for tests: random ones, and odd TIFFs, BMPs and PNGs whose pixels are known.

Pillow writes neither planes, nor tiles, nor big-endian numbers, nor bit masks, nor interlaces.

    python -c "from image_writers import *; print(tiff(np.zeros((9, 9, 3), 'u1')))"
"""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image

Y, X = np.mgrid[:16, :16]
PICTURE = np.stack([X * 16, Y * 16, (X + Y) * 8], 2).astype(np.uint8)  # smooth: JPEG keeps it


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def hwc(tensor):
    return tensor.permute(1, 2, 0).numpy()


def encode(image, kind="PNG", **options):
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_folder(path, arrays):
    """A folder of one PNG per array, named in their order -> its path."""
    path.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{i:03}.png")
    return path


def folder_of(path, count=6, size=8):
    """A folder of `count` different colour PNGs -> their arrays, in the order of their names."""
    arrays = [pixels(size, size, 3, seed=i) for i in range(count)]
    write_folder(path, arrays)
    return arrays


def zip_of(folder):
    """A zip of a folder, next to it -> its path."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    return path


def idx(array, magic=0x803):
    """(N, H, W) -> the bytes of an IDX file."""
    return struct.pack(">4I", magic, *array.shape) + array.tobytes()


# What a viewer must do, written with NumPy, for the eight values of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}


# A batch as Python 2 wrote it: protocol 2, byte strings, numpy.core. Row 0 is 0 1 2 ... 255 0 ...
def cifar_pickle(rows):
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731
    head = b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n"
    head += b"cnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R(K\x01K" + bytes([len(rows)])
    head += b"M\0\x0c\x86cnumpy\ndtype\n" + text(b"u1") + b"K\0K\x01\x87R(K\x03"
    head += text(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\0tb\x89T"
    return head + struct.pack("<I", rows.size) + rows.tobytes() + b"tb" + text(b"labels") + b"]u."


def cifar_files(binary, rows, labels=None):
    """(name, content) of the five batches of two images: uint8 rows (10, 3072). Without labels, as
    Python 2 wrote them."""
    for i in range(5):
        part, y = rows[2 * i : 2 * i + 2], (labels or [7] * 10)[2 * i : 2 * i + 2]
        if binary:
            content = b"".join(bytes([k]) + row.tobytes() for k, row in zip(y, part, strict=True))
        elif labels or not i:
            content = pickle.dumps({b"data": part} | ({b"labels": y} if labels else {}))
        else:
            content = cifar_pickle(part)
        yield f"data_batch_{i + 1}" + ".bin" * binary, content


def tar_of(path, members, mode="w:gz"):
    """A tar of (name, content) or tarfile.TarInfo -> its path."""
    with tarfile.open(path, mode) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


# ------------------------------------------------------------------ TIFF, BMP, PNG


def tiff(
    pixels,
    white=None,
    extra=(),
    order="<",
    planar=False,
    compression=1,
    predictor=False,
    tile=False,
    bits=None,
    more=(),
):
    """uint8 or uint16 (H, W, samples) -> the bytes of a TIFF in strips of 7 rows, or 16x16 tiles.

    white: the photometric interpretation; extra: the kinds of the extra samples (0 unspecified, 1
    premultiplied alpha, 2 alpha); bits: of a sample, if `pixels` are bytes of several (in strips
    only); more: further tags (number, type, values); compression: 1 none, 8 deflate.
    """
    height, width, samples = pixels.shape
    if white is None:
        white = 2 if samples - len(extra) == 3 else 1
    pieces = []
    for plane in np.split(pixels, samples, axis=2) if planar else [pixels]:
        for y in range(0, height, 16 if tile else 7):
            for x in range(0, width, 16 if tile else width):
                piece = plane[y : y + 16, x : x + 16] if tile else plane[y : y + 7]
                if tile:
                    pad = [(0, 16 - piece.shape[0]), (0, 16 - piece.shape[1]), (0, 0)]
                    piece = np.pad(piece, pad)
                if predictor:  # differences along the row, modulo 2^bits
                    piece = np.diff(piece, axis=1, prepend=np.zeros_like(piece[:, :1]))
                raw = piece.astype(piece.dtype.newbyteorder(order)).tobytes()
                pieces.append(zlib.compress(raw) if compression == 8 else raw)
    start, offsets = 8, []
    for piece in pieces:
        offsets.append(start)
        start += len(piece) + len(piece) % 2
    depth = bits or 8 * pixels.dtype.itemsize
    width = width * 8 * pixels.dtype.itemsize // depth
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [depth] * samples)]
    tags += [(259, 3, [compression]), (262, 3, [white]), (277, 3, [samples])]
    tags += [(284, 3, [1 + planar]), (317, 3, [1 + predictor])]
    tags += [(338, 3, list(extra))] if extra else []
    tags += [(322, 4, [16]), (323, 4, [16])] if tile else [(278, 4, [7])]
    sizes = [len(piece) for piece in pieces]
    tags += [(324, 4, offsets), (325, 4, sizes)] if tile else [(273, 4, offsets), (279, 4, sizes)]
    table = struct.pack(order + "H", len(tags) + len(more))
    after = b""
    end = start + 2 + 12 * (len(tags) + len(more)) + 4
    for number, kind, values in sorted([*tags, *more]):
        value = struct.pack(f"{order}{len(values)}{'HI'[kind == 4]}", *values)
        if len(value) > 4:
            after, value = after + value, struct.pack(order + "I", end + len(after))
        table += struct.pack(order + "HHI", number, kind, len(values)) + value.ljust(4, b"\0")
    body = b"".join(piece + b"\0" * (len(piece) % 2) for piece in pieces)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, start)
    return head + body + table + b"\0\0\0\0" + after


def bmp(raw, width, height, bits, masks=(), palette=(), header=40, compression=0, colours=0):
    """The bytes of a BMP. raw: the rows, padded, as they lie in the file; a negative height is
    top-down. masks: of red, green, blue and, in a header of 56 bytes or more, alpha."""
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        numbers = (header, width, height, 1, bits, compression, len(raw), 0, 0, colours, 0, *masks)
        info = struct.pack(f"<IiiHHIIiiII{len(masks)}I", *numbers).ljust(header, b"\0")
    info += b"".join(bytes([b, g, r] + [0] * (header != 12)) for r, g, b in palette)
    start = 14 + len(info)
    return b"BM" + struct.pack("<IHHI", start + len(raw), 0, 0, start) + info + raw


def bmp_rows(levels, bits):
    """(H, W) integers of `bits` bits -> their rows, bottom-up, each padded to 4 bytes."""
    out = b""
    for row in levels[::-1].tolist():
        if bits < 8:
            text = "".join(f"{level:0{bits}b}" for level in row)
            row = int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(
                -(-len(text) // 8), "big"
            )
        else:
            row = b"".join(level.to_bytes(bits // 8, "little") for level in row)
        out += row.ljust(-(-len(row) // 4) * 4, b"\0")
    return out


# Which of the seven passes of an interlaced PNG has a pixel; the PNG specification, section 8.2.
PASSES = np.array(
    [[*map(int, row)] for row in "16462646 77777777 56565656 77777777 36463646".split()]
    + [[*map(int, row)] for row in "77777777 56565656 77777777".split()]
)


def png_rows(samples, depth, interlace=0):
    """(H, W, S) integers of `depth` bits -> the rows of a PNG, each after a filter byte of zero."""
    height, width, _ = samples.shape
    out = b""
    order = np.tile(PASSES, (-(-height // 8), -(-width // 8)))[:height, :width]
    for number in range(1, 8) if interlace else [0]:
        for row, where in zip(samples, order, strict=True):
            row = row[where == number] if interlace else row
            if row.size:
                text = "".join(f"{level:0{depth}b}" for level in row.reshape(-1).tolist())
                size = -(-len(text) // 8)
                out += b"\0" + int(text.ljust(8 * size, "0"), 2).to_bytes(size, "big")
    return out


def chunk(name, content):
    crc = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + crc


def png(width, height, depth, kind, raw, before=b"", interlace=0):
    """A PNG by hand: `raw` are the rows with their filter bytes, not yet compressed."""
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    body = chunk(b"IHDR", head) + before + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def rows(array):
    """Rows of a PNG, each after a filter byte of zero."""
    return b"".join(b"\0" + row.tobytes() for row in array)
