"""The versions that a run's results depend on."""

import importlib.metadata
import platform

__version__ = '0.1.0'


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that compute."""
    import keras
    import numpy
    import tensorflow

    return {
        'phalanx': __version__,
        'python': platform.python_version(),
        'tensorflow': tensorflow.__version__,
        'keras': keras.__version__,
        'numpy': numpy.__version__,
    }


def installed() -> dict[str, str]:
    """Returns the same by what is installed, without importing any of it."""
    found = {'phalanx': __version__, 'python': platform.python_version()}
    for name in ('tensorflow', 'keras', 'numpy'):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = 'unknown'  # Installed under another name, as tensorflow-cpu.
    return found
