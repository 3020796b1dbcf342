import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from trainer.data import image_decode
from trainer.data.image_header import Header

RANDOM = np.random.default_rng(0)


def smooth(rows, columns):
    """Something like a photograph, without what JPEG would lose."""
    noise = Image.fromarray(RANDOM.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return noise.resize((columns, rows), Image.BICUBIC)


PHOTOGRAPH = smooth(40, 60)


def encoded(image, kind='PNG', **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(contents, shape, fit='stretch'):
    contents, plans = image_decode.plan(contents, shape, fit)
    return tf.function(image_decode.decode)(tf.constant(contents), plans, shape).numpy()


def decoded_one(content, shape, fit='stretch'):
    return decoded([content], shape, fit)[0].astype(int)


def averaged(image, rows, columns, box=None):
    """The averages over areas of a part of an image, left, top, right, bottom."""
    left, top, right, bottom = box or (0, 0, image.width, image.height)
    down, across = (
        coverage(rows, top, bottom, image.height),
        coverage(columns, left, right, image.width),
    )
    return np.einsum('ri,cj,ijk->rck', down, across, np.asarray(image, float))


def coverage(count, first, end, size):
    """How much of each of `size` pixels lies in each of `count` equal parts of [first, end)."""
    edges = np.linspace(first, end, count + 1)
    inside = np.minimum(edges[1:, None], np.arange(size) + 1) - np.maximum(
        edges[:-1, None], np.arange(size)
    )
    return np.maximum(inside, 0) / ((end - first) / count)


@pytest.mark.parametrize('kind', ['PNG', 'BMP'])
def test_an_image_of_the_wanted_size_keeps_its_bits(kind):
    assert np.array_equal(decoded_one(encoded(PHOTOGRAPH, kind), (40, 60, 3)), PHOTOGRAPH)


def test_an_image_is_shrunk_by_averages_over_areas():
    for rows, columns in ((20, 30), (17, 23), (40, 13)):
        found = decoded_one(encoded(PHOTOGRAPH), (rows, columns, 3))
        assert np.abs(found - averaged(PHOTOGRAPH, rows, columns)).max() <= 1


def test_an_image_is_enlarged_bilinearly():
    found = decoded_one(encoded(PHOTOGRAPH), (80, 150, 3))
    wanted = np.asarray(PHOTOGRAPH.resize((150, 80), Image.BILINEAR)).astype(int)
    assert np.abs(found - wanted).max() <= 1


def test_an_image_can_shrink_along_one_axis_and_grow_along_the_other():
    found = decoded_one(encoded(PHOTOGRAPH), (10, 120, 3))
    narrow = PHOTOGRAPH.resize((60, 10), Image.BOX)
    wanted = np.asarray(narrow.resize((120, 10), Image.BILINEAR)).astype(int)
    assert np.abs(found - wanted).max() <= 2


def test_crop_takes_the_largest_part_from_the_middle():
    found = decoded_one(encoded(PHOTOGRAPH), (20, 20, 3), 'crop')
    assert np.abs(found - averaged(PHOTOGRAPH, 20, 20, (10, 0, 50, 40))).max() <= 1


def test_pad_fills_up_with_black_on_both_sides():
    found = decoded_one(encoded(PHOTOGRAPH), (31, 30, 3), 'pad')
    assert not found[:5].any()
    assert not found[25:].any()
    assert np.abs(found[5:25] - averaged(PHOTOGRAPH, 20, 30)).max() <= 1


@pytest.mark.parametrize('fit', image_decode.FITS)
def test_the_thinnest_image_fits_too(fit):
    for size in ((1, 500), (500, 1), (1, 1)):
        assert decoded_one(encoded(smooth(*size)), (8, 5, 3), fit).shape == (8, 5, 3)


@pytest.mark.parametrize('fit', image_decode.FITS)
@pytest.mark.parametrize('size', [(400, 640), (397, 603), (1201, 799)])
def test_a_large_jpeg_shrunk_while_decoded_looks_the_same(fit, size):
    content = encoded(smooth(*size), 'JPEG', quality=95)
    _, plans = image_decode.plan([content], (24, 32, 3), fit)
    assert plans[0, 0] >= 2  # A quarter of its size, or an eighth.
    whole = encoded(Image.open(io.BytesIO(content)))
    difference = decoded_one(content, (24, 32, 3), fit) - decoded_one(whole, (24, 32, 3), fit)
    # Windows of whole pixels, and a last one that is cut off and counts as whole, move the image
    # by less than half a pixel of the result; this one changes by 20 levels from one to the next.
    exact = size == (400, 640) and fit != 'crop'
    assert np.abs(difference).mean() < (1 if exact else 4)


def test_a_jpeg_is_never_decoded_smaller_than_twice_the_wanted_size():
    for rows, columns in RANDOM.integers(1, 3000, (200, 2)):
        header = Header('jpeg', int(rows), int(columns))
        for fit in image_decode.FITS:
            plan = image_decode._plan(header, (64, 48, 3), fit)
            branch, window, size = plan[0], plan[3:5], plan[5:7]
            assert branch == 0 or all(w >= 2 * s - 1 for w, s in zip(window, size, strict=True))


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
    ('mode', 'kind'),
    [
        *((mode, 'PNG') for mode in ('1', 'L', 'LA', 'P', 'RGB', 'RGBA')),
        *((mode, 'BMP') for mode in ('L', 'RGB', 'RGBA')),
        *((mode, 'GIF') for mode in ('L', 'P')),
        *((mode, 'JPEG') for mode in ('L', 'RGB', 'CMYK')),
    ],
)
def test_grey_and_coloured_images_of_all_kinds_are_brought_to_the_channels(mode, kind, channels):
    image = PHOTOGRAPH.convert(mode)
    content = encoded(image, kind, **({'quality': 98} if kind == 'JPEG' else {}))
    stored = Image.open(io.BytesIO(content))
    # By way of RGB, as what is transparent keeps its colour here.
    wanted = np.asarray(stored.convert('RGB').convert('L' if channels == 1 else 'RGB')).astype(int)
    found = decoded_one(content, (40, 60, channels))
    assert np.abs(found - wanted.reshape(found.shape)).max() <= (8 if kind == 'JPEG' else 1)


def test_of_16_bits_the_upper_8_are_taken():
    deep = RANDOM.integers(0, 2**16, (9, 9), dtype=np.uint16)
    found = decoded_one(encoded(Image.fromarray(deep)), (9, 9, 1))[..., 0]
    np.testing.assert_array_equal(found, deep >> 8)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [smooth(8, 8).convert('P') for _ in range(4)]
    content = encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded_one(content, (8, 8, 3)), frames[0].convert('RGB'))


