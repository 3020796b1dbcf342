import logging

import numpy as np
import pytest

from tests.trainer import tiny
from trainer.model_dir import ModelDir
from trainer.observe.report import Report


@pytest.fixture
def dirs(tmp_path):
    dirs = ModelDir(tmp_path)
    dirs.create()
    return dirs


def make(dirs, **changes):
    arguments = {
        'writes': True,
        'step': 0,
        'last_step': 100,
        'batch_size': 8,
        'config_text': 'a = 1\n',
        **changes,
    }
    return Report(dirs, **arguments)


def totals(loss, **more):
    return {'loss': np.float64(loss), 'input_seconds': 0.5, 'work_seconds': 0.0, **more}


def mean(sums):
    return {'loss': float(sums['loss']) / 5, 'gradient_norm': 2.0}


def test_what_several_calls_summed_is_reported_as_one_mean_with_its_pace(dirs, caplog):
    caplog.set_level(logging.INFO)
    report = make(dirs)
    report.add(totals(3.0), 0, 2, 1.0)
    report.add(totals(4.5), 2, 3, 1.0)
    values = report.train(5, mean, lambda: {'learning_rate': 0.25})
    report.close()
    assert values == {'loss': 1.5, 'gradient_norm': 2.0}
    points = tiny.points(dirs.train)
    assert {tag: at for tag, at in points.items() if tag != 'config'} == {
        'loss': [(5, 1.5)],
        'gradient_norm': [(5, 2.0)],
        'steps_per_second': [(5, 2.5)],
        'examples_per_second': [(5, 20.0)],
        'input_wait': [(5, 0.5)],
        'learning_rate': [(5, 0.25)],
    }
    assert caplog.messages[-1].startswith(
        'step 5/100 (5 %)  loss 1.500  20 examples/s  input wait 50 %'
    )


def test_each_report_is_of_the_steps_since_the_last(dirs):
    report = make(dirs)
    report.add(totals(5.0), 0, 5, 1.0)
    report.train(5, mean, dict)
    report.add(totals(10.0), 5, 5, 4.0)
    assert report.train(10, mean, dict)['loss'] == 2.0
    report.close()
    assert tiny.points(dirs.train)['examples_per_second'] == [(5, 40.0), (10, 10.0)]


def test_evaluations_and_histograms_have_their_places(dirs, caplog):
    caplog.set_level(logging.INFO)
    report = make(dirs)
    report.evaluation(20, {'loss': 0.5, 'accuracy': 0.75})
    report.histograms(20, lambda: {'kernel': np.arange(4.0)})
    report.flush()
    assert tiny.points(dirs.eval) == {'loss': [(20, 0.5)], 'accuracy': [(20, 0.75)]}
    assert [step for step, _ in tiny.points(dirs.train)['kernel']] == [20]
    assert caplog.messages == ['evaluation at step 20/100 (20 %)  loss 0.5000  accuracy 0.7500']
    report.close()


def test_the_configuration_is_a_file_and_a_text_of_tensorboard(dirs):
    make(dirs, step=30).close()
    assert (dirs.config / 'config-30.gin').read_text() == 'a = 1\n'
    assert tiny.points(dirs.train)['config'] == [(30, b'```\na = 1\n\n```')]


def test_the_order_of_samples_is_written_where_it_is_wanted(dirs):
    report = make(dirs, sample_log=True)
    report.add(totals(1.0, ids=np.array([[4, 2], [0, 1]])), 6, 2, 1.0)
    report.train(8, mean, dict)
    assert (dirs.path / 'samples.tsv').read_text() == '6\t4 2\n7\t0 1\n'
    assert report.sample_sha256() is not None
    report.close()


def test_a_worker_that_does_not_write_computes_the_same_and_leaves_no_file(dirs, caplog):
    caplog.set_level(logging.INFO)
    before = sorted(dirs.path.rglob('*'))
    report = make(dirs, writes=False, sample_log=True)
    report.add(totals(5.0, ids=np.array([[1, 2]])), 0, 5, 1.0)

    def never():
        raise AssertionError('computed for nobody')

    assert report.train(5, mean, never) == {'loss': 1.0, 'gradient_norm': 2.0}
    report.evaluation(5, {'loss': 1.0})
    report.histograms(5, never)
    report.flush()
    assert report.sample_sha256() is None
    report.close()
    assert sorted(dirs.path.rglob('*')) == before
    assert not caplog.messages
