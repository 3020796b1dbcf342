"""Opens and reads mutated data files; run as `fuzz.py DIRECTORY COUNT SEED`.

Whatever the file, there are three outcomes: it is refused when it is opened, a record of it is
found to be damaged, or all of it can be read. Anything else is raised, and a hang ends the process.
"""

import collections
import faulthandler
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from trainer.data.array_record import array_record
from trainer.data.bad_record_list import listing
from trainer.data.bad_records import fetch_good, find
from trainer.data.digits import digits
from trainer.data.image_folder import image_folder
from trainer.data.prepared import prepared
from trainer.data.source import Source
from trainer.data.table import table
from trainer.data.tfrecord import tfrecord
from trainer.errors import ConfigError

RECORDS = 6
_FEATURES = {'image': ('uint8', (8, 8, 1)), 'label': ('int64', ())}
_HANG_SECONDS = 120


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Returns the content with a few changes of the kinds that disks, copies and people make."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 50])):
        # Any order of magnitude: much of what says how a file is to be read lies at its beginning.
        place = int(len(content) ** rng.random()) - 1 if content else 0
        length = rng.choice([1, 1, 2, 4, 8, 64, 1024])
        kind = rng.randrange(7)
        if kind == 0:
            del content[place:]
        elif kind == 1:
            del content[place : place + length]
        elif kind == 2:
            content[place : place + length] = bytes(len(content[place : place + length]))
        elif kind == 3:
            content[place:place] = rng.randbytes(length)
        elif kind == 4:
            content[place : place + length] = content[:length]
        elif kind == 5 and content:
            content[place] ^= 1 << rng.randrange(8)
        else:
            content[place : place + length] = (
                rng.choice([b'\xff', b'\x00', b'\x7f', b'\n"']) * length
            )
    return bytes(content)


def write_samples(directory: Path) -> dict[str, Path]:
    """Writes one good data set of each kind; returns the file of each that will be mutated."""
    from array_record.python.array_record_module import ArrayRecordWriter

    images = digits('test').fetch(tf.range(RECORDS, dtype=tf.int64))
    records = []
    for image, label in zip(images['image'].numpy(), images['label'].numpy(), strict=True):
        feature = {
            'image': tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
            'label': tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        }
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        records.append(example.SerializeToString())
    files = {
        'tfrecord': directory / 'tfrecord' / 'x.tfrecord',
        'array_record': directory / 'array_record' / 'x.array_record',
        'jpg': directory / 'jpg' / 'a' / '0.jpg',
        'png': directory / 'png' / 'a' / '0.png',
        'gif': directory / 'gif' / 'a' / '0.gif',
        'bmp': directory / 'bmp' / 'a' / '0.bmp',
        'csv': directory / 'csv' / 'x.csv',
        'parquet': directory / 'parquet' / 'x.parquet',
        'prepared': directory / 'prepared' / 'dataset.json',
    }
    for file in files.values():
        file.parent.mkdir(parents=True)
    with tf.io.TFRecordWriter(str(files['tfrecord'])) as writer:
        for record in records:
            writer.write(record)
    writer = ArrayRecordWriter(str(files['array_record']), 'group_size:1')
    for record in records:
        writer.write(record)
    writer.close()
    smooth = tf.image.resize(images['image'].numpy().repeat(3, -1) * 15, [40, 60])
    smooth = tf.cast(smooth, tf.uint8).numpy()
    encoders = {'jpg': tf.io.encode_jpeg, 'png': tf.io.encode_png}
    for kind in ('jpg', 'png', 'gif', 'bmp'):
        for number, image in enumerate(smooth):
            folder = files[kind].parents[1] / 'ab'[number % 2]
            folder.mkdir(exist_ok=True)
            content = encoders[kind](image).numpy() if kind in encoders else _FORMATS[kind](image)
            (folder / f'{number}.{kind}').write_bytes(content)
    penguins = Path(sys.modules[table.__module__].__file__).with_name('penguins.csv')
    files['csv'].write_text('\n'.join(penguins.read_text().splitlines()[:30]) + '\n')
    import pyarrow.csv
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.csv.read_csv(files['csv']), files['parquet'])
    # `phalanx prepare` in a process of its own, as it forks.
    directory = files['prepared'].parent
    command = [sys.executable, '-m', 'launch', 'prepare', directory, '--gin_file=data/digits.gin']
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return files


