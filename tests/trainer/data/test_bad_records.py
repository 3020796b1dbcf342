"""Damaged records: named and stopped at, or left out alike by everyone."""

import dataclasses
import functools

import numpy as np
import pytest
import tensorflow as tf

from trainer.data.arrays import Arrays
from trainer.data.bad_record_list import Damage, Listing, listing
from trainer.data.bad_records import find, note, reason, told
from trainer.data.batch import PADDING, Data
from trainer.data.mix import cutmix, mixup
from trainer.data.pipeline import eval_batches, train_batches, train_records
from trainer.errors import BadRecord, ConfigError

N, BATCH = 24, 8


class Damaged(Arrays):
    """Some records raise from Python, others cannot be decoded in the graph."""

    def __init__(self, python=(), graph=(), labels=None):
        labels = np.arange(N) % 3 if labels is None else labels
        super().__init__({'image': np.arange(N, dtype=np.float32)[:, None], 'label': labels})
        self.python, self.graph = set(python), sorted(graph)

    def fetch(self, indices):
        def check(ids):
            for record in ids:
                if int(record) in self.python:
                    raise BadRecord(f'its checksum is wrong (of {record})')
            return ids

        indices = tf.ensure_shape(tf.numpy_function(check, [indices], tf.int64), indices.shape)
        broken = tf.reduce_any(indices[:, None] == tf.constant(self.graph, tf.int64))
        text = tf.where(broken, 'no number', '1.5')
        factor = tf.strings.to_number(text) / 1.5
        features = super().fetch(indices)
        return {**features, 'image': features['image'] * factor}

    def where(self, index):
        return f'file-{index // 10}, record {index % 10}'


def batches_of(strategy, data, steps=6, **options):
    iterator = train_batches(
        data, strategy, seed=1, global_batch_size=BATCH, start_step=0, **options
    )
    found = []
    for _ in range(steps):
        locals_ = strategy.experimental_local_results(next(iterator))
        found.append({key: np.concatenate([b[key] for b in locals_]) for key in locals_[0]})
    return found


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / 'bad' / 'worker-0.tsv'
    with listing.kept_in(path):
        yield path


@pytest.mark.parametrize('damage', [{'python': [13]}, {'graph': [13]}], ids=str)
def test_the_damaged_record_is_found_and_named(damage):
    found = find(Damaged(**damage), [np.arange(8), np.arange(8, 24)], 'label')
    assert (found.record, found.where) == (13, 'file-1, record 3')
    assert (
        found.reason
        == {
            'python': 'its checksum is wrong (of 13)',
            'graph': 'StringToNumberOp could not correctly convert string: no number',
        }[next(iter(damage))]
    )


def test_nothing_is_found_where_all_is_well():
    assert find(Damaged(), [np.arange(N)], 'label', 3) is None


def test_a_label_that_is_no_class_is_damage():
    labels = np.arange(N) % 3
    labels[5] = 3
    found = find(Damaged(labels=labels), [np.arange(N)], 'label', 3)
    assert found.record == 5
    assert found.reason == "the label 'label' is not one of the classes 0 to 2"


def test_training_stops_with_a_sentence(make_strategy):
    strategy, data = make_strategy(2), Data(Damaged(python=[13]))
    records = train_records(data, range(6), seed=1, global_batch_size=BATCH)
    with pytest.raises(ConfigError) as caught, told(data.source, records, 'label'):
        batches_of(strategy, data)
    assert caught.value.message.startswith(
        'file-1, record 3 cannot be used: its checksum is wrong (of 13). Mend the data, or set '
        "Data.on_bad_record = 'skip'"
    )


def test_an_error_that_is_not_of_a_record_stays_what_it_is():
    with pytest.raises(tf.errors.InternalError), told(Damaged(), [np.arange(N)], 'label'):
        raise tf.errors.InternalError(None, None, 'an operation has failed')


def test_skipped_records_weigh_nothing_and_all_else_is_as_without_damage(strategy, listed):
    labels = np.arange(N) % 3
    labels[7] = -1
    whole = batches_of(strategy, Data(Damaged()))
    data = Data(Damaged(python=[13], graph=[2], labels=labels), on_bad_record='skip')
    damaged = batches_of(strategy, data, num_classes=3)
    for good, bad in zip(whole, damaged, strict=True):
        out = np.isin(good['ids'], [2, 7, 13])
        np.testing.assert_array_equal(bad['weights'], np.where(out, 0.0, 1.0))
        np.testing.assert_array_equal(bad['ids'], np.where(out, -2 - good['ids'], good['ids']))
        for key in ('inputs', 'labels'):
            np.testing.assert_array_equal(bad[key][~out], good[key][~out])


@pytest.mark.parametrize('blend', [mixup, cutmix])
def test_what_is_blended_with_a_skipped_record_is_the_same_on_any_topology(
    make_strategy, listed, blend
):
    labels = np.eye(3, dtype=np.float32)[np.arange(N) % 3]
    source = Damaged(python=[13, 20], graph=[2], labels=labels)
    data = Data(source, augment=functools.partial(_blended, blend), on_bad_record='skip')
    one, *others = (batches_of(make_strategy(count), data) for count in (1, 2, 4))
    for other in others:
        for expected, found in zip(one, other, strict=True):
            for key, value in expected.items():
                np.testing.assert_array_equal(found[key], value)
    assert sum((batch['weights'] == 0).sum() for batch in one) == 6  # In two epochs.


