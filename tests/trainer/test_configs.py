import re

import gin
import numpy as np
import pytest

from trainer import gin_files, gin_setup

CONFIGS = gin_files.shipped_configs()
RUNS = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob('runs/*.gin'))
FILES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob('*.gin'))
# What the user has to say, beside MODEL_DIR.
_IMAGES = ['INPUT_SHAPE = (28, 28, 1)', 'NUM_CLASSES = 10']
LEFT_TO_THE_USER = {
    'runs/array_record.gin': ["TRAIN_FILES = 'a'", "EVAL_FILES = 'b'", *_IMAGES],
    'runs/tfrecord.gin': ["TRAIN_FILES = 'a'", "EVAL_FILES = 'b'", *_IMAGES],
    'runs/image_folder.gin': ["DATA_DIR = 'd'", 'NUM_CLASSES = 10'],
    'runs/mnist_cnn.gin': ["DATA_DIR = 'd'"],
    'runs/mnist_resnet.gin': ["DATA_DIR = 'd'"],
    'runs/fine_tune.gin': ["DATA_DIR = 'd'", 'NUM_CLASSES = 10', 'WEIGHTS = None'],
    'models/application.gin': ['WEIGHTS = None'],
    'runs/prepared.gin': ["DATA_DIR = 'd'", *_IMAGES],
    'runs/table.gin': ["FILES = 'd.csv'", "LABEL = 'y'", 'NUM_CLASSES = 3'],
    'runs/table_regression.gin': ["FILES = 'd.csv'", "LABEL = 'y'"],
    'runs/text.gin': ["TRAIN_FILES = 'a.txt'", "EVAL_FILES = 'b.txt'"],
    'runs/text_folder.gin': ["DATA_DIR = 'd'", 'NUM_CLASSES = 4'],
    'runs/tokens.gin': [
        "TRAIN_FILES = 'a.txt'",
        "EVAL_FILES = 'b.txt'",
        "TOKENIZER = 't.json'",
        'NUM_CLASSES = 300',
    ],
}


def load(run, *more):
    said = [said for file in (run, *more) for said in LEFT_TO_THE_USER.get(file, ())]
    said.append("MODEL_DIR = 'd'")
    gin_setup.load(gin_files.read([run, *more], said))


def test_the_shipped_runs_are_there():
    assert 'runs/digits.gin' in RUNS


@pytest.mark.parametrize('run', RUNS)
def test_every_run_parses_and_passes_the_checks(run):
    load(run)


@pytest.mark.parametrize('data', [file for file in FILES if file.startswith('data/')])
def test_every_data_file_is_enough_for_preparing_and_inspecting(data):
    run = {'data/mnist.gin': 'runs/mnist_cnn.gin'}.get(data, data.replace('data/', 'runs/'))
    script = gin_files.read(['splits.gin', data], LEFT_TO_THE_USER.get(run, ()))
    gin_setup.load(script, unused={'train', 'evaluate', 'export', 'strategy', 'meet'})
    assert gin.query_parameter('%TRAIN_DATA')


@pytest.mark.parametrize('run', RUNS)
def test_every_run_works_on_several_workers(run):
    load(run, 'cluster/multi_worker.gin')
    assert gin.query_parameter('strategy.kind') == 'multi_worker'


@pytest.mark.parametrize('optimizer', [file for file in FILES if file.startswith('optim/')])
@pytest.mark.parametrize('model', [file for file in FILES if file.startswith('models/')])
@pytest.mark.parametrize('run', ['runs/digits.gin', 'runs/mnist_cnn.gin'])
def test_models_and_optimizers_combine_freely(run, model, optimizer):
    load(run, model, optimizer)


@pytest.mark.parametrize('run', RUNS)
def test_the_model_and_the_optimizer_of_every_run_can_be_built(run):
    load(run)
    model = gin.query_parameter('%MODEL').scoped_configurable_fn()
    # The data alone know the width of a table's vectors, and the length of windows.
    shape = gin_setup.parameter('%INPUT_SHAPE') or (7,)
    outputs = model(np.zeros((2, *shape), np.float32))
    width = {'runs/digits_gan.gin': 1, 'runs/digits_simclr.gin': 64}.get(run)
    width = width or gin.query_parameter('%NUM_CLASSES')
    assert (outputs.shape[0], outputs.shape[-1]) == (2, width)
    optimizer = gin.query_parameter('%OPTIMIZER').scoped_configurable_fn()
    optimizer.build(model.trainable_variables)


@pytest.mark.parametrize('file', FILES)
def test_every_file_is_small_and_says_what_it_is_for(file):
    lines = (CONFIGS / file).read_text().splitlines()
    assert lines[0].startswith('# ')
    assert len(lines) <= 60


@pytest.mark.parametrize('file', FILES)
def test_only_runs_include_and_only_the_base_imports(file):
    text = (CONFIGS / file).read_text()
    assert bool(re.search(r'^include', text, re.MULTILINE)) == file.startswith('runs/')
    assert bool(re.search(r'^(import|from)', text, re.MULTILINE)) == (file == 'base.gin')
