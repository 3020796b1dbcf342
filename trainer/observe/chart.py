"""Charts as PNG files, by matplotlib, which is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def blank(path: Path, width: float, height: float) -> Figure:
    """Returns an empty figure for `save`.

    Args:
        path: where it shall go, for the message.
        width, height: in inches of 120 pixels.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            f'The picture {str(path)!r} needs matplotlib, which is not installed. Run: '
            "pip install 'phalanx[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout='constrained')


def save(figure: Figure, path: Path) -> None:
    """Writes a figure.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        figure.savefig(path, format='png', dpi=120)
    except OSError as error:
        raise ConfigError(
            f'The picture {str(path)!r} cannot be written: {error.strerror}. Name a file in a '
            'directory that is there and has room.'
        ) from error
