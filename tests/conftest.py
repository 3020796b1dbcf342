"""What tests share: four CPU devices in one process, and the strategies over them."""

import functools
import os
import sys

import pytest
from absl import logging as absl_logging

# A machine's GPUs are used only by who asks for them.
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '-1')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')


def pytest_collection_finish():
    # Devices are fixed by TensorFlow's first operation: no test module may run one when imported.
    # Where none imports TensorFlow, nobody shall wait for it.
    if 'tensorflow' in sys.modules:
        _split_cpu()


@functools.cache
def _split_cpu():
    import tensorflow as tf

    cpu = tf.config.list_physical_devices('CPU')[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)


@functools.cache
def _strategy(num_replicas):
    import tensorflow as tf

    _split_cpu()
    devices = [f'CPU:{i}' for i in range(num_replicas)]
    if num_replicas == 1:
        return tf.distribute.OneDeviceStrategy(devices[0])
    # Two strategies of one process would take each other's collectives for their own.
    tf.distribute.MirroredStrategy._collective_key_base = 100_000 * num_replicas
    return tf.distribute.MirroredStrategy(devices)


@pytest.fixture(scope='session')
def make_strategy():
    """A function: number of replicas, 1 to 4, all in this process -> strategy."""
    return _strategy


@pytest.fixture(params=[1, 2, 4], ids='{} replicas'.format)
def strategy(request):
    """One device, and two and four mirrored ones in turn."""
    return _strategy(request.param)


@pytest.fixture(autouse=True)
def _logging_as_in_the_program():
    """Tests call programs in this process, which set what is logged."""
    absl_logging.set_verbosity(absl_logging.INFO)
