import gin
import pytest

from trainer import gin_files, gin_setup
from trainer.errors import ConfigError

DIRECTORY = "MODEL_DIR = 'd'"
EXTENSION = """
import gin

@gin.register
def built_by_gin(width: int = 1, **others):
    return width, others

@gin.configurable
def called_by_its_users(width: int = 1):
    return width

@gin.register
class Wide:
    def __init__(self, width: int = 1, **kwargs):
        self.width, self.kwargs = width, kwargs

@gin.register
class Wider(Wide):
    def __init__(self, factor: int = 2, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

@gin.register
def net(part=None, num_classes: int = 10):
    return part
"""


def load(*bindings, files=('runs/digits.gin',), **kwargs):
    gin_setup.load(gin_files.read(files, [DIRECTORY, *bindings]), **kwargs)


def refusal(*bindings, **kwargs):
    with pytest.raises(ConfigError) as raised:
        load(*bindings, **kwargs)
    return raised.value.message


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """A user's module with configurables of its own, and a file that imports it."""
    (tmp_path / 'phalanx_test_extension.py').write_text(EXTENSION)
    (tmp_path / 'mine.gin').write_text("include 'runs/digits.gin'\nimport phalanx_test_extension\n")
    monkeypatch.syspath_prepend(tmp_path)
    return str(tmp_path / 'mine.gin')