@pytest.mark.parametrize('fit', image_decode.FITS)
def test_of_a_frame_that_is_not_its_screen_all_is_taken(fit):
    content = encoded(PHOTOGRAPH, 'GIF')
    frame = content.index(b',', 13 + 3 * 256)
    wanted = decoded_one(content, (20, 20, 3), fit)
    for screen, place in (((90, 50), (20, 5)), ((90, 50), (0, 0)), ((10, 10), (0, 0))):
        changed = bytearray(content)
        struct.pack_into('<HH', changed, 6, *screen)
        struct.pack_into('<HH', changed, frame + 1, *place)
        np.testing.assert_array_equal(decoded_one(bytes(changed), (20, 20, 3), fit), wanted)


@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(PHOTOGRAPH, 'JPEG', exif=exif, quality=95)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    found = decoded_one(content, (20, 30, 3))
    assert np.abs(found - averaged(upright, 20, 30)).max() <= 3
    left = (upright.width - 2 * upright.height) / 2  # Twice as wide as high, if it can be.
    if left > 0:
        return
    top = (upright.height - upright.width / 2) / 2
    found = decoded_one(content, (10, 20, 3), 'crop')
    box = (0, top, upright.width, upright.height - top)
    assert np.abs(found - averaged(upright, 10, 20, box)).max() <= 3


def test_an_orientation_is_kept_whatever_other_metadata_follow():
    def segment(data):
        return b'\xff\xe1' + (len(data) + 2).to_bytes(2, 'big') + data

    def exif(orientation):
        tags = Image.Exif()
        tags[0x0112] = orientation
        return segment(tags.tobytes())

    xmp = segment(b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"/>')
    plain = encoded(PHOTOGRAPH, 'JPEG', quality=95)
    for segments in ([exif(6), xmp], [xmp, exif(6)], [exif(6), xmp, xmp], [exif(6), exif(3)]):
        content = plain[:2] + b''.join(segments) + plain[2:]
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
        assert upright.size == (40, 60)
        found = decoded_one(content, (30, 20, 3))
        assert np.abs(found - averaged(upright, 30, 20)).max() <= 3


def test_images_of_many_sizes_and_kinds_are_decoded_in_one_batch():
    contents = [
        encoded(smooth(*size), kind)
        for kind in ('JPEG', 'PNG', 'GIF', 'BMP')
        for size in ((30, 40), (300, 20), (9, 90))
    ]
    batch = decoded(contents, (16, 12, 3), 'crop')
    for content, image in zip(contents, batch, strict=True):
        np.testing.assert_array_equal(image, decoded_one(content, (16, 12, 3), 'crop'))


@pytest.mark.parametrize('kind', ['JPEG', 'PNG', 'GIF', 'BMP'])
def test_a_file_cut_off_in_the_middle_is_refused(kind):
    content = encoded(smooth(300, 400), kind)
    with pytest.raises(tf.errors.InvalidArgumentError):
        decoded_one(content[: len(content) // 2], (16, 12, 3))
