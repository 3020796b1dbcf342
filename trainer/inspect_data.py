"""What is in a source: the numbers, the damage, and pictures of some examples."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from trainer.data import statistics
from trainer.data.bad_record_list import Damage
from trainer.data.scan import Scan
from trainer.data.source import Source
from trainer.errors import WriteError
from trainer.observe import chart

# A source is looked at in this many parts at most, each by one thread.
_PARTS = 1000


class Findings(NamedTuple):
    """What was found in records.

    Attributes:
        read: how many were looked at, damaged ones too.
        numbers: the statistics of each numeric feature.
        bad: the damaged ones.
    """

    read: int
    numbers: dict[str, statistics.Numbers]
    bad: list[Damage]


def survey(
    source: Source, records: np.ndarray, *, threads: int, progress: Callable[[int], None]
) -> Findings:
    """Reads records, damaged ones too.

    Args:
        source: of the records.
        records: int64 [N], their numbers, ascending.
        threads: how many parts are read at the same time.
        progress: is told how many more have been read, by several threads.

    Raises:
        OSError: the files cannot be reached.
    """
    scan = Scan(source)

    def part(records: np.ndarray) -> Findings:
        total = Findings(0, {}, [])
        for start in range(0, len(records), scan.batch_size):
            batch = scan.read(records[start : start + scan.batch_size])
            numbers = statistics.of_features(batch.features) if len(batch.records) else {}
            read = len(batch.records) + len(batch.bad)
            total = _joined(total, Findings(read, numbers, batch.bad))
            progress(read)
        return total

    parts = -(-len(records) // scan.batch_size)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(part, np.array_split(records, max(1, min(parts, _PARTS)))))
    total = Findings(0, {}, [])
    for each in found:
        total = _joined(total, each)
    return total


def image_of(source: Source) -> str | None:
    """Returns the first feature that is an image, by its shape; None if there is none."""
    for name, spec in source.element_spec.items():
        shape = spec.shape.as_list()
        if (
            spec.dtype != tf.string
            and len(shape) == 3
            and shape[2] in (1, 3, 4)
            and min(shape[:2]) > 1
        ):
            return name
    return None


def as_pictures(images: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
    """Returns images [B, H, W, C] of any numbers as uint8.

    Args:
        images: what is shown; NaN is black.
        bounds: the numbers that are black and white.
    """
    low, high = bounds
    scaled = (images.astype(np.float64) - low) / max(high - low, 1e-12)
    return np.round(255 * np.clip(np.nan_to_num(scaled), 0.0, 1.0)).astype(np.uint8)


def save_sheet(path: Path, pictures: np.ndarray, captions: Sequence[str]) -> None:
    """Writes pictures, uint8 [B, H, W, C], with a caption each, as one PNG.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    figure = chart.blank(path, 1.2 * columns, 1.4 * rows)
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in all_axes:
        axes.set_axis_off()
    for axes, picture, caption in zip(all_axes, pictures, captions, strict=False):
        axes.imshow(picture.squeeze(), cmap='gray', vmin=0, vmax=255)
        axes.set_title(caption, fontsize=9)
    chart.save(figure, path)


def to_tensorboard(directory: Path, split: str, pictures: np.ndarray, tags: Sequence[str]) -> None:
    """Writes pictures, uint8 [B, H, W, C], for TensorBoard, each under its tag.

    Raises:
        WriteError: the directory cannot be written.
    """
    try:
        writer = tf.summary.create_file_writer(str(directory / split))
        with writer.as_default(step=0):
            for picture, tag in zip(pictures, tags, strict=True):
                tf.summary.image(tag, picture[np.newaxis])
        writer.close()
    except tf.errors.OpError as error:
        raise WriteError(f'--tensorboard={directory} cannot be written: {error.message}') from error


def _joined(first: Findings, second: Findings) -> Findings:
    return Findings(
        first.read + second.read,
        statistics.together(first.numbers, second.numbers),
        first.bad + second.bad,
    )