def _bmp(image: np.ndarray) -> bytes:
    rows, columns, _ = image.shape
    size = 54 + rows * columns * 3
    header = b'BM' + size.to_bytes(4, 'little') + bytes(4) + (54).to_bytes(4, 'little')
    header += (40).to_bytes(4, 'little') + columns.to_bytes(4, 'little')
    header += rows.to_bytes(4, 'little') + (1).to_bytes(2, 'little') + (24).to_bytes(2, 'little')
    return header.ljust(54, b'\x00') + image[::-1, :, ::-1].tobytes()


def _gif(image: np.ndarray) -> bytes:
    """A grey GIF whose codes are all literal: a clear code before the table would grow."""
    rows, columns, _ = image.shape
    size = columns.to_bytes(2, 'little') + rows.to_bytes(2, 'little')
    palette = bytes(value for grey in range(128) for value in (2 * grey,) * 3)
    bits, count = 0, 0
    for number, pixel in enumerate(image[..., 0].ravel() // 2):
        for code in ([128] if number % 100 == 0 else []) + [int(pixel)]:
            bits |= code << count
            count += 8
    bits |= 129 << count
    codes = bits.to_bytes((count + 15) // 8, 'little')
    blocks = [codes[i : i + 255] for i in range(0, len(codes), 255)]
    data = b''.join(bytes([len(block)]) + block for block in blocks) + b'\x00'
    return (
        b'GIF89a'
        + size
        + b'\xf6\x00\x00'
        + palette
        + b','
        + bytes(4)
        + size
        + b'\x00'
        + b'\x07'
        + data
        + b';'
    )


_FORMATS = {'bmp': _bmp, 'gif': _gif}


def outcome(kind: str, file: Path) -> str:
    """Opens a data set and reads all of it: 'refused', 'damaged' or 'read'."""
    try:
        if kind == 'tfrecord':
            source = tfrecord(str(file), _FEATURES)
        elif kind == 'array_record':
            source = array_record(str(file), _FEATURES)
        elif kind == 'prepared':
            source = prepared(str(file.parent))
        elif kind in ('csv', 'parquet'):
            source = table(files=str(file), label='species')
        else:
            source = image_folder(str(file.parents[1]), shape=(16, 16, 3))
        _ = source.fingerprint
    except ConfigError:
        return 'refused'
    batches = np.array_split(np.arange(source.num_examples), 1 + source.num_examples // 16)
    damage = find(source, batches, 'label')
    # `find` names a record whatever the error. Only errors that stand for damage are skipped.
    listing.leave_to_others()
    skip = tf.function(
        lambda ids: fetch_good(source, ids, 'label')[1],
        input_signature=[tf.TensorSpec([None], tf.int64)],
    )
    skipped = [record for ids in batches for record in ids[~skip(tf.constant(ids)).numpy()]]
    assert skipped[:1] == ([] if damage is None else [damage.record]), skipped
    if damage is None:
        if kind in ('tfrecord', 'array_record'):
            _check_contents(kind, source)
        return 'read'
    assert damage.where
    assert damage.reason
    return 'damaged'


def _check_contents(kind: str, source: Source) -> None:
    """Raises AssertionError if a format with checksums has let something else pass."""
    count = source.num_examples
    found = source.fetch(tf.range(count, dtype=tf.int64))
    good = digits('test').fetch(tf.range(RECORDS, dtype=tf.int64))
    if kind == 'tfrecord':
        # Such a file is a row of records, each with a checksum of its own: whole ones that are
        # missing at the end, or that came there twice, are none that could be told.
        images = good['image'].numpy().tolist()
        which = [images.index(image) for image in found['image'].numpy().tolist()]
    else:
        assert count == RECORDS, count
        which = range(RECORDS)
    for name, values in good.items():
        np.testing.assert_array_equal(found[name], values.numpy()[which])


def main() -> None:
    directory, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    files = write_samples(directory / 'good')
    rng, outcomes = random.Random(seed), collections.defaultdict(collections.Counter)
    for kind, file in files.items():
        assert outcome(kind, file) == 'read', kind
    for number in range(count):
        kind = sorted(files)[number % len(files)]
        scratch = directory / 'mutated'
        good = directory / 'good' / kind
        shutil.copytree(good, scratch, ignore=shutil.ignore_patterns('.phalanx'))
        file = scratch / files[kind].relative_to(good)
        file.write_bytes(mutate(file.read_bytes(), rng))
        faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
        print(f'number {number}, {kind}', file=sys.stderr, flush=True)
        outcomes[kind][outcome(kind, file)] += 1
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(scratch)
    print(json.dumps(outcomes))


if __name__ == '__main__':
    main()
