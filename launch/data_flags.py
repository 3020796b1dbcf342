"""The flags of the verbs that look at data and not at a run."""

from collections.abc import Sequence

from absl import flags

from trainer import gin_files
from trainer.errors import ConfigError, nearest

_SPLITS = 'splits.gin'  # Leads from the macros of a file of data/ to the sources.


def define() -> flags.FlagValues:
    """Returns the flags that name data, as those of `python -m trainer` do, to be added to."""
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    flags.DEFINE_multi_string('gin_file', [], 'A .gin file.', flag_values=values)
    flags.DEFINE_multi_string('gin_bindings', [], 'A line of gin.', flag_values=values)
    flags.DEFINE_multi_string('gin_search_path', [], 'For .gin files.', flag_values=values)
    return values


def check_choice(flag: str, value: str, known: Sequence[str]) -> None:
    """Raises ConfigError for a value that is none of those known."""
    if value not in known:
        raise ConfigError(f'--{flag}={value} is none of {", ".join(known)}.{nearest(value, known)}')


def read(values: flags.FlagValues) -> gin_files.Script:
    """Returns the configuration of the data that the flags name, for `gin_setup.sources`.

    Raises:
        ConfigError: a file is missing, or a line cannot be parsed.
    """
    return gin_files.read([_SPLITS, *values.gin_file], values.gin_bindings, values.gin_search_path)
