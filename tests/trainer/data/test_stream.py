import functools

import numpy as np
import pytest
import tensorflow as tf

from tests.processes import finish, start_workers
from tests.trainer import tiny
from trainer.data.batch import PADDING, Data, batch_spec
from trainer.data.mixture import mixture
from trainer.data.one_hot import one_hot
from trainer.data.pipeline import eval_batches, train_batches
from trainer.data.stream import Stream
from trainer.data.subset import subset
from trainer.errors import ConfigError

N, BATCH = 30, 8
FEATURES = {'image': ('float32', (2,)), 'label': ('int64', ())}


def dicts(count=N, bad=None):
    """A generator of `count` elements; what `bad` gives for a number is in its place."""

    def elements():
        for number in range(count):
            element = {'image': np.full(2, number, np.float32), 'label': number % 3}
            yield bad(number, element) if bad else element

    return elements


def generator(bad=None, count=N, **options):
    return Stream('numbers', dicts(count, bad), features=FEATURES, **options)


def dataset(**options):
    """The same elements as serialised tensors, parsed in the graph."""

    def parse(text):
        number = tf.strings.to_number(text, tf.int64)
        image = tf.ensure_shape(tf.fill([2], tf.cast(number, tf.float32)), [2])
        return {'image': image, 'label': number % 3}

    strings = [str(number).encode() for number in range(N)]
    return Stream(
        'numbers', lambda: tf.data.Dataset.from_tensor_slices(strings), parse=parse, **options
    )


