"""The command line of a verb: its flags, and a sentence for one that is wrong."""

from collections.abc import Sequence

from absl import flags

from trainer.errors import ConfigError, nearest
from trainer.flags import reason


def parse(values: flags.FlagValues, verb: str, argv: Sequence[str]) -> list[str]:
    """Parses the arguments of a verb and returns those that are no flags.

    Raises:
        ConfigError: a flag is unknown, lacks its value or has a wrong one.
    """
    try:
        return values(['phalanx', *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        mend = nearest(error.flagname, list(values))
        raise ConfigError(
            f'Unknown flag --{error.flagname} of phalanx {verb}.{mend} phalanx --help lists the '
            'flags.'
        ) from None
    except flags.Error as error:
        raise ConfigError(f'{reason(error)}. phalanx --help lists the flags.') from None
