"""What a batch from a data worker costs more than one made here, and what it takes off a trainer.

python benchmarks/data_workers.py [--kilobytes=400] [--batches=300]

Time is that of the processor of the trainer and of the clock, a batch. `local` makes it in the
trainer, `remote` gets it from one data worker on this host. The batch takes no time to make, so the
difference is the way there and back.
"""

import argparse
import resource
import subprocess
import sys
import time

import pairs  # noqa: F401

# isort: split
import numpy as np
import tensorflow as tf

from launch.local import free_ports
from trainer.data.arrays import Arrays
from trainer.data.batch import Data
from trainer.data.pipeline import train_batches
from trainer.data.serve import Server, prepare_process
from trainer.data.workers import DataWorkers

EXAMPLES = 128


def data(kilobytes):
    numbers = np.arange(2 * EXAMPLES)
    image = np.zeros([2 * EXAMPLES, kilobytes * 1024 // 4 // EXAMPLES], np.float32)
    return Data(Arrays({'image': image, 'label': numbers}))


def serve(address, kilobytes):
    prepare_process(threads=1, deterministic=True)
    Server(
        address,
        train_data=data(kilobytes),
        eval_data=None,
        seed=0,
        config_sha256='',
        threads=1,
    ).wait()


def measure(name, kilobytes, batches, workers=None):
    iterator = train_batches(
        data(kilobytes),
        tf.distribute.OneDeviceStrategy('CPU:0'),
        seed=0,
        global_batch_size=EXAMPLES,
        start_step=0,
        workers=workers,
    )
    for _ in range(20):
        next(iterator)
    began, used = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    for _ in range(batches):
        next(iterator)
    took = (time.perf_counter() - began) / batches
    used = (sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - used) / batches
    print(f'{name}: {took * 1e6:,.0f} us a batch, {used * 1e6:,.0f} us of the processor')


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--kilobytes', type=int, default=400)
    parser.add_argument('--batches', type=int, default=300)
    parser.add_argument('--serve')
    flags = parser.parse_args()
    if flags.serve:
        serve(flags.serve, flags.kilobytes)
    address = f'127.0.0.1:{free_ports(1)[0]}'
    command = [sys.executable, __file__, f'--serve={address}', f'--kilobytes={flags.kilobytes}']
    server = subprocess.Popen(command)
    try:
        measure('local', flags.kilobytes, flags.batches)
        workers = DataWorkers([address], config_sha256='')
        measure('remote', flags.kilobytes, flags.batches, workers)
    finally:
        server.kill()


if __name__ == '__main__':
    main()
