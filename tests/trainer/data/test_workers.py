"""Data workers make the same batches as a trainer does, whoever of them is there."""

import functools
import itertools
import threading
import time
import types

import grpc
import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.data.test_pipeline import AUGMENT, joined, sha256, take
from trainer.data import augment
from trainer.data import workers as data_workers
from trainer.data.arrays import Arrays
from trainer.data.bad_record_list import listing
from trainer.data.batch import Data
from trainer.data.digits import digits
from trainer.data.pipeline import eval_batches, train_batches
from trainer.data.preprocess import Adapted
from trainer.data.protocol import SERVICE, pack, unpack
from trainer.data.serve import Server
from trainer.data.source import Source
from trainer.data.stream import Stream
from trainer.data.workers import DataWorkers
from trainer.errors import BadRecord, ConfigError

SEED, BATCH, CONFIG = 5, 16, 'c' * 64


@functools.cache
def augmented():
    return Data(digits('test'), preprocess=augment.scale_images, augment=AUGMENT)


@pytest.fixture
def serve():
    """A function: data -> a data worker in this process, stopped at the end."""
    servers = []

    def start(data, address='127.0.0.1:0', kind=Server, **options):
        given = {'eval_data': data, 'seed': SEED, 'config_sha256': CONFIG, **options}
        # One thread each: TensorFlow's own belong to the trainer.
        given.setdefault('threads', 1)
        servers.append(kind(address, train_data=data, **given))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def workers(*servers, **options):
    addresses = [getattr(server, 'address', server) for server in servers]
    return DataWorkers(addresses, **{'config_sha256': CONFIG, **options})


def train(data, strategy, steps, **options):
    options = {'seed': SEED, 'global_batch_size': BATCH, 'start_step': 0, **options}
    return take(train_batches(data, strategy, **options), strategy, steps)


def test_batches_of_training_have_the_same_bits(strategy, serve):
    asked = workers(serve(augmented()), serve(augmented()))
    windows = ((40, 80), (300, 304))
    local = train(augmented(), strategy, 30, left_out=windows)
    remote = train(augmented(), strategy, 30, left_out=windows, workers=asked)
    assert sha256(remote) == sha256(local)
    later = train(augmented(), strategy, 10, left_out=windows, start_step=20, workers=asked)
    assert sha256(later) == sha256(local[20:])


def test_batches_of_evaluation_have_the_same_bits_padding_included(strategy, serve):
    local, steps = eval_batches(augmented(), strategy, global_batch_size=BATCH)
    remote, _ = eval_batches(
        augmented(), strategy, global_batch_size=BATCH, workers=workers(serve(augmented()))
    )
    local, remote = (take(each, strategy, steps) for each in (local, remote))
    assert sha256(remote) == sha256(local)
    assert np.sum(joined(remote[-1], 'weights') == 0) == steps * BATCH - 297


def test_a_dict_of_inputs_texts_and_bfloat16_arrive_as_they_are(make_strategy, serve):
    strategy = make_strategy(1)

    def preprocess(features):
        number = features['number']
        return {
            'text': tf.strings.as_string(number),
            'half': tf.cast(number, tf.bfloat16)[:, tf.newaxis],
            'yes': number % 2 == 0,
            'empty': tf.zeros([tf.shape(number)[0], 0]),
        }

    numbers = np.arange(50)
    data = Data(
        Arrays({'number': numbers, 'label': numbers, 'weight': numbers + 0.5}),
        inputs=('text', 'half', 'yes', 'empty'),
        weight='weight',
        preprocess=preprocess,
    )
    [[batch]] = train(data, strategy, 1, workers=workers(serve(data)))
    [[local]] = train(data, strategy, 1)
    assert {name: value.dtype for name, value in batch['inputs'].items()} == {
        name: value.dtype for name, value in local['inputs'].items()
    }
    tf.nest.map_structure(np.testing.assert_array_equal, batch, local)


class Hung(Server):
    """Takes requests, and answers when it is told to, while gRPC answers pings."""

    def __init__(self, address, **options):
        self.requests, self.go_on = 0, threading.Event()
        super().__init__(address, **options)

    def _make(self, request, task):
        self.requests += 1
        self.go_on.wait()
        return super()._make(request, task)


def test_one_that_hangs_is_left_until_it_is_back(make_strategy, serve, monkeypatch):
    monkeypatch.setattr(data_workers, '_SLOW_SECONDS', 0.5)
    hung = serve(augmented(), kind=Hung, threads=100)
    asked, strategy = workers(hung, serve(augmented())), make_strategy(2)
    local = train(augmented(), strategy, 60)
    try:
        assert sha256(train(augmented(), strategy, 60, workers=asked)) == sha256(local)
        assert 1 <= hung.requests <= asked.calls
    finally:
        hung.go_on.set()
    before = hung.requests
    assert sha256(train(augmented(), strategy, 60, workers=asked)) == sha256(local)
    assert hung.requests > before


