"""One and two workers of one core each, against PyTorch's DistributedDataParallel over gloo.

The same network (`trainer/models/cnn.py`), Adam, and batches of the shape of MNIST, drawn at
random from memory by whole-batch indexing on both sides. PyTorch runs in eager mode, as most use
it, with its fused Adam and a malloc that keeps its memory. Three jobs are started on each side and
take turns: one worker, two workers that share its batch, and two workers with a batch of that size
each; idle jobs sleep. PyTorch need not be in this environment: `--torch_python` names an
interpreter that has it and NumPy. Weak scaling is the pace of two workers over twice that of one;
it means something only on a machine that does nothing else.
"""

import argparse
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pairs

# isort: split
import numpy as np

BATCH_SIZE = 128
NUM_EXAMPLES = 60_000
# glibc would give the memory of large tensors back and fetch it anew at every step, which costs
# PyTorch a third of its speed and TensorFlow nothing.
_MALLOC = {
    'MALLOC_MMAP_THRESHOLD_': str(32 << 20),
    'MALLOC_TRIM_THRESHOLD_': str(1 << 30),
    'MALLOC_TOP_PAD_': str(128 << 20),
}


class Job:
    """Worker processes that take steps when told to, each pinned to a core of its own.

    Args:
        python: the interpreter.
        kind: 'phalanx' or 'pytorch'.
        workers: how many.
        batch_size: the global batch.

    Attributes:
        shares: of each measurement, which part of its core worker 0 used.
    """

    def __init__(self, python: str, kind: str, workers: int, batch_size: int):
        from launch.local import free_ports

        self._batch_size = batch_size
        self.shares: list[float] = []
        addresses = [f'127.0.0.1:{port}' for port in free_ports(workers)]
        cores = sorted(os.sched_getaffinity(0))
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by close()
        self._processes = [
            subprocess.Popen(
                [
                    python,
                    str(Path(__file__).resolve()),
                    f'--worker={kind}',
                    f'--workers={",".join(addresses)}',
                    f'--index={index}',
                    f'--core={cores[index]}',
                    f'--batch_size={batch_size}',
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                env={**os.environ, **_MALLOC},
            )
            for index in range(workers)
        ]

    def examples_a_second(self, steps: int) -> float:
        """Takes steps; the slowest worker's time counts."""
        for process in self._processes:
            process.stdin.write(f'{steps}\n')
            process.stdin.flush()
        lines = [process.stdout.readline() for process in self._processes]
        if not all(lines):
            self._log.seek(0)
            raise RuntimeError(self._log.read().decode()[-4000:])
        spent, used = zip(*(map(float, line.split()) for line in lines), strict=True)
        self.shares.append(used[0] / spent[0])
        return steps * self._batch_size / max(spent)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._log.close()


def examples() -> tuple[np.ndarray, np.ndarray]:
    """Something of the shape of MNIST."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (NUM_EXAMPLES, 28, 28, 1), np.uint8)
    return images, random.integers(0, 10, NUM_EXAMPLES)


def phalanx_worker(addresses: list[str], index: int, batch_size: int) -> Callable[[int], object]:
    import keras

    from trainer.agreement import Agreement
    from trainer.cluster import Cluster
    from trainer.data.arrays import Arrays
    from trainer.data.augment import scale_images
    from trainer.data.batch import Data, batch_spec
    from trainer.data.pipeline import train_batches
    from trainer.models.cnn import cnn
    from trainer.objective import Objective
    from trainer.state import build_state
    from trainer.step import TrainStep
    from trainer.strategy import build_strategy

    cluster = Cluster(tuple(addresses) if len(addresses) > 1 else (), index)
    strategy = build_strategy(cluster=cluster)
    images, labels = examples()
    data = Data(Arrays({'image': images, 'label': labels}), preprocess=scale_images)
    model = functools.partial(cnn, 10)
    state = build_state(strategy, model, keras.optimizers.Adam, batch_spec(data)['inputs'])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    accuracy = keras.metrics.SparseCategoricalAccuracy(name='accuracy')
    step = TrainStep(strategy, state, Objective(loss), [accuracy])
    batches = train_batches(data, strategy, seed=0, global_batch_size=batch_size, start_step=0)
    agreement = Agreement(strategy, cluster)

    def take(steps: int) -> None:
        # As the loop in trainer/train.py does.
        step.results(step.run(batches, steps))
        agreement.sum([0.0, 0.0, 0.0])

    return take


def pytorch_worker(addresses: list[str], index: int, batch_size: int) -> Callable[[int], object]:
    import torch
    from torch import nn

    torch.manual_seed(0)
    torch.set_num_threads(1)
    convolution = nn.Conv2d(1, 32, 2)
    model = net = nn.Sequential(
        convolution,
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32 * 13 * 13, 64),
        nn.ReLU(),
        nn.BatchNorm1d(64, eps=1e-3, momentum=0.01),
        nn.Linear(64, 10),
    )
    if len(addresses) > 1:
        os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')
        torch.distributed.init_process_group(
            'gloo', init_method=f'tcp://{addresses[0]}', rank=index, world_size=len(addresses)
        )
        model = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-7, fused=True)
    images, labels = examples()
    images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    labels = torch.from_numpy(labels)
    local = batch_size // len(addresses)

    def batches():
        random = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(NUM_EXAMPLES, generator=random)
            for rows in order.split(batch_size)[: NUM_EXAMPLES // batch_size]:
                ids = rows[index * local : (index + 1) * local]
                yield images[ids].float().div_(255), labels[ids]

    batch = batches()

    def take(steps: int) -> tuple[float, float]:
        losses, hits = torch.zeros([]), torch.zeros([])
        for _ in range(steps):
            inputs, targets = next(batch)
            outputs = model(inputs)
            loss = nn.functional.cross_entropy(outputs, targets)
            optimizer.zero_grad()
            (loss + 1e-4 * convolution.weight.square().sum()).backward()
            optimizer.step()
            losses += loss.detach()
            hits += (outputs.detach().argmax(1) == targets).sum()
        return losses.item() / steps, hits.item() / steps / local

    return take


def work(options: argparse.Namespace) -> None:
    """Is one worker: reads numbers of steps, answers with seconds, of the clock and of CPU."""
    # Before TensorFlow or PyTorch look how many cores there are.
    os.sched_setaffinity(0, {options.core})
    make = {'phalanx': phalanx_worker, 'pytorch': pytorch_worker}[options.worker]
    take = make(options.workers.split(','), options.index, options.batch_size)
    for line in sys.stdin:
        begin, used = time.perf_counter(), time.process_time()
        take(int(line))
        print(time.perf_counter() - begin, time.process_time() - used, flush=True)


def main() -> None:
    options = pairs.arguments(
        __doc__, rounds=10, torch_python='', worker='', workers='', index=0, core=0, batch_size=0
    )
    if options.worker:
        work(options)
        return
    shapes = {
        f'1 worker, batch {BATCH_SIZE}': (1, BATCH_SIZE, 80),
        f'2 workers, batch {BATCH_SIZE}': (2, BATCH_SIZE, 80),
        f'2 workers, batch {2 * BATCH_SIZE}': (2, 2 * BATCH_SIZE, 60),
    }
    pythons = {'phalanx': sys.executable, 'pytorch': options.torch_python}
    jobs: dict[tuple[str, str], Job] = {}
    try:
        for kind, python in pythons.items():
            for what, (workers, batch_size, _) in shapes.items():
                if python:
                    jobs[kind, what] = Job(python, kind, workers, batch_size)
        takes = [
            functools.partial(job.examples_a_second, shapes[what][2])
            for (_, what), job in jobs.items()
        ]
        taken = dict(zip(jobs, pairs.alternate(*takes, rounds=options.rounds), strict=True))
    finally:
        for job in jobs.values():
            job.close()
    table = pairs.Table(
        'Workers of one core each, CNN', 'Phalanx', 'PyTorch', markdown=options.markdown
    )
    for what in shapes:
        theirs = taken.get(('pytorch', what))
        table.row(what, taken['phalanx', what], theirs, 'images/s', '>= 1')
    one, _, two = shapes
    efficiency = {
        kind: [b / (2 * a) for a, b in zip(taken[kind, one], taken[kind, two], strict=True)]
        for kind, _ in taken
    }
    # Much below 1, something else ran on that core, and the scaling means nothing.
    shares = {kind: job.shares[1:] for (kind, what), job in jobs.items() if what == one}
    table.row('weak scaling, 1 to 2 workers', efficiency['phalanx'], efficiency.get('pytorch'), '')
    table.row('share of its core 1 worker had', shares['phalanx'], shares.get('pytorch'), '')


if __name__ == '__main__':
    main()
