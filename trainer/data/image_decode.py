"""From the bytes of image files to images of one shape, as fast as libjpeg allows.

An image is shrunk by averaging over areas and enlarged bilinearly, each axis by itself: the
choice that OpenCV recommends, free of moire, and with TensorFlow's kernels less than half the work
of `antialias=True`. A JPEG far larger than needed is shrunk in part by libjpeg, which decodes it
at 1/2, 1/4 or 1/8 of its size in less time than whole.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from trainer.data import image_header
from trainer.data.image_header import Header
from trainer.errors import BadRecord

FITS = ('crop', 'pad', 'stretch')
Shape = tuple[int, int, int]

# libjpeg shrinks to no less than twice the wanted size, and averaging does the rest: with 12
# million pixels shrunk to 224 x 224, the result differs by 0.3 of 255 levels on average.
_RATIOS = (1, 2, 4, 8)
_MARGIN = 2
_OTHER = len(_RATIOS)  # Which branch decodes what is no JPEG.
PLAN_SIZE = 9


def plan(contents: Sequence[bytes], shape: Shape, fit: str) -> tuple[list[bytes], np.ndarray]:
    """Looks at the headers of image files and says how each is to be decoded.

    Args:
        contents: of the files.
        shape: rows, columns and channels of the images to be made.
        fit: one of `FITS`.

    Returns:
        What to decode of the contents, and int32 [B, PLAN_SIZE], both for `decode`.

    Raises:
        BadRecord: A file is none of the images that can be read, or too large.
    """
    contents = list(contents)
    plans = np.zeros([len(contents), PLAN_SIZE], np.int32)
    for number, content in enumerate(contents):
        header = image_header.header(content)
        plans[number, :-1] = _plan(header, shape, fit)
        if header.kind == 'gif':
            contents[number] = image_header.first_frame(content)
    return contents, plans


def has_whole_header(content: bytes) -> bool:
    """Whether so much of the beginning of a file is enough for `plan`."""
    with contextlib.suppress(BadRecord):
        return image_header.header(content).kind == 'jpeg'
    return False


def _plan(header: Header, shape: Shape, fit: str) -> list[int]:
    """Returns the branch, the window of the decoded image, the size it gets, the orientation."""
    wanted = shape[1::-1] if header.orientation >= 5 else shape[:2]
    stored = header.rows, header.columns
    branch = _OTHER
    if header.kind == 'jpeg' and not (header.cmyk and shape[2] == 1):
        window, size = _window(stored, wanted, fit)
        spare = min(w / s for w, s in zip(window, size, strict=True)) / _MARGIN
        branch = max(i for i, ratio in enumerate(_RATIOS) if ratio == 1 or ratio <= spare)
        stored = tuple(-(-n // _RATIOS[branch]) for n in stored)
    window, size = _window(stored, wanted, fit)
    first = [(n - w) // 2 for n, w in zip(stored, window, strict=True)]
    return [branch, *first, *window, *size, header.orientation]


def _window(stored: Sequence[int], wanted: Sequence[int], fit: str) -> tuple[list[int], list[int]]:
    """Returns which part is taken from the middle of an image, and the size it is brought to."""
    scales = [n / size for n, size in zip(stored, wanted, strict=True)]
    window, size = list(stored), list(wanted)
    if fit == 'crop':
        window = [max(1, round(n * min(scales))) for n in wanted]
    elif fit == 'pad':
        size = [max(1, round(n / max(scales))) for n in stored]
    return window, size


def decode(contents: tf.Tensor, plans: tf.Tensor, shape: Shape) -> tf.Tensor:
    """Decodes images and brings them to one shape.

    Args:
        contents: string [B], each a file or, if the last number of its plan is 1, the path of one.
        plans: int32 [B, PLAN_SIZE]. Both are from `plan`.
        shape: rows, columns and channels of the images.

    Returns:
        uint8 [B, rows, columns, channels].
    """
    spec = tf.TensorSpec(shape, tf.uint8)

    def usual() -> tf.Tensor:
        return tf.map_fn(
            lambda one: _shrunk_jpeg(*one, shape), (contents, plans), fn_output_signature=spec
        )

    def any_kind() -> tf.Tensor:
        return tf.map_fn(
            lambda one: _decode(*one, shape), (contents, plans), fn_output_signature=spec
        )

    # Each choice in the graph takes some microseconds for each image, of the 1.5 milliseconds that
    # a small one takes in all. Most batches need none.
    return tf.cond(_are_usual(plans, shape), usual, any_kind)


def _are_usual(plans: tf.Tensor, shape: Shape) -> tf.Tensor:
    """Whether all images are JPEG files decoded whole, and upright ones that are shrunk to fit."""
    whole = (plans[:, 0] == 0) & (plans[:, 7] == 1) & (plans[:, 8] == 0)
    fits = tf.reduce_all(plans[:, 5:7] == shape[:2], axis=1)
    shrinks = tf.reduce_all(plans[:, 3:5] >= shape[:2], axis=1)
    return tf.reduce_all(whole & fits & shrinks & tf.reduce_any(plans[:, 3:5] > shape[:2], axis=1))


def _shrunk_jpeg(content: tf.Tensor, plan: tf.Tensor, shape: Shape) -> tf.Tensor:
    image = tf.io.decode_jpeg(content, shape[2], dct_method='INTEGER_ACCURATE')
    window = tf.concat([plan[3:5], shape[2:]], 0)
    image = tf.slice(image, tf.concat([plan[1:3], [0]], 0), window)
    image = tf.raw_ops.ResizeArea(images=image[tf.newaxis], size=shape[:2])
    return tf.ensure_shape(_as_bytes(image), shape)


def _as_bytes(images: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(images[0]), tf.uint8)


def _decode(content: tf.Tensor, plan: tf.Tensor, shape: Shape) -> tf.Tensor:
    channels = shape[2]
    content = tf.cond(plan[8] == 1, lambda: tf.io.read_file(content), lambda: content)

    def jpeg(ratio: int) -> tf.Tensor:
        # The accurate transform is as fast as the other, and that of most other programs.
        return tf.io.decode_jpeg(content, channels, ratio, dct_method='INTEGER_ACCURATE')

    def other() -> tf.Tensor:
        return _with_channels(tf.io.decode_image(content, expand_animations=False), channels)

    branches = [*(lambda ratio=ratio: jpeg(ratio) for ratio in _RATIOS), other]
    image = tf.switch_case(plan[0], branches)
    window = tf.concat([plan[3:5], [channels]], 0)
    image = tf.slice(image, tf.concat([plan[1:3], [0]], 0), window)
    image = _resize(image, plan[3:5], plan[5:7])
    # Rarely needed, and each choice in the graph takes some microseconds.
    image = tf.cond(
        (plan[7] > 1) | tf.reduce_any(plan[5:7] != shape[:2]),
        lambda: _padded(_upright(image, plan[7]), shape),
        lambda: image,
    )
    return tf.ensure_shape(image, shape)


def _padded(image: tf.Tensor, shape: Shape) -> tf.Tensor:
    missing = shape[:2] - tf.shape(image)[:2]
    before = tf.concat([missing // 2, [0]], 0)
    after = tf.concat([missing - missing // 2, [0]], 0)
    return tf.pad(image, tf.stack([before, after], axis=1))


def _with_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    """Leaves out the transparency of an image, and makes it grey or coloured."""
    stored = tf.shape(image)[2]
    image = image[..., : stored - (1 - stored % 2)]
    if channels == 1:
        return tf.cond(
            stored > 2, lambda: tf.image.rgb_to_grayscale(image[..., :3]), lambda: image[..., :1]
        )
    return tf.broadcast_to(image, tf.concat([tf.shape(image)[:2], [channels]], 0))


def _resize(image: tf.Tensor, stored: tf.Tensor, size: tf.Tensor) -> tf.Tensor:
    smaller = tf.minimum(stored, size)

    def area() -> tf.Tensor:
        return tf.raw_ops.ResizeArea(images=image[tf.newaxis], size=smaller)

    # Nothing, shrinking, enlarging, or one along each axis.
    shrinks, grows = tf.reduce_any(stored > smaller), tf.reduce_any(size > smaller)
    return tf.switch_case(
        tf.cast(shrinks, tf.int32) + 2 * tf.cast(grows, tf.int32),
        [
            lambda: image,
            lambda: _as_bytes(area()),
            lambda: _as_bytes(tf.image.resize(image[tf.newaxis], size)),
            lambda: _as_bytes(tf.image.resize(area(), size)),
        ],
    )


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns an image as its EXIF orientation, 1 to 8, says."""
    turned = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    # 1 and 5 stay so, 2 and 6 are mirrored left to right, 4 and 8 top to bottom, 3 and 7 both.
    quarter = (orientation - 1) % 4
    mirrored = tf.stack([quarter >= 2, (quarter + 1) // 2 == 1, False])
    return tf.raw_ops.Reverse(tensor=turned, dims=mirrored)