def test_the_order_survives_data_workers_that_come_and_go(make_strategy, serve):
    strategy, servers = make_strategy(2), [serve(augmented()), serve(augmented())]
    batches = train_batches(
        augmented(),
        strategy,
        seed=SEED,
        global_batch_size=BATCH,
        start_step=0,
        workers=workers(*servers),
    )
    taken = take(batches, strategy, 20)
    servers[1].stop()
    taken += take(batches, strategy, 60)
    servers[0].stop()  # Nobody is left.
    back = threading.Timer(1.0, lambda: serve(augmented(), servers[0].address))
    back.start()
    taken += take(batches, strategy, 60)
    back.join()
    serve(augmented(), servers[1].address)
    taken += take(batches, strategy, 60)
    assert sha256(taken) == sha256(train(augmented(), strategy, 200))


def test_all_data_workers_have_something_to_do(make_strategy, serve):
    asked = [set(), set()]

    def preprocess(features, *, of, mark):
        def note(images):
            mark.add(of)
            time.sleep(0.005)
            return images

        image = tf.numpy_function(note, [features['image']], tf.uint8)
        return {'image': tf.ensure_shape(image, features['image'].shape)}

    data = [
        Data(digits('test'), preprocess=functools.partial(preprocess, of=of, mark=mark))
        for of, mark in enumerate(asked)
    ]
    train(data[0], make_strategy(1), 20, workers=workers(*map(serve, data)))
    assert asked == [{0}, {1}]


@pytest.mark.parametrize(
    ('option', 'value', 'word'),
    [('config_sha256', 'd' * 64, 'config_sha256'), ('seed', 6, 'seed')],
)
def test_one_of_another_run_is_refused_before_training(make_strategy, serve, option, value, word):
    server = serve(augmented(), **{option: value})
    with pytest.raises(ConfigError, match=f'would make other batches.*{word} is '):
        train(augmented(), make_strategy(1), 1, workers=workers(server))


def test_one_with_other_data_is_refused_before_training(make_strategy, serve):
    server = serve(Data(digits('train')))
    with pytest.raises(ConfigError, match='data_fingerprint'):
        train(augmented(), make_strategy(1), 1, workers=workers(server))


def test_who_has_not_told_its_task_gets_nothing(serve):
    with grpc.insecure_channel(serve(augmented()).address) as channel:
        batch = channel.unary_unary(f'/{SERVICE}/batch')
        for metadata in ((), (('phalanx-task', '0' * 64),)):
            with pytest.raises(grpc.RpcError) as raised:
                batch(bytes(32), metadata=metadata)
            assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_the_first_to_come_is_waited_for_and_none_is_a_mistake(make_strategy, serve):
    server = serve(augmented())
    server.stop()
    asked = workers(server, patience_seconds=1.0)
    with pytest.raises(ConfigError, match=f'(?s)No data worker has answered.*{server.address}'):
        train(augmented(), make_strategy(1), 1, workers=asked)
    back = threading.Timer(1.0, lambda: serve(augmented(), server.address))
    back.start()
    assert train(augmented(), make_strategy(1), 1, workers=workers(server))
    back.join()


def test_when_all_stay_away_the_run_is_told_who(make_strategy, serve):
    server, strategy = serve(augmented()), make_strategy(1)
    batches = train_batches(
        augmented(),
        strategy,
        seed=SEED,
        global_batch_size=BATCH,
        start_step=0,
        workers=workers(server, patience_seconds=1.0),
    )
    take(batches, strategy, 1)
    server.stop()
    with pytest.raises(tf.errors.UnknownError, match=f'No data worker.*{server.address}'):
        take(batches, strategy, 1000)


def test_patience_is_only_for_time_in_which_somebody_is_asked(make_strategy, serve, monkeypatch):
    server, strategy = serve(augmented()), make_strategy(1)
    asked = workers(server, patience_seconds=60.0)
    taken = train(augmented(), strategy, 5, workers=asked)
    # A compilation, say, or an evaluation in which no other batch was needed.
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + 1000, sleep=time.sleep)
    monkeypatch.setattr(data_workers, 'time', clock)
    server.stop()
    back = threading.Timer(1.0, lambda: serve(augmented(), server.address))
    back.start()
    taken += train(augmented(), strategy, 5, start_step=5, workers=asked)
    back.join()
    assert sha256(taken) == sha256(train(augmented(), strategy, 10))


class Damaged(Source):
    """Numbers, of which one cannot be read."""

    num_examples, fingerprint = 40, 'f'

    def __init__(self, error):
        self._error = error

    @property
    def element_spec(self):
        return dict.fromkeys(('image', 'label'), tf.TensorSpec([], tf.int64))

    def fetch(self, indices):
        def read(indices):
            if 7 in indices:
                raise self._error
            return indices

        [numbers] = tf.numpy_function(read, [indices], [tf.int64])
        return {'image': numbers, 'label': numbers}