def global_batches(strategy, iterator, steps):
    batches = []
    for _ in range(steps):
        parts = strategy.experimental_local_results(next(iterator))
        batches.append({key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    return batches


def train(strategy, source, steps, start_step=0, **options):
    iterator = train_batches(
        Data(source),
        strategy,
        seed=1,
        global_batch_size=BATCH,
        start_step=start_step,
        **options,
    )
    return global_batches(strategy, iterator, steps)


@pytest.mark.parametrize('make', [generator, dataset])
@pytest.mark.parametrize('num_examples', [N, None])
def test_training_reads_the_elements_in_order_epoch_after_epoch(strategy, make, num_examples):
    batches = train(strategy, make(num_examples=num_examples), 10)
    positions = np.arange(10 * BATCH)
    ids = np.concatenate([batch['ids'] for batch in batches])
    images = np.concatenate([batch['inputs'] for batch in batches])
    np.testing.assert_array_equal(ids, positions % N if num_examples else positions)
    np.testing.assert_array_equal(images[:, 0], positions % N)
    np.testing.assert_array_equal(np.concatenate([b['labels'] for b in batches]), positions % N % 3)


@pytest.mark.parametrize('num_examples', [N, None])
@pytest.mark.parametrize('make', [generator, dataset])
@pytest.mark.parametrize('start_step', [1, 4, 11])
def test_a_start_in_the_middle_goes_on_as_if_from_the_beginning(
    make_strategy, num_examples, make, start_step
):
    source, strategy = make(num_examples=num_examples), make_strategy(2)
    whole = train(strategy, source, start_step + 5)[start_step:]
    for here, there in zip(train(strategy, source, 5, start_step), whole, strict=True):
        for name, values in there.items():
            np.testing.assert_array_equal(here[name], values)


@pytest.mark.parametrize('start_step', [0, 2, 7])
def test_what_is_left_out_is_not_read(make_strategy, start_step):
    left_out = ((5, 11), (40, 48))
    positions = [p for p in range(200) if not any(a <= p < b for a, b in left_out)]
    expected = np.array(positions)[start_step * BATCH : (start_step + 4) * BATCH] % N
    batches = train(make_strategy(2), dataset(num_examples=N), 4, start_step, left_out=left_out)
    np.testing.assert_array_equal(np.concatenate([b['ids'] for b in batches]), expected)
    np.testing.assert_array_equal(np.concatenate([b['inputs'][:, 0] for b in batches]), expected)


def test_evaluation_reads_each_element_once_in_every_pass(strategy):
    data = Data(dataset(num_examples=N))
    iterator, num_steps = eval_batches(data, strategy, global_batch_size=BATCH)
    assert num_steps == 4
    for _ in range(2):
        batches = global_batches(strategy, iterator, num_steps)
        ids = np.concatenate([batch['ids'] for batch in batches])
        np.testing.assert_array_equal(ids, [*range(N), PADDING, PADDING])
        weights = np.concatenate([batch['weights'] for batch in batches])
        np.testing.assert_array_equal(weights, [1.0] * N + [0.0] * 2)


def test_augmentation_goes_by_positions_on_every_topology(make_strategy):
    def augment(features, seeds):
        return {**features, 'image': features['image'] + tf.cast(seeds[:, 2:], tf.float32) * 100}

    def inputs(replicas):
        iterator = train_batches(
            Data(dataset(num_examples=N), augment=augment),
            make_strategy(replicas),
            seed=1,
            global_batch_size=BATCH,
            start_step=2,
        )
        batches = global_batches(make_strategy(replicas), iterator, 6)
        return np.concatenate([batch['inputs'] for batch in batches])

    positions = np.arange(2 * BATCH, 8 * BATCH)
    np.testing.assert_array_equal(inputs(1)[:, 0], positions % N + 100 * positions)
    np.testing.assert_array_equal(inputs(1), inputs(4))


def test_two_workers_share_the_rows_of_each_step():
    source = dataset(num_examples=N)

    def rows(worker):
        return source.share(
            source.from_position(BATCH, ()),
            lambda position: position % BATCH // 4 == worker,
            BATCH,
            4,
        ).take(3)

    ids = [[row[1].numpy() for row in rows(worker)] for worker in (0, 1)]
    expected = np.arange(BATCH, 4 * BATCH).reshape(3, 2, 4) % N
    np.testing.assert_array_equal(np.stack(ids, axis=1), expected)


def test_elements_can_be_read_again_by_number():
    source = dataset(num_examples=N)
    for indices in ([0, 1, 2], [5, 3, 29], [0], [17, 17]):
        features = source.fetch(tf.constant(indices, tf.int64))
        np.testing.assert_array_equal(features['image'][:, 0], indices)


def test_the_fingerprint_tells_streams_apart_that_begin_differently_or_are_called_so():
    prints = {
        dataset().fingerprint,
        dataset(num_examples=N).fingerprint,
        generator().fingerprint,
        Stream('others', dicts(), features=FEATURES).fingerprint,
        generator(
            lambda number, element: {**element, 'label': 1 if number == 7 else 0}
        ).fingerprint,
    }
    assert len(prints) == 5
    assert dataset().fingerprint == dataset().fingerprint


def broken(number, element):
    if number == 21:
        raise OSError('the robot fell over')
    return element


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        (generator(broken), "element 21 of the stream 'numbers' .* raised OSError: the robot fell"),
        (
            generator(lambda n, e: {**e, 'image': np.zeros(3)} if n == 13 else e),
            r"element 13 .*'image' has the shape \(3,\) and not \(2,\)",
        ),
        (
            generator(lambda n, e: {**e, 'label': 0.5} if n == 9 else e),
            "element 9 .*'label' is float64 and not int64",
        ),
        (
            generator(lambda n, e: {'image': e['image']} if n == 2 else e, num_examples=N),
            r"element 2 .*\['image'\] instead of a dict of \['image', 'label'\]",
        ),
        (generator(count=0), 'has no elements'),
        (generator(num_examples=N + 5), 'has ended after 30 elements, not 35'),
        (generator(num_examples=N - 5), 'goes on after its 25 elements'),
        (dataset(num_examples=N + 5), 'expected to contain 35 elements but contained only 30'),
        (dataset(num_examples=N - 5), 'expected to contain 25 elements but contained at least 26'),
    ],
    ids=['raises', 'shape', 'dtype', 'keys', 'none', 'few', 'many', 'few in all', 'many in all'],
)
def test_what_is_wrong_with_an_element_is_told_with_its_number(
    make_strategy, tmp_path, source, message
):
    with pytest.raises(ConfigError, match=message):
        tiny.run(
            make_strategy(2),
            tmp_path / 'run',
            train_data=Data(source),
            eval_data=None,
            model=functools.partial(tiny.model),
            steps=12,
        )


def test_without_its_length_a_stream_counts_in_steps_and_is_not_evaluated(make_strategy, tmp_path):
    source = dataset()
    with pytest.raises(ConfigError, match='num_examples'):
        tiny.run(make_strategy(1), tmp_path / 'run', train_data=Data(source), steps='2 epochs')
    with pytest.raises(ConfigError, match='Evaluation needs to know how many'):
        eval_batches(Data(source), make_strategy(1), global_batch_size=BATCH)