@pytest.mark.parametrize(
    ('binding', 'message'),
    [
        (
            'BATCH_SZ = 32',
            'the command line: BATCH_SZ is set, but nothing uses %BATCH_SZ. Did you mean '
            "'BATCH_SIZE'?",
        ),
        (
            'batch_size = 32',
            'the command line: batch_size is set, but nothing uses %batch_size. Did you mean '
            "'BATCH_SIZE'?",
        ),
        ('SEED = %SEDE', "the command line: %SEDE is not defined. Did you mean 'SEED'?"),
        ('SEED = %SEED', 'the command line: SEED = %SEED goes in a circle.'),
        (
            'tarin/Data.weight = None',
            'the command line: tarin/Data.weight has no effect, because Data is never called in '
            "the scope 'tarin', only as eval/Data, train/Data. Did you mean 'train/Data'?",
        ),
        (
            'keras.optimizers.SGD.momentum = 0.5',
            'the command line: SGD.momentum has no effect, because nothing refers to @SGD. Refer '
            'to it, or remove the binding.',
        ),
        (
            'train/Data.agument = None',
            "the command line: 'Data' has no parameter 'agument'. Did you mean 'augment'? It has "
            'source, inputs, label, weight, class_weights, preprocess, augment, on_bad_record.',
        ),
        (
            'cnn.filter = 3',
            "the command line: 'cnn' has no parameter 'filter'. Did you mean 'filters'? It has "
            'num_classes, input_shape, filters, units, dropout, l2, norm.',
        ),
        ('train.cluster = 3', 'the command line: the program itself sets train.cluster. Remove '
         'the binding.'),
        (
            'OPTIMIZER = @keras.optimizers.AdmW',
            "the command line: there is no 'keras.optimizers.AdmW'. Did you mean 'AdamW'? A "
            'function or class of your own must be registered with @gin.register and its module '
            'imported in the .gin file.',
        ),
        (
            'LOSS = @MeanSquaredError()',
            "the command line: 'MeanSquaredError' names several things. Write "
            'losses.MeanSquaredError or metrics.MeanSquaredError.',
        ),
        (
            "BATCH_SIZE = '64'",
            "the command line: BATCH_SIZE = '64', for train.batch_size, is of type str, but int is "
            'wanted. Write it without quotes: 64',
        ),
        (
            'train.batch_size = 6.5',
            'the command line: train.batch_size = 6.5 is of type float, but int is wanted.',
        ),
        (
            "keras.optimizers.AdamW.weight_decay = '0.1'",
            "the command line: AdamW.weight_decay = '0.1' is of type str, but float is wanted. "
            'Write it without quotes: 0.1',
        ),
        (
            "LEARNING_RATE = '0.1'",
            "the command line: LEARNING_RATE = '0.1', for Schedule.peak, is of type str, but float "
            'is wanted. Write it without quotes: 0.1',
        ),
        (
            'INPUT_SHAPE = [8, 8, 1]',
            'the command line: INPUT_SHAPE = [8, 8, 1], for cnn.input_shape, is of type list, but '
            'tuple[int, ...] | None is wanted. Write (8, 8, 1)',
        ),
        (
            'MODEL = @cnn()',
            "the command line: MODEL = @cnn(), for train.model, is called too early: it is built "
            "in the strategy's scope. Write @cnn",
        ),
        (
            'TRAIN_DATA = @train/Data',
            'the command line: TRAIN_DATA = @train/Data, for train.train_data, is given uncalled, '
            'but Data is wanted. Write @train/Data()',
        ),
        (
            'TRAIN_DATA = @train/digits()',
            'the command line: TRAIN_DATA = @train/digits(), for train.train_data, gives Arrays, '
            'but Data is wanted.',
        ),
        (
            'METRICS = [@keras.losses.SparseCategoricalCrossentropy()]',
            'the command line: METRICS = [@keras.losses.SparseCategoricalCrossentropy()], for '
            'train.metrics, gives SparseCategoricalCrossentropy, but Metric is wanted.',
        ),
        (
            'MODEL = @resnet',
            'resnet.num_classes is not set and has no default. Set it in a .gin file or with '
            '--gin.resnet.num_classes=VALUE.',
        ),
        (
            'AUGMENT = @random_shift',
            'random_shift.max_pixels is not set and has no default. Set it in a .gin file or with '
            '--gin.random_shift.max_pixels=VALUE.',
        ),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_clear_message(binding, message):
    assert refusal(binding) == message


def test_all_macros_left_to_the_user_are_named_at_once():
    with pytest.raises(ConfigError) as raised:
        gin_setup.load(gin_files.read(['base.gin'], ['STEPS = 3', 'BATCH_SIZE = 4']))
    assert raised.value.message == (
        'The configuration leaves MODEL_DIR, MODEL, OPTIMIZER, TRAIN_DATA to you. Set them with '
        '--model_dir=DIR --gin.MODEL=VALUE --gin.OPTIMIZER=VALUE --gin.TRAIN_DATA=VALUE or in a '
        '.gin file.'
    )


def test_a_mistake_in_a_file_is_located(tmp_path):
    path = tmp_path / 'mine.gin'
    path.write_text("include 'runs/digits.gin'\n\ntrain:\n  seed = 1\n  stepps = 3\n")
    assert refusal(files=[str(path)]).startswith(f"{path}:5: 'train' has no parameter 'stepps'.")


@pytest.mark.parametrize(
    'binding', ['LEARNING_RATE = 1', "train.steps = '2 epochs'", 'Keep.last = 5', 'BATCH_SIZE = 8',
                'AdamW.learning_rate = @keras.optimizers.schedules.ExponentialDecay()\n'
                'ExponentialDecay:\n  initial_learning_rate = 0.1\n  decay_steps = 9\n'
                '  decay_rate = 0.5'],
)  # fmt: skip
def test_right_values_pass(binding):
    load(binding)


def test_what_an_override_put_out_of_use_is_forgotten():
    load('OPTIMIZER = @keras.optimizers.Lion')
    assert 'Adam' not in gin.config_str()
    load(files=['runs/digits.gin', 'models/mlp.gin', 'optim/adamw_cosine.gin'])
    assert 'cnn' not in gin.config_str()


def test_what_this_run_does_not_call_may_lack_what_it_needs():
    load('export.data = None', unused=['export'])
    assert 'export.data = None is None' in refusal('export.data = None')


def test_the_configuration_is_locked_and_can_be_loaded_again():
    load('SEED = 1')
    with pytest.raises(RuntimeError, match='locked'):
        gin.bind_parameter('train.seed', 2)
    load('SEED = 3')
    assert gin.query_parameter('%SEED') == 3


def test_the_digest_follows_the_values_not_the_files():
    load('SEED = 1')
    first = gin_setup.digest()
    load('SEED = 2', 'SEED = 1')
    assert gin_setup.digest() == first
    load('SEED = 2')
    assert gin_setup.digest() != first


def test_a_module_of_the_user_is_imported_and_its_functions_are_checked(extension):
    load('MODEL = @net', 'net.part = @built_by_gin()', 'built_by_gin.width = 3', files=[extension])
    assert gin.get_configurable('net')() == (3, {})
    message = refusal('tarin/built_by_gin.width = 3', files=[extension])
    assert 'tarin/built_by_gin.width has no effect' in message
    message = refusal('MODEL = @net', "net.num_classes = '3'", files=[extension])
    assert 'Write it without quotes: 3' in message


def test_what_python_code_calls_by_itself_needs_no_reference(extension):
    load('called_by_its_users.width = 3', 's/called_by_its_users.width = 4', files=[extension])
    assert gin.get_configurable('called_by_its_users')() == 3


def test_behind_kwargs_other_names_pass_but_misspelt_ones_do_not(extension):
    use = ('MODEL = @net', 'net.part = @built_by_gin()')
    load(*use, 'built_by_gin.colour = "red"', files=[extension])
    assert gin.get_configurable('net')() == (1, {'colour': 'red'})
    assert "Did you mean 'width'?" in refusal(*use, 'built_by_gin.widht = 3', files=[extension])


def test_a_constructor_takes_the_names_of_its_base_classes_too(extension):
    use = ('MODEL = @net', 'net.part = @Wider()')
    load(*use, 'Wider.factor = 3', 'Wider.width = 4', files=[extension])
    part = gin.get_configurable('net')()
    assert (part.factor, part.width) == (3, 4)


def test_a_missing_module_is_named_with_its_line(tmp_path):
    path = tmp_path / 'mine.gin'
    path.write_text("include 'runs/digits.gin'\nimport no_such_module.part\n")
    assert refusal(files=[str(path)]) == (
        f"{path}:2: there is no module 'no_such_module.part'. A module of your own must lie in the "
        'working directory or on PYTHONPATH.'
    )


def test_a_failure_inside_a_users_module_is_not_disguised(tmp_path, monkeypatch):
    (tmp_path / 'phalanx_test_broken.py').write_text('import no_such_module_inside')
    (tmp_path / 'mine.gin').write_text('import phalanx_test_broken\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='no_such_module_inside'):
        load(files=[str(tmp_path / 'mine.gin')])


@pytest.mark.parametrize('run', ['runs/digits.gin', 'runs/digits_resnet.gin'])
def test_the_record_reads_back_as_the_same_configuration(run, tmp_path):
    load(files=[run])
    gin.get_configurable('train/Data')()
    record, digest = gin_setup.record(), gin_setup.digest()
    assert 'train/Data.weight = None' in record  # A default, of what was called.
    assert 'export.data = %TRAIN_DATA' in record  # A binding, of what was not.
    path = tmp_path / 'config-0.gin'
    path.write_text(record)
    gin_setup.load(gin_files.read([str(path)]))
    gin.get_configurable('train/Data')()
    assert gin_setup.record() == record
    assert gin_setup.digest() != digest  # The defaults are now said.
