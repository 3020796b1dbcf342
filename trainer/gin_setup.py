"""The seam between gin and the library, which knows nothing of gin.

Importing this module registers what a .gin file may name. `configs/base.gin` imports it, so that
the recorded configuration of a run can be read again.
"""

import copy
import hashlib
import importlib
import inspect
import os
from collections.abc import Callable, Collection
from typing import Any

import gin
import keras

from trainer import gin_checks, gin_files
from trainer.data import (
    array_record,
    arrays,
    augment,
    augment_colour,
    breast_cancer,
    digits,
    idx,
    image_folder,
    mix,
    one_hot,
    paired,
    prepared,
    table,
    table_features,
    text,
    text_folder,
    tfds,
    tfrecord,
)
from trainer.data.batch import Data
from trainer.data.mixture import mixture
from trainer.data.serve import Server, prepare_process
from trainer.data.source import Source
from trainer.data.subset import subset
from trainer.data.workers import DataWorkers
from trainer.divergence import Divergence
from trainer.early_stop import EarlyStop
from trainer.errors import ConfigError
from trainer.evaluate import evaluate as _evaluate
from trainer.export.saved_model import export as _export
from trainer.groups import Group, layerwise_rates, no_decay
from trainer.meeting import meet as _meet
from trainer.metrics import BitsPerByte
from trainer.models import (
    application,
    cnn,
    gan,
    linear,
    mlp,
    resnet,
    simclr,
    text_classifier,
    transformer_lm,
    vit,
    wide_and_deep,
)
from trainer.prepare import splits as _splits
from trainer.range_test import RangeTest
from trainer.range_test import range_test as _range_test
from trainer.replay import Replay
from trainer.replay import replay as _replay
from trainer.retention import Keep
from trainer.schedule import Schedule, scaled_rate
from trainer.strategy import build_strategy as _build_strategy
from trainer.train import train as _train
from trainer.warm_start import WarmStart

# What the program calls, by gin's name, with the parameters that the program itself supplies.
_ROOTS = {
    'train': (_train, ('strategy', 'cluster', 'config', 'data_workers')),
    'evaluate': (_evaluate, ('strategy',)),
    'export': (_export, ()),
    'strategy': (_build_strategy, ('cluster',)),
    'meet': (_meet, ('cluster', 'digest')),
    'splits': (_splits, ()),
}
train, evaluate, export, build_strategy, meet, _sources = (
    gin.external_configurable(function, name, module='trainer', denylist=supplied or None)
    for name, (function, supplied) in _ROOTS.items()
)

_PARTS = (
    Data,
    mixture,
    subset,
    Keep,
    Divergence,
    WarmStart,
    EarlyStop,
    Schedule,
    scaled_rate,
    Group,
    no_decay,
    layerwise_rates,
    array_record.array_record,
    arrays.npz,
    breast_cancer.breast_cancer,
    digits.digits,
    idx.idx,
    prepared.prepared,
    tfrecord.tfrecord,
    image_folder.image_folder,
    one_hot.one_hot,
    paired.paired,
    paired.two_views,
    table.table,
    table_features.table_features,
    text.text,
    text_folder.text_folder,
    text_folder.byte_tokens,
    tfds.tfds,
    augment.random_shift,
    augment.random_flip,
    augment.random_resized_crop,
    augment.random_cutout,
    augment_colour.random_colour,
    mix.mixup,
    mix.cutmix,
    augment.scale_images,
    augment.chain,
    BitsPerByte,
    application.application,
    text_classifier.text_classifier,
    transformer_lm.transformer_lm,
    cnn.cnn,
    gan.gan,
    gan.gan_losses,
    linear.linear,
    mlp.mlp,
    resnet.resnet,
    vit.vit,
    simclr.simclr,
    simclr.nt_xent,
    wide_and_deep.wide_and_deep,
)
for _part in _PARTS:
    gin.register(_part, module='trainer')
for _module in (
    keras.optimizers,
    keras.optimizers.schedules,
    keras.losses,
    keras.metrics,
):
    for _class in vars(_module).values():
        if inspect.isclass(_class):
            gin.register(_class, module=_module.__name__)


