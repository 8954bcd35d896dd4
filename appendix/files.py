"""Reading and checking input files: images, and rows of JSON, JSONL or parquet.

Bad input ends in one line, a DataError: which file, which row, what was found, what was expected.
Most functions take `where`, the beginning of such a message: "file.jsonl, line 7: ".
"""
import functools
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# A screenshot of several screens is legitimate, a decompression bomb is not.
Image.MAX_IMAGE_PIXELS = 200_000_000
ORIENTATION = 0x0112            # EXIF: how a camera was held
SIDEWAYS = (5, 6, 7, 8)         # the values that swap width and height


class DataError(ValueError):
    """Bad input, in one line: which file, which row, what was expected."""


# --------------------------------------------------------------------------------------------------
# images

def open_image(source, where="", size_only=False, check=False):
    """A path, or the bytes of an image file -> RGB PIL image.

    size_only: return (width, height) instead, which stands in the head of the file.
    check: with size_only, decode the whole file too (a JPEG at an eighth of its size, which is
    fast). Raises DataError, which names the image and the row.
    """
    is_bytes = isinstance(source, bytes)
    name = "image" if is_bytes else f"image {source}"
    try:
        with Image.open(io.BytesIO(source) if is_bytes else source) as im:
            size = im.size
            if orientation(im) in SIDEWAYS:
                size = size[::-1]
            if check:
                im.draft("L", (im.width // 8, im.height // 8))
                im.load()
            if size_only:
                return size
            im.load()                       # a truncated file fails here, not during the run
            return as_rgb(ImageOps.exif_transpose(im))
    except FileNotFoundError:
        raise DataError(f"{where}{name} does not exist") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"{where}{name} cannot be read ({e}); "
                        "expected a whole PNG or JPEG file") from None


def orientation(im):
    """How the camera was held, as EXIF counts it; None if an opened image does not say.

    In a PNG that may stand behind the pixels, and PIL decodes them all to find it. So PIL is asked
    only if some part of the file may say it.
    """
    if im.format == "PNG":
        position = im.fp.tell()
        told = any(may_tell_orientation(kind, content) for kind, content in png_chunks(im.fp))
        im.fp.seek(position)
        if not told:
            return None
    return im.getexif().get(ORIENTATION)


def png_chunks(file):
    """(type, content) of each chunk of a PNG file; the content of those without text is b""."""
    file.seek(8)
    head = file.read(8)
    while len(head) == 8:
        length = int.from_bytes(head[:4], "big")
        kind = head[4:]
        content = file.read(length) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
        yield kind, content
        file.seek(length - len(content) + 4, os.SEEK_CUR)       # 4: the checksum
        head = file.read(8)


def may_tell_orientation(kind, content):
    """EXIF in its own chunk or as text, or XMP that is compressed or names it."""
    keyword, _, text = content.partition(b"\0")
    if keyword == b"XML:com.adobe.xmp":
        return text[:1] == b"\1" or b"tiff:Orientation" in text
    return kind == b"eXIf" or keyword == b"Raw profile type exif"


def as_rgb(im):
    """A PIL image of any mode -> RGB. Raises ValueError for numbers of an unknown range."""
    if im.mode in ("RGBA", "LA", "PA", "P"):
        im = on_white(im)
    elif im.mode == "F" or im.mode.startswith("I"):     # gray, as floats or long integers
        im = as_gray(im)
    return im.convert("RGB")


def as_gray(im):
    """Gray values of 0 to 1 (floats), 0 to 255 or 0 to 65,535 -> mode "L".

    16-bit files are 0 to 65,535, however dark they are.
    """
    values = np.asarray(im, dtype=np.float64)
    low, high = values.min(), values.max()
    if not 0 <= low <= high <= 65535:                   # nan, too
        raise ValueError(f"its gray values go from {low:g} to {high:g}, beyond 0 to 65535")
    most = 255.0
    if im.mode.startswith("I") or high > 255:
        most = 65535.0
    elif high <= 1:
        most = 1.0
    return Image.fromarray((values / most * 255).round().astype(np.uint8))


def on_white(im):
    """The image on a white ground, which shows where it is transparent, as on a screen."""
    im = im.convert("RGBA")
    ground = Image.new("RGBA", im.size, "white")
    return Image.alpha_composite(ground, im)


class LazyImage:
    """Stands for a PIL image that is made when something asks for its pixels.

    A toy scene for a 3B model has 1792 pixels a side, 10 MB, and a warm start holds 1,200 of them.
    Only the pixels of the scenes that were used last are kept.

    size: (width, height). make: a function without arguments -> PIL image.
    """

    def __init__(self, size, make):
        self.size = size
        self.width, self.height = size
        self.make = make

    def __getattr__(self, name):                # crop, resize, save, tobytes, ...
        if name.startswith("__"):               # copy and pickle ask for these
            raise AttributeError(name)
        return getattr(made(self), name)


@functools.lru_cache(maxsize=32)
def made(lazy):
    return lazy.make()


IN_MEMORY = (Image.Image, LazyImage)            # as opposed to a path or the bytes of a file


def sample_image(sample, i):
    """Prompt image number i of a sample -> RGB PIL image. An image in memory stays as it is."""
    source = sample.images[i]
    if isinstance(source, IN_MEMORY):
        return source
    return open_image(source, f"sample {sample.id}: ")


def digest(sample):
    """A short text that differs between samples of other images, words, options or right answers.

    What is kept of an earlier run is found by it, because two files may share their ids.
    """
    h = hashlib.blake2b(digest_size=12)
    words = [sample.question, sample.options, sample.answer, sample.targets]
    h.update(json.dumps(words).encode())
    for source in sample.images:
        if isinstance(source, str):
            with open(source, "rb") as f:
                source = f.read()
        h.update(source if isinstance(source, bytes) else source.tobytes())
    return h.hexdigest()


def check_images(samples):
    """Read every image of the samples once -> {path or bytes: (width, height)}.

    Called before any work starts: a broken image in the last row must not end a run in the middle.
    Images that are PIL images already are left out. Raises DataError.
    """
    first_use = {}                          # image: the beginning of a message about it
    for s in samples:
        for source in s.images:
            if not isinstance(source, IN_MEMORY):
                first_use.setdefault(source, f"sample {s.id}: ")

    def read_size(item):
        source, where = item
        return open_image(source, where, size_only=True, check=True)

    with ThreadPoolExecutor() as pool:
        sizes = pool.map(read_size, first_use.items())
        sizes = tqdm(sizes, "images", len(first_use), disable=None, leave=False)
        return dict(zip(first_use, sizes))


# --------------------------------------------------------------------------------------------------
# rows

def read_rows(path):
    """A .jsonl, .json or .parquet file -> [(where, row)].

    `where` names file and line, for messages. A .json file holds a list of rows, an object whose
    "rows" is that list, or one row. A parquet file needs pyarrow. Raises DataError.
    """
    try:
        if str(path).endswith(".parquet"):
            return parquet_rows(path)
        if str(path).endswith(".json"):
            return json_rows(path)
        return jsonl_rows(path)
    except DataError:                       # it is a ValueError, but has its message already
        raise
    except (OSError, ValueError, NotImplementedError) as e:     # not there, not text, not parquet
        raise DataError(f"cannot read {path}: {e}") from None


def parquet_rows(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} is a parquet file; to read it: pip install pyarrow") from None
    rows = []
    with pyarrow.parquet.ParquetFile(path) as f:
        for batch in f.iter_batches(100):
            rows += batch.to_pylist()
    return [(f"{path}, row {i}: ", row) for i, row in enumerate(rows, 1)]


def json_rows(path):
    try:
        with open(path, encoding="utf-8-sig") as f:     # with or without a byte order mark
            rows = json.load(f)
    except json.JSONDecodeError as e:
        raise DataError(f"{path}: not JSON ({e.msg} at line {e.lineno})") from None
    if isinstance(rows, dict):
        rows = rows.get("rows", [rows])
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds {rows!r:.60}; expected a list of rows")
    return [(f"{path}, record {i}: ", row) for i, row in enumerate(rows, 1)]


def jsonl_rows(path):
    rows = []
    with open(path, encoding="utf-8-sig") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            where = f"{path}, line {n}: "
            try:
                rows.append((where, json.loads(line)))
            except json.JSONDecodeError as e:
                raise DataError(f"{where}not JSON ({e.msg} at column {e.colno}); "
                                "expected one object per line") from None
    return rows


# --------------------------------------------------------------------------------------------------
# fields of a row

def need(row, key, kind, where):
    """row[key], which must be of type `kind` (or of one of a tuple of types) and no bool."""
    value = row.get(key) if isinstance(row, dict) else None
    if isinstance(value, kind) and not isinstance(value, bool):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(k.__name__ for k in kinds)
    found = "missing" if value is None else f"{value!r:.60}"
    raise DataError(f"{where}field {key!r} is {found}; expected {expected}")


def need_numbers(value, n, where, name):
    """`value` as a list of n floats; it must be a list or tuple of n numbers, none of them huge."""
    if not is_numbers(value, n):
        raise DataError(f"{where}{name} is {value!r:.60}; expected {n} numbers")
    return [float(v) for v in value]


def is_numbers(value, n):
    if not isinstance(value, (list, tuple)) or len(value) != n:
        return False
    return all(type(v) in (int, float) and -1e9 < v < 1e9 for v in value)


# --------------------------------------------------------------------------------------------------
# output

def check_writable(path):
    """Raise DataError if a file could not be written at `path`. Folders may still be missing."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise DataError(f"cannot write {path}: {folder} is no folder that can be written into")