@pytest.mark.parametrize('num_examples', [N, None])
@pytest.mark.parametrize(
    ('name', 'made'),
    [
        ('one_hot', lambda source: one_hot(source, 3)),
        ('subset', lambda source: subset(source, end=0.5)),
        ('mixture', lambda source: mixture([source, source])),
    ],
)
def test_what_needs_random_access_refuses_a_stream(name, made, num_examples):
    with pytest.raises(ConfigError, match=f'^{name} needs random access, and a stream is read in'):
        made(generator(num_examples=num_examples))


@pytest.mark.parametrize('kind', ['image', 'text'])
def test_of_large_elements_few_are_kept(kind):
    def elements():
        for number in range(40):
            image = np.full(2**18, number, np.float32)
            yield {'image': image} if kind == 'image' else {'text': image.tobytes()}

    features = {'image': ('float32', (2**18,)), 'text': ('string', ())}
    source = Stream('large', elements, features={kind: features[kind]}, num_examples=40)
    for batch in ([0, 1], [38], [39, 38]):
        rows = source.fetch(tf.constant(batch, tf.int64))[kind].numpy()
        found = [np.frombuffer(bytes(row), np.float32) for row in rows]
        np.testing.assert_array_equal(found, np.repeat([batch], 2**18, 0).T)
        assert len(source._cursor._last) <= 16


def test_strings_keep_zeros_at_their_ends(make_strategy):
    strings = [b'a\0', b'\0', 'b', b'']

    def elements():
        yield from ({'image': x, 'label': x} for x in strings)

    features = {'image': ('string', ()), 'label': ('string', ())}
    source = Stream('strings', elements, features=features, num_examples=4)
    expected = [b'a\0', b'\0', b'b', b'']
    data = Data(source)
    batch = next(train_batches(data, make_strategy(1), seed=1, global_batch_size=4, start_step=0))
    assert batch['inputs'].numpy().tolist() == expected
    fetched = source.fetch(tf.range(4, dtype=tf.int64))
    for strings in (batch['inputs'], batch['labels'], *fetched.values()):
        assert strings.numpy().tolist() == expected


def test_shapes_that_are_not_known_are_told():
    source = Stream(
        'texts',
        lambda: tf.data.Dataset.from_tensors(b'1 2 3'),
        parse=lambda text: {'x': tf.strings.split(text)},
    )
    with pytest.raises(ConfigError, match=r'tensors of fixed shapes.*ensure_shape'):
        batch_spec(Data(source, inputs='x', label='x'))


MODULE = """
import gin
from tests.trainer.data.test_stream import N, Stream, dataset

@gin.register
def numbers() -> Stream:
    return dataset(num_examples=N)
"""
CONFIG = """
import numbers_of_mine

include 'base.gin'
include 'cluster/local.gin'
include 'models/mlp.gin'
include 'optim/sgd.gin'

TRAIN_DATA = @Data()
EVAL_DATA = @Data()
Data.source = @numbers()
NUM_CLASSES = 3
STEPS = '4 epochs'
BATCH_SIZE = 8
train.save_every = 5
train.sample_log = True
"""


@pytest.mark.slow
def test_one_worker_and_two_read_the_same_and_go_on_where_they_stopped(tmp_path):
    (tmp_path / 'numbers_of_mine.py').write_text(MODULE)
    (tmp_path / 'numbers.gin').write_text(CONFIG)

    def run(workers, name, *flags):
        command = ['-m', 'trainer', '--gin_file=numbers.gin', f'--model_dir={name}', *flags]
        ended = finish(start_workers(command, workers, cwd=tmp_path))
        assert [code for code, _ in ended] == [0] * workers, ended
        return (tmp_path / name / 'samples.tsv').read_text(), ended[0][1]

    one, _ = run(1, 'one')
    run(2, 'two', '--gin.train.max_steps=7')
    two, output = run(2, 'two')
    assert 'resumed at step 7' in output
    assert 'passing over 26 elements' in output  # 7 * 8 of epochs of 30.
    assert one == two
    assert len(one.splitlines()) == 15


@pytest.mark.parametrize('num_examples', [N, None])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    make_strategy, tmp_path, num_examples
):
    data = Data(dataset(num_examples=num_examples))
    runs = [
        functools.partial(
            tiny.run,
            make_strategy(2),
            train_data=data,
            eval_data=Data(dataset(num_examples=N)),
            sample_log=True,
            steps=20,
        )
    ]
    whole = runs[0](tmp_path / 'whole')
    runs[0](tmp_path / 'parts', max_steps=7)
    parts = runs[0](tmp_path / 'parts')
    assert parts.state_sha256 == whole.state_sha256
    assert parts.sample_sha256 == whole.sample_sha256
    assert parts.metrics == whole.metrics
