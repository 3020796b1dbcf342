"""What the first bytes of an image file say of it, before anything is decoded."""

import struct
from typing import NamedTuple

from trainer.errors import BadRecord

# As many as are decoded at most, 400 MB as RGB: a file of a few bytes can announce any number.
MAX_PIXELS = 2**27

# What users take for one of the formats read here.
_OTHERS = {
    (0, b'RIFF'): 'a WebP image',
    (4, b'ftypavif'): 'an AVIF image',
    (4, b'ftyp'): 'a HEIC image or a video',
    (0, b'II*\0'): 'a TIFF image',
    (0, b'MM\0*'): 'a TIFF image',
    (0, b'<svg'): 'an SVG image',
    (0, b'<'): 'a text of HTML or XML',
}
# Markers of JPEG: those that begin a frame, and those without a length of their own.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_BARE = frozenset([0x01, *range(0xD0, 0xD9)])
_APP1, _EXIF, _ORIENTATION, _SHORT = 0xE1, b'Exif\0\0', 0x0112, 3


class Header(NamedTuple):
    """What an image file says of itself.

    Attributes:
        kind: 'jpeg', 'png', 'gif' or 'bmp', by its contents whatever its name.
        rows, columns: as stored, before `orientation` is applied.
        orientation: the EXIF orientation of a JPEG, 1 to 8; 1 is upright.
        cmyk: whether it is a JPEG of four colours.
    """

    kind: str
    rows: int
    columns: int
    orientation: int = 1
    cmyk: bool = False


def header(content: bytes) -> Header:
    """Reads the header of an image file.

    Args:
        content: the file, or so much of its beginning that its header is in it.

    Raises:
        BadRecord: it is of none of the formats read here, its header is cut off, or it announces
            more than `MAX_PIXELS`.
    """
    try:
        found = _header(content)
    except (struct.error, IndexError):
        raise BadRecord(f'the file ends within its header, after {len(content)} bytes') from None
    _check_size(found.rows, found.columns)
    return found


def _check_size(rows: int, columns: int) -> None:
    if min(rows, columns) < 1 or rows * columns > MAX_PIXELS:
        raise BadRecord(
            f'the file announces {columns} x {rows} pixels; there must be some, and at most '
            f'{MAX_PIXELS} are decoded. If the file is sound, shrink it.'
        )


def _header(content: bytes) -> Header:
    if content.startswith(b'\xff\xd8\xff'):
        return _jpeg(content)
    if content.startswith(b'\x89PNG\r\n\x1a\n'):
        columns, rows = struct.unpack_from('>II', content, 16)
        return Header('png', rows, columns)
    if content.startswith((b'GIF87a', b'GIF89a')):
        _, columns, rows, _ = _gif_frame(content)
        return Header('gif', rows, columns)
    if content.startswith(b'BM'):
        return _bmp(content)
    if not content:
        raise BadRecord('the file is empty')
    found = [what for (first, sign), what in _OTHERS.items() if content.startswith(sign, first)]
    what = [*found, f'something that begins with the bytes {content[:8].hex(" ")}'][0]
    raise BadRecord(f'the file is {what}, and no JPEG, PNG, GIF or BMP image')


def first_frame(content: bytes) -> bytes:
    """Returns a GIF with nothing but its first frame, at the place where its screen begins.

    The decoder would decompress all frames, and cut off what lies beyond the size of this one.

    Args:
        content: a GIF that has a `header`.
    """
    position, _, _, flags = _gif_frame(content)
    end = _after_parts(content, position + 11 + _colours(flags))
    return content[: position + 1] + bytes(4) + content[position + 5 : end] + b';'


def _gif_frame(content: bytes) -> tuple[int, int, int, int]:
    """Returns position, columns, rows and flags of the first frame (GIF89a, section 20).

    Its size is that of the image: that of the screen, which it is a part of, may be any other.
    """
    position = 13 + _colours(content[10])
    while True:
        block = content[position : position + 1]
        if block == b'!':  # An extension: its label, then parts of up to 255 bytes.
            position = _after_parts(content, position + 2)
        elif block == b',':
            return position, *struct.unpack_from('<HHB', content, position + 5)
        else:
            raise BadRecord(f'the GIF ends before its first frame, at byte {position}')


def _colours(flags: int) -> int:
    """Returns how many bytes of colours follow a GIF's flags."""
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


def _after_parts(content: bytes, position: int) -> int:
    while position < len(content) and content[position]:
        position += 1 + content[position]
    return position + 1


def _bmp(content: bytes) -> Header:
    size, columns, rows, _, bits, compression = struct.unpack_from('<IiiHHI', content, 14)
    # Others TensorFlow takes for one of these: palettes of colours come out as shades of grey.
    grey = b''.join(bytes([shade] * 3 + [0]) for shade in range(256))
    plain = bits in (24, 32) or (bits == 8 and content[14 + size : 14 + size + 1024] == grey)
    if size < 40 or compression not in (0, 3) or not plain:
        raise BadRecord(
            f'the BMP has {bits} bits a pixel, or is compressed; only plain ones of 24 or 32 bits '
            'or 256 shades of grey are read. Convert it to PNG.'
        )
    return Header('bmp', abs(rows), columns)  # Negative rows: stored from the top.


def _jpeg(content: bytes) -> Header:
    """Walks the segments of a JPEG up to its frame (ITU T.81, annex B)."""
    position, orientation = 2, None
    while True:
        if content[position] != 0xFF:
            raise BadRecord(f'the JPEG header has no marker at byte {position}')
        marker = content[position + 1]
        if marker == 0xFF:  # Any number of these may come before a marker.
            position += 1
            continue
        position += 2
        if marker in _BARE:
            continue
        (length,) = struct.unpack_from('>H', content, position)
        if marker in _FRAMES:
            rows, columns, components = struct.unpack_from('>HHB', content, position + 3)
            return Header('jpeg', rows, columns, orientation or 1, components == 4)
        # XMP comes in segments with the same marker; of several with EXIF, the first is read.
        if marker == _APP1 and orientation is None and content.startswith(_EXIF, position + 2):
            orientation = _orientation(content[position + 2 + len(_EXIF) : position + length])
        position += length


def _orientation(tiff: bytes) -> int:
    """Returns the orientation that EXIF data give, 1 if they give none (CIPA DC-008)."""
    order = {b'II': '<', b'MM': '>'}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f'{order}I', tiff, 4)
        (count,) = struct.unpack_from(f'{order}H', tiff, first)
        for entry in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f'{order}HHIH', tiff, entry)
            if tag == _ORIENTATION and kind == _SHORT and 1 <= value <= 8:
                return value
    except struct.error:  # Damaged EXIF is no damage to the image.
        pass
    return 1