def _blended(blend, features, seeds):
    """Blends numbers as if they were images of one pixel."""
    image = features['image'][:, None, None]
    blended = blend({**features, 'image': image}, seeds, alpha=1.0)
    return {**blended, 'image': blended['image'][:, 0, 0]}


def test_skipped_records_are_listed_once_with_place_and_reason(make_strategy, listed):
    batches_of(make_strategy(1), Data(Damaged(python=[13, 4]), on_bad_record='skip'), steps=9)
    lines = sorted(listed.read_text().splitlines())
    assert lines == [
        '13\tfile-1, record 3\tits checksum is wrong (of 13)',
        '4\tfile-0, record 4\tits checksum is wrong (of 4)',
    ]


def test_records_that_another_process_left_out_are_read_once_by_one_function(listed):
    calls = []

    class Counted(Damaged):
        def fetch(self, indices):
            calls.append('traced')
            tf.numpy_function(lambda: calls.append('read') or 0, [], tf.int64)
            return super().fetch(indices)

    source = Counted(python=[13, 4])
    for _ in range(3):
        note(source, np.array([1, -2 - 13, -2 - 4]), 'label', 3)
    assert calls.count('traced') == 1
    assert calls.count('read') <= 2 * 2  # A record is read a second time to name it.
    assert len(listed.read_text().splitlines()) == 2


def test_a_resumed_run_lists_no_record_again(tmp_path):
    path, own = tmp_path / 'worker-0.tsv', Listing()
    for _ in range(2):
        with own.kept_in(path):
            own.add(Damage(3, 'here', 'torn\tin\ntwo'))
            assert own.count == 1
    assert path.read_text() == '3\there\ttorn in two\n'


def test_evaluation_leaves_them_out_too(make_strategy, listed):
    data = Data(Damaged(python=[13]), on_bad_record='skip')
    iterator, steps = eval_batches(data, make_strategy(1), global_batch_size=16)
    batches = [next(iterator) for _ in range(steps)]
    ids = np.concatenate([b['ids'] for b in batches])
    weights = np.concatenate([b['weights'] for b in batches])
    assert ids.tolist() == [*range(13), -15, *range(14, 24), *[PADDING] * 8]
    assert weights.sum() == 23


def test_a_batch_of_nothing_but_damage_is_all_zeros(make_strategy, listed):
    data = Data(Damaged(python=range(N)), on_bad_record='skip')
    batch = batches_of(make_strategy(1), data, steps=1)[0]
    assert not batch['weights'].any()
    assert not batch['inputs'].any()


def test_weights_of_the_data_still_count(make_strategy, listed):
    source = Damaged(python=[13])
    plain = Data(source, class_weights=(1.0, 2.0, 4.0), on_bad_record='skip')
    for batch in batches_of(make_strategy(2), plain):
        good = batch['ids'] >= 0
        expected = np.where(good, 2.0 ** batch['labels'], 0.0)
        np.testing.assert_array_equal(batch['weights'], expected)


def test_far_too_much_damage_ends_the_run(tmp_path):
    own, source = Listing(), Damaged()
    with own.kept_in(tmp_path / 'worker-0.tsv'):
        for _ in range(99):
            own.read(source, 8, 1)
        with pytest.raises(BadRecord, match='100 of 800 records read so far are damaged'):
            own.read(source, 8, 1)


def test_many_batches_at_once_do_not_wait_for_each_other(make_strategy, listed):
    """More of them than threads, each calling Python and, in it, a graph that calls Python."""
    data = Data(Damaged(python=[13]), on_bad_record='skip')
    strategy = make_strategy(4)
    data = dataclasses.replace(data, preprocess=functools.partial(_slow))
    assert len(batches_of(strategy, data, steps=200)) == 200


def _slow(features):
    image = features['image']
    for _ in range(20):
        image = tf.sin(image)
    return {**features, 'image': image}


def test_a_misspelt_policy_is_told():
    with pytest.raises(ConfigError, match="Did you mean 'skip'"):
        Data(Damaged(), on_bad_record='skipp')


def test_the_place_in_the_graph_is_no_part_of_a_reason():
    error = tf.errors.InvalidArgumentError(
        None, None, '{{function_node __wrapped__X}} Unknown format [Op:DecodeImage] name: '
    )
    assert reason(error) == 'Unknown format'


def test_of_two_sources_each_is_listed_and_counted_by_itself(tmp_path):
    own, train, test = Listing(), Damaged(), Damaged()
    with own.kept_in(tmp_path / 'worker-0.tsv'):
        own.add(Damage(3, 'train, record 3', 'torn'))
        own.add(Damage(3, 'test, record 3', 'torn'))
        assert own.count == 2
        own.read(train, 4000, 0)
        with pytest.raises(BadRecord, match='297 of 297 records'):
            own.read(test, 297, 297)


def test_rows_that_fill_up_a_batch_are_no_more_damage(make_strategy, listed):
    data = Data(Damaged(python=[0]), on_bad_record='skip')
    iterator, _ = eval_batches(data, make_strategy(1), global_batch_size=512)
    for _ in range(2):
        next(iterator)
    assert not listing.is_too_much


def test_a_peer_that_is_gone_is_no_reason_to_read_everything_again():
    def batches():
        raise AssertionError('looked at')
        yield

    with (
        pytest.raises(tf.errors.UnavailableError),
        told(Damaged(python=[1]), batches(), 'label'),
    ):
        raise tf.errors.UnavailableError(None, None, 'the network is down')
