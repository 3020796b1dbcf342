"""Data by URL through a network that fails: the same bits, or a sentence and an exit code."""

import re
import subprocess
import sys
import time

import pytest
import tensorflow as tf

from tests import faults, servers
from tests.processes import environment, finish
from trainer.data import example
from trainer.data.digits import digits

pytestmark = pytest.mark.chaos

FEATURES = {'image': ('uint8', (8, 8, 1)), 'label': ('int64', ())}
STEPS = 150
STORES = {
    's3': (servers.s3, f's3://{servers.BUCKET}'),
    'gcs': (servers.gcs, f'gs://{servers.BUCKET}'),
    'http': (servers.http, 'http://127.0.0.1:{port}'),
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
    """The digits in TFRecord files: four shards to train, one to evaluate."""
    directory = tmp_path_factory.mktemp('data')
    spec = example.spec(FEATURES)
    for split, shards in (('train', 4), ('test', 1)):
        source = digits(split)
        features = source.fetch(tf.range(source.num_examples, dtype=tf.int64))
        images, labels = features['image'].numpy(), features['label'].numpy()
        for shard in range(shards):
            with tf.io.TFRecordWriter(str(directory / f'{split}-{shard}.tfrecord')) as writer:
                for index in range(shard, len(labels), shards):
                    one = {'image': images[index], 'label': labels[index]}
                    writer.write(example.serialize(one, spec))
    return directory


@pytest.fixture(scope='module')
def undisturbed(directory, tmp_path_factory):
    """State, order of samples and metrics of a run on the files themselves."""
    model_dir = tmp_path_factory.mktemp('undisturbed') / 'run'
    ((code, output),) = finish([start(directory, model_dir)])
    assert code == 0, output
    return told(output), (model_dir / 'samples.tsv').read_text()


def start(place, model_dir, **variables):
    cache = model_dir.parent / 'cache'
    command = [
        sys.executable,
        '-m',
        'trainer',
        '--gin_file=runs/tfrecord.gin',
        f'--model_dir={model_dir}',
        '--mode=train',
        f'--gin.TRAIN_FILES="{place}/train-*.tfrecord"',
        f'--gin.EVAL_FILES="{place}/test-*.tfrecord"',
        '--gin.INPUT_SHAPE=(8, 8, 1)',
        '--gin.NUM_CLASSES=10',
        f'--gin.STEPS={STEPS}',
        '--gin.BATCH_SIZE=32',
        '--gin.train.save_every=25',
        '--gin.train.sample_log=True',
    ]
    return subprocess.Popen(
        command,
        env=environment(PHALANX_READ_SECONDS='5', PHALANX_CACHE=str(cache), **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def told(output):
    return re.findall(r'^(?:finished|state|sample order).*', output, re.MULTILINE)


@pytest.mark.parametrize('store', STORES)
def test_a_run_by_url_has_the_bits_of_a_local_one_though_every_tenth_answer_fails(
    store, directory, undisturbed, tmp_path
):
    serve, place = STORES[store]
    with serve(directory) as port, faults.Faults(port, every=10) as proxy:
        place = place.format(port=proxy.port)
        run = start(place, tmp_path / 'run', **servers.clients(proxy.port))
        ((code, output),) = finish([run])
        assert code == 0, output
        assert proxy.injected > 20
    assert (told(output), (tmp_path / 'run/samples.tsv').read_text()) == undisturbed
    assert output.count('it is tried again') == 1


def test_an_outage_ends_the_run_with_a_sentence_and_another_start_goes_on(
    directory, undisturbed, tmp_path
):
    model_dir = tmp_path / 'run'
    with servers.s3(directory) as port, faults.Faults(port, latency=0.05) as proxy:
        place, variables = f's3://{servers.BUCKET}', servers.clients(proxy.port)
        process = start(place, model_dir, **variables)
        deadline = time.monotonic() + 120
        while not list(model_dir.glob('checkpoints/step-*/manifest.json')):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        proxy.out, proxy.latency = True, 0.0
        ((code, output),) = finish([process], timeout=60)
        assert code == 1, output
        # Threads that still wait for the network may log a line after it.
        assert re.search(
            r'^error: s3://bucket/train-\d.tfrecord could not be read, in \d+ tries and \d.\d s: ',
            output,
            re.MULTILINE,
        )
        assert 'Traceback' not in output
        proxy.out = False
        ((code, output),) = finish([start(place, model_dir, **variables)])
        assert code == 0, output
        assert 'resumed at step' in output
    assert (told(output), (model_dir / 'samples.tsv').read_text()) == undisturbed