@pytest.mark.parametrize(
    ('error', 'expected'),
    [
        (BadRecord('record 7 is torn'), tf.errors.InvalidArgumentError),
        (OSError('record 7 is torn'), tf.errors.UnknownError),
        (BadRecord('record 7 is torn: ' + '壊れた記録' * 2000), tf.errors.InvalidArgumentError),
        (OSError('record 7 is torn: ' + '壊れた記録' * 2000), tf.errors.UnknownError),
    ],
    ids=['damaged', 'out of reach', 'damaged, long', 'out of reach, long'],
)
def test_what_a_source_says_is_told_in_the_trainer(make_strategy, serve, error, expected):
    data = Data(Damaged(error))
    with pytest.raises(expected, match='record 7 is torn'):
        train(data, make_strategy(1), 3, workers=workers(serve(data), patience_seconds=10))


def test_damaged_records_are_left_out_alike_and_listed_by_the_trainer(
    make_strategy, serve, tmp_path
):
    data = Data(Damaged(BadRecord('it is torn')), on_bad_record='skip')
    path, strategy = tmp_path / 'bad.tsv', make_strategy(2)
    with listing.kept_in(path):
        remote = train(data, strategy, 10, workers=workers(serve(data)))
    assert sha256(remote) == sha256(train(data, strategy, 10))
    assert path.read_text() == '7\trecord 7\tit is torn\n'


def test_labels_are_held_against_the_classes_of_the_model(make_strategy, serve):
    data, strategy = Data(digits('test')), make_strategy(1)
    asked = workers(serve(data))
    with pytest.raises(tf.errors.InvalidArgumentError, match='not one of the classes 0 to 4'):
        train(data, strategy, 1, workers=asked, num_classes=5)
    assert train(data, strategy, 1, workers=asked, num_classes=10)


class Centred(Adapted):
    """Subtracts a mean, which a data worker could not know."""

    def __init__(self, mean=0):
        self._mean = mean

    @property
    def state(self):
        return {'mean': self._mean}

    def with_state(self, state):
        return Centred(**state)

    def __call__(self, features):
        return {'image': tf.cast(features['image'], tf.float32) - self._mean}


def test_what_preprocessing_has_learnt_is_that_of_the_trainer(make_strategy, serve):
    here, there = (Data(digits('test'), preprocess=Centred(mean)) for mean in (4.5, 0))
    remote = train(here, make_strategy(1), 5, workers=workers(serve(there)))
    assert sha256(remote) == sha256(train(here, make_strategy(1), 5))


def test_a_stream_is_refused(make_strategy, serve):
    stream = Stream(
        'numbers',
        lambda: iter([{'image': 1, 'label': 2}]),
        features={'image': ('int64', ()), 'label': ('int64', ())},
        num_examples=1,
    )
    with pytest.raises(ConfigError, match='data workers cannot make its batches'):
        train(Data(stream), make_strategy(1), 1, workers=workers('localhost:1'))


def test_a_port_that_is_taken_is_told(serve):
    address = serve(augmented()).address
    with pytest.raises(ConfigError, match=f"cannot listen on '{address}'"):
        serve(augmented(), address)


@pytest.mark.parametrize('address', ['nowhere', 'host:', ':80', 'host:port'])
def test_an_address_that_is_none_is_told(address):
    with pytest.raises(ConfigError, match='not of the form host:port'):
        workers(address)


def test_the_environment_names_them():
    found = DataWorkers.from_environ({'PHALANX_DATA_WORKERS': 'a:1, b:2,'}, config_sha256=CONFIG)
    assert (
        found.calls
        == 2 * DataWorkers.from_environ({'PHALANX_DATA_WORKERS': 'a:1'}, config_sha256=CONFIG).calls
    )
    assert DataWorkers.from_environ({}, config_sha256=CONFIG) is None


def test_packed_arrays_come_out_as_they_were():
    kinds = [np.uint8, np.int64, np.float32, np.bool_, tf.bfloat16.as_numpy_dtype]
    arrays = [
        np.arange(np.prod(shape)).reshape(shape).astype(kind)
        for kind, shape in itertools.product(kinds, [(), (0, 3), (2, 3)])
    ]
    arrays.append(np.array([[b'', b'a\0'], [b'\xff', b'long' * 100]], object))
    dtypes = [tf.string if a.dtype == object else tf.as_dtype(a.dtype) for a in arrays]
    for before, after in zip(arrays, unpack(pack(arrays), dtypes), strict=True):
        assert (before.dtype, before.shape) == (after.dtype, after.shape)
        np.testing.assert_array_equal(before, after)
