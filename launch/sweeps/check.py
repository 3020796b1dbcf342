"""Whether the configurations of a sweep are all right: a program, for it loads TensorFlow.

`python -m launch.sweeps.check UNUSED FILE ...`: the first argument names what will not be called,
with commas between; each file is one that `Script.save` has written. The first mistake is printed,
and the exit code is 2 then.
"""

import sys

from trainer import gin_files
from trainer.errors import ConfigError


def main() -> int:
    """Checks all files and returns the exit code."""
    from trainer import gin_setup

    _, unused, *files = sys.argv
    for file in files:
        try:
            gin_setup.load(gin_files.load(file), unused=unused.split(','))
        except ConfigError as error:
            print(error.message)
            return ConfigError.exit_code
    return 0


if __name__ == '__main__':
    sys.exit(main())