def load(script: gin_files.Script, unused: Collection[str] = ()) -> None:
    """Makes what was read the configuration of this process, checked and locked.

    Args:
        script: from `trainer.gin_files.read`.
        unused: which of 'train', 'evaluate', 'export' will not be called, so that what they need
            may be missing.

    Raises:
        ConfigError: any mistake in the configuration.
    """
    gin.clear_config()  # Which also lets the modules imported next register what they have.
    for module, where in script.imports:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f'{module}.'.startswith(f'{error.name}.'):
                raise
            raise ConfigError(
                f'{where}: there is no module {module!r}. A module of your own must lie in the '
                'working directory or on PYTHONPATH.'
            ) from None
    roots = {name: supplied for name, (_, supplied) in _ROOTS.items()}
    dormant = gin_checks.check(script.bindings, roots, unused)
    gin.parse_config(script.text)
    for scope, selector, parameter in dormant:
        bound = gin.config._CONFIG[scope, selector]
        del bound[parameter]
        if not bound:
            del gin.config._CONFIG[scope, selector]
    for name in gin_files.left_open(script):
        # Nothing that is called uses it, as the checks have seen; gin wants all of them set.
        gin.bind_parameter(f'{name}/{gin_files.MACRO}.value', None)
    gin.finalize()


def sources(script: gin_files.Script) -> dict[str, Source]:
    """Makes what was read the configuration of this process, and returns the sources it names.

    Args:
        script: what `configs/splits.gin` says, and then a file of a data set or of a run.

    Returns:
        Of each split that there is, 'train' and 'test', its source.

    Raises:
        ConfigError: any mistake in the configuration.
    """
    load(script, unused=_ROOTS.keys() - {'splits'})
    return _sources()


def digest() -> str:
    """Returns the sha256, in hex digits, of all that is configured: equal on all workers."""
    return hashlib.sha256(gin.config_str().encode()).hexdigest()


def model_dir() -> str:
    """Returns the directory that `train` will be given."""
    return parameter('train.model_dir')


def parameter(name: str) -> Any:
    """Returns what a parameter is set to, macros and references followed; None if it is not set."""
    try:
        value = gin.query_parameter(name)
    except ValueError:
        return None
    is_reference = isinstance(value, gin.config.ConfigurableReference)
    return value.scoped_configurable_fn() if is_reference else value


def replay(**given: Any) -> Replay:
    """Calls `trainer.replay` with what is configured of `train`, and with what is given."""
    return _replay(**_as_for_train(_replay, given), **given)


def range_test(**given: Any) -> RangeTest:
    """Calls `trainer.range_test` in the same way."""
    return _range_test(**_as_for_train(_range_test, given), **given)


def _as_for_train(function: Callable, given: Collection[str]) -> dict[str, Any]:
    """What is configured of `train` and wanted by a function, but for what is given."""
    configured = gin.get_bindings('train', resolve_references=False)
    names = inspect.signature(function).parameters.keys() - set(given)
    # A copy of a reference is what it refers to; what the function does not need is not made.
    return {n: copy.deepcopy(configured[n]) for n in names & configured.keys()}


def data_workers() -> DataWorkers | None:
    """Returns the data workers that the environment names, None if it names none.

    Raises:
        ConfigError: an address is none.
    """
    return DataWorkers.from_environ(config_sha256=digest())


def data_server(address: str) -> Server:
    """Returns a server of the batches that `train` would make itself.

    Args:
        address: 'host:port', see `Server`.

    Raises:
        ConfigError: a mistake in the data, or the address cannot be listened on.
    """
    deterministic = parameter('strategy.deterministic')
    threads = len(os.sched_getaffinity(0))
    prepare_process(threads=threads, deterministic=deterministic is None or deterministic)
    return Server(
        address,
        train_data=parameter('train.train_data'),
        eval_data=parameter('train.eval_data'),
        seed=parameter('train.seed') or 0,
        config_sha256=digest(),
        threads=threads,
    )


def record() -> str:
    """Returns the configuration as the text of a .gin file that gives the same run again.

    It holds what was set and, of all functions called so far, the defaults too: gin's operative
    configuration, which alone would lack what `evaluate` and `export` need in a run that trains.
    """
    merged = {key: dict(bound) for key, bound in gin.config._OPERATIVE_CONFIG.items()}
    for key, bound in gin.config._CONFIG.items():
        merged.setdefault(key, {}).update(bound)
    return gin.config._config_str(merged)
