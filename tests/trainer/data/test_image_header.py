import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from trainer.data import image_header
from trainer.data.image_header import Header, header
from trainer.errors import BadRecord

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


GIF = encoded(IMAGE.convert('P'), 'GIF')
GIF_FRAME = GIF.index(b',', 13 + 3 * 256)


def turned(orientation, **options):
    exif = Image.Exif()
    exif[0x010F] = 'A camera of some name'
    exif[0x0112] = orientation
    return encoded(IMAGE, 'JPEG', exif=exif, **options)


@pytest.mark.parametrize(
    ('content', 'found'),
    [
        (encoded(IMAGE, 'JPEG'), Header('jpeg', 20, 30)),
        (encoded(IMAGE, 'JPEG', progressive=True), Header('jpeg', 20, 30)),
        (encoded(IMAGE.convert('L'), 'JPEG'), Header('jpeg', 20, 30)),
        (encoded(IMAGE.convert('CMYK'), 'JPEG'), Header('jpeg', 20, 30, cmyk=True)),
        (encoded(IMAGE, 'JPEG', icc_profile=bytes(200_000)), Header('jpeg', 20, 30)),
        (encoded(IMAGE, 'PNG'), Header('png', 20, 30)),
        (encoded(IMAGE, 'GIF'), Header('gif', 20, 30)),
        (encoded(IMAGE, 'BMP'), Header('bmp', 20, 30)),
        (encoded(IMAGE.convert('L'), 'BMP'), Header('bmp', 20, 30)),
    ],
)
def test_kind_and_size_are_read(content, found):
    assert header(content) == found


@pytest.mark.parametrize('orientation', range(1, 9))
def test_the_orientation_of_a_photograph_is_read(orientation):
    assert header(turned(orientation)).orientation == orientation


def test_the_orientation_is_read_in_either_byte_order():
    for mark, order in ((b'II*\0', '<'), (b'MM\0*', '>')):
        entries = struct.pack(f'{order}IHHHIHH', 8, 1, 0x0112, 3, 1, 6, 0)
        segment = b'Exif\0\0' + mark + entries
        content = b'\xff\xd8\xff\xe1' + struct.pack('>H', len(segment) + 2) + segment
        assert header(content + encoded(IMAGE, 'JPEG')[2:]).orientation == 6


def test_damaged_exif_is_no_damage_to_the_image():
    content = turned(6)
    start = content.index(b'Exif\0\0') + 6
    for damage in (b'XX', b'MM\0*\xff\xff\xff\xff'):
        broken = content[:start] + damage + content[start + len(damage) :]
        assert header(broken) == Header('jpeg', 20, 30)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html>', 'HTML'),
        (b'RIFF\x24\0\0\0WEBPVP8 ', 'a WebP image'),
        (b'\0\0\0\x18ftypheic\0\0', 'a HEIC image'),
        (b'hello, world', 'begins with the bytes 68 65 6c 6c 6f 2c 20 77, and no JPEG'),
        (encoded(IMAGE, 'PNG')[:20], 'ends within its header, after 20 bytes'),
        (encoded(IMAGE, 'JPEG')[:100], 'ends within its header, after 100 bytes'),
        (b'\xff\xd8\xff\xe0\0\x04abcdefgh', 'no marker at byte 8'),
        (encoded(IMAGE.convert('P'), 'BMP'), '8 bits a pixel.*Convert it to PNG'),
        (encoded(IMAGE.convert('1'), 'BMP'), '1 bits a pixel'),
    ],
)
def test_what_cannot_be_decoded_is_refused_with_a_reason(content, reason):
    with pytest.raises(BadRecord, match=reason):
        header(content)


def png_of(columns, rows):
    def chunk(kind, data):
        return (
            struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
        )

    size = struct.pack('>IIBBBBB', columns, rows, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', size) + chunk(b'IDAT', zlib.compress(bytes(999)))


def with_size(content, at, layout, rows, columns):
    return (
        content[:at] + struct.pack(layout, rows, columns) + content[at + struct.calcsize(layout) :]
    )


@pytest.mark.parametrize(
    'content',
    [
        png_of(100_000, 100_000),
        with_size(
            encoded(IMAGE, 'JPEG'),
            encoded(IMAGE, 'JPEG').index(b'\xff\xc0') + 5,
            '>HH',
            65_000,
            65_000,
        ),
        with_size(GIF, GIF_FRAME + 5, '<HH', 65_000, 65_000),
        with_size(encoded(IMAGE, 'BMP'), 18, '<ii', 1_000_000, -65_000),
        png_of(0, 100),
    ],
    ids=['png', 'jpeg', 'gif', 'bmp', 'nothing'],
)
def test_a_size_that_nothing_could_hold_is_refused(content):
    with pytest.raises(BadRecord, match=r'announces .* pixels'):
        header(content)


def test_of_an_animation_the_first_frame_alone_is_kept():
    frames = [Image.fromarray(PIXELS // (n + 1)).convert('P') for n in range(5)]
    content = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    first = image_header.first_frame(content)
    assert len(first) < len(content) / 2
    kept = Image.open(io.BytesIO(first))
    assert kept.n_frames == 1
    np.testing.assert_array_equal(kept.convert('RGB'), frames[0].convert('RGB'))


def test_the_size_of_a_gif_is_that_of_its_first_frame():
    for screen in ((40, 25), (9, 9), (65_000, 65_000)):
        assert header(with_size(GIF, 6, '<HH', *screen)) == Header('gif', 20, 30)


@pytest.mark.parametrize('length', [6, 10, 11, 12, GIF_FRAME, GIF_FRAME + 1, GIF_FRAME + 9])
def test_a_gif_cut_off_before_its_first_frame_is_refused(length):
    with pytest.raises(BadRecord, match=r'ends (before its first frame|within its header)'):
        header(GIF[:length])
