"""What TensorBoard's HParams page shows of a sweep, written without TensorFlow."""

from collections.abc import Mapping
from pathlib import Path

from launch.board import write_events
from launch.sweeps.plan import Plan, plain

_END = {'finished': 'STATUS_SUCCESS', 'stopped': 'STATUS_SUCCESS', 'failed': 'STATUS_FAILURE'}


def write_experiment(directory: Path, plan: Plan) -> None:
    """Writes at the root of a sweep what its parameters and its metric are, in place of before.

    Raises:
        OSError: it cannot be written.
    """
    for before in directory.glob('*tfevents*'):
        before.unlink()
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    group, tag = plan.metric.split('/', 1)
    metric = api_pb2.MetricInfo(
        name=api_pb2.MetricName(group=group, tag=tag), display_name=plan.metric
    )
    parameters = [api_pb2.HParamInfo(name=n, type=_type(plan, n)) for n in plan.parameters]
    experiment = api_pb2.Experiment(hparam_infos=parameters, metric_infos=[metric])
    data = plugin_data_pb2.HParamsPluginData(experiment=experiment)
    _write(directory, metadata.EXPERIMENT_TAG, data)


def write_start(directory: Path, parameters: Mapping[str, str]) -> None:
    """Writes the values of a trial into its directory, unless they are there.

    Raises:
        OSError: they cannot be written.
    """
    if any(directory.glob('*tfevents*')):
        return
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    start = plugin_data_pb2.SessionStartInfo()
    for name, text in parameters.items():
        value = plain(text)
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, str):
            start.hparams[name].string_value = value
        else:
            start.hparams[name].number_value = value
    data = plugin_data_pb2.HParamsPluginData(session_start_info=start)
    _write(directory, metadata.SESSION_START_INFO_TAG, data)


def write_end(directory: Path, state: str) -> None:
    """Writes into the directory of a trial how it ended.

    Raises:
        OSError: it cannot be written.
    """
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = api_pb2.Status.Value(_END[state])
    end = plugin_data_pb2.SessionEndInfo(status=status)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=end)
    _write(directory, metadata.SESSION_END_INFO_TAG, data)


def _write(directory: Path, tag: str, data) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata

    about = metadata.create_summary_metadata(data)
    value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
    write_events(directory, 0, value)


def _type(plan: Plan, name: str):
    from tensorboard.plugins.hparams import api_pb2

    kinds = {type(plain(text)) for text in plan.parameters[name].ends}
    if kinds == {bool}:
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_FLOAT64 if kinds <= {int, float} else api_pb2.DATA_TYPE_STRING
