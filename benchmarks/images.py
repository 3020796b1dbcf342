"""A folder of photographs, read, decoded and resized in a random order: images a second.

JPEG files of 500 x 375 and of 4000 x 3000 pixels, made here, are brought to 224 x 224 by averaging
over areas, and batches of bytes are fetched by something that does nothing else. Against Phalanx
stand the usual `tf.data` pipeline, whose images are the same to the bit but for the large files,
which Phalanx lets libjpeg shrink in part; Keras's `image_dataset_from_directory`; Grain with
threads and with processes; and PyTorch's `DataLoader`. The last two decode with Pillow, whose
`draft` and BOX do what Phalanx does. They get as many processes as there are cores, or as many
threads as Grain takes by default, and need not be in this environment: `--grain_python` and
`--torch_python` name interpreters that have them, NumPy and Pillow. Op determinism is left off,
which favours `tf.data`. The files are in the system's cache, so disks take no part. Time of the
processors is measured too, all processes of a side together: on a machine that does other things
it says more than the pace.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pairs

SIZE = 224
# Of each kind of photograph: files, rows, columns, the size of a batch, batches in a measurement.
SETS = {'500 x 375': (600, 375, 500, 32, 40), '4000 x 3000': (40, 3000, 4000, 8, 12)}
WARM_UP = 12


def write_photographs(directory: Path, count: int, rows: int, columns: int) -> None:
    """Writes JPEG files of smooth noise in many sizes, which compress as photographs do."""
    import numpy as np
    import tensorflow as tf

    random = np.random.default_rng(0)
    for number in range(count):
        # A few images, each in many files: noise takes longer to make than to encode.
        if number % 40 == 0:
            image = np.zeros([rows, columns, 3], np.float32)
            for cell in (4, 8, 16, 32, 64, 128):
                noise = random.normal(size=(rows // cell + 2, columns // cell + 2, 3))
                image += tf.image.resize(noise, (rows, columns), 'bicubic').numpy() * cell**0.7
            image = image / image.std() * 50 + 128 + random.normal(scale=8, size=image.shape)
        turned = np.roll(image, 13 * number, axis=1).clip(0, 255).astype(np.uint8)
        path = directory / f'class {number % 3}' / f'{number:04}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_jpeg(turned, quality=90).numpy())


def phalanx(directory: str, batch_size: int) -> Callable[[], Iterator]:
    from trainer.cluster import Cluster
    from trainer.data.batch import Data
    from trainer.data.image_folder import image_folder
    from trainer.data.pipeline import train_batches
    from trainer.strategy import build_strategy

    strategy = build_strategy(cluster=Cluster(), devices_per_worker=1, deterministic=False)
    data = Data(image_folder(directory, (SIZE, SIZE, 3), fit='stretch'))
    return lambda: train_batches(data, strategy, seed=0, global_batch_size=batch_size, start_step=0)


def tf_data(directory: str, batch_size: int) -> Callable[[], Iterator]:
    import tensorflow as tf

    def load(path, label):
        image = tf.io.decode_jpeg(tf.io.read_file(path), 3, dct_method='INTEGER_ACCURATE')
        image = tf.image.resize(image, (SIZE, SIZE), 'area')
        return {'inputs': tf.cast(tf.round(image), tf.uint8), 'labels': label}

    paths = sorted(map(str, Path(directory).glob('*/*')))
    labels = [int(path.split('class ')[1][0]) for path in paths]
    dataset = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.batch(batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    return functools.partial(iter, dataset)


def keras_dataset(directory: str, batch_size: int) -> Callable[[], Iterator]:
    import keras

    dataset = keras.utils.image_dataset_from_directory(
        directory, image_size=(SIZE, SIZE), batch_size=batch_size, interpolation='area', verbose=0
    )
    return functools.partial(iter, dataset.repeat())


class Folder:
    """What Grain and PyTorch index: pairs of an image, by Pillow, and a label."""

    def __init__(self, directory: str):
        self._paths = sorted(map(str, Path(directory).glob('*/*')))

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        import numpy as np
        from PIL import Image

        path = self._paths[index]
        with Image.open(path) as image:
            image.draft('RGB', (2 * SIZE, 2 * SIZE))
            pixels = image.convert('RGB').resize((SIZE, SIZE), Image.Resampling.BOX)
        return np.asarray(pixels), int(path.split('class ')[1][0])


def grain(directory: str, batch_size: int, *, processes: bool) -> Callable[[], Iterator]:
    import grain

    dataset = grain.MapDataset.source(Folder(directory)).shuffle(seed=0).repeat().batch(batch_size)
    if not processes:
        return lambda: iter(dataset.to_iter_dataset())
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=_cores())
    threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return lambda: iter(dataset.to_iter_dataset(threads).mp_prefetch(options))


def pytorch(directory: str, batch_size: int) -> Callable[[], Iterator]:
    import torch

    folder = Folder(directory)
    # With replacement there are no epochs, and no waiting for workers between them.
    sampler = torch.utils.data.RandomSampler(folder, replacement=True, num_samples=10**9)
    loader = torch.utils.data.DataLoader(folder, batch_size, sampler=sampler, num_workers=_cores())
    return functools.partial(iter, loader)


KINDS = {
    'Phalanx': phalanx,
    'tf.data': tf_data,
    'Keras': keras_dataset,
    'Grain, threads': functools.partial(grain, processes=False),
    'Grain, processes': functools.partial(grain, processes=True),
    'PyTorch DataLoader': pytorch,
}


class Reader:
    """A process that reads batches when it is told to; it is idle between.

    Args:
        python: the interpreter.
        kind: of `KINDS`.
        directory: of the images.
        batch_size: of what is read.
        count: the batches of a measurement.

    Attributes:
        milliseconds: of the processors, for an image, of each measurement.
    """

    def __init__(self, python: str, kind: str, directory: str, batch_size: int, count: int):
        self._images = count * batch_size
        self.milliseconds: list[float] = []
        settings = {'kind': kind, 'directory': directory, 'batch_size': batch_size, 'count': count}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        self._process = subprocess.Popen(
            [python, __file__, *(f'--{name}={value}' for name, value in settings.items())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def take(self) -> float:
        """Reads some batches; returns images a second, and keeps the time of the processors."""
        self._process.stdin.write('\n')
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode()[-4000:])
        seconds, used = map(float, line.split())
        self.milliseconds.append(1000 * used / self._images)
        return self._images / seconds

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


def read(kind: str, directory: str, batch_size: int, count: int) -> None:
    """Is such a process. Each measurement begins with a new iterator, some batches of which fill
    buffers off the clock, so that nothing counts that was read before."""
    make = KINDS[kind](directory, batch_size)
    for _ in sys.stdin:
        batches = make()
        take(batches, WARM_UP)
        begin, used = time.perf_counter(), processor_seconds(os.getpid())
        take(batches, count)
        spent = time.perf_counter() - begin
        print(spent, processor_seconds(os.getpid()) - used, flush=True)
        del batches


def processor_seconds(process: int) -> float:
    """Returns the time that a process and all its living children have had of the processors."""
    stat = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    children = Path(f'/proc/{process}/task').glob('*/children')
    ticks = int(stat[11]) + int(stat[12])
    return ticks / os.sysconf('SC_CLK_TCK') + sum(
        processor_seconds(int(child)) for path in children for child in path.read_text().split()
    )


def take(batches: Iterable, count: int) -> None:
    for _ in range(count):
        next(batches)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def main() -> None:
    options = pairs.arguments(
        __doc__,
        rounds=10,
        grain_python='',
        torch_python='',
        kind='',
        directory='',
        batch_size=0,
        count=0,
    )
    if options.kind:
        read(options.kind, options.directory, options.batch_size, options.count)
        return
    pythons = {'Grain': options.grain_python, 'PyTorch': options.torch_python}
    kinds = {kind: pythons.get(kind.split()[0].strip(','), sys.executable) for kind in KINDS}
    table = pairs.Table('Images from a folder', 'Phalanx', 'theirs', markdown=options.markdown)
    with tempfile.TemporaryDirectory() as directory:
        for what, (files, rows, columns, *sizes) in SETS.items():
            folder = Path(directory) / what
            write_photographs(folder, files, rows, columns)
            readers = {
                kind: Reader(python, kind, str(folder), *sizes)
                for kind, python in kinds.items()
                if python
            }
            try:
                takes = [reader.take for reader in readers.values()]
                taken = pairs.alternate(*takes, rounds=options.rounds)
            finally:
                for reader in readers.values():
                    reader.close()
            paces = dict(zip(readers, taken, strict=True))
            used = {kind: reader.milliseconds[1:] for kind, reader in readers.items()}
            for kind in list(KINDS)[1:]:
                row = f'{what}, {kind}'
                table.row(row, paces['Phalanx'], paces.get(kind), 'images/s', '>= 1')
                table.row('  processors', used['Phalanx'], used.get(kind), 'ms/image', '<= 1')


if __name__ == '__main__':
    main()
