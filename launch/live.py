"""The live display of a job in a terminal: its progress and its workers, below what it prints."""

import sys
import time
from collections.abc import Callable, Sequence

from rich.ansi import AnsiDecoder
from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from launch.display import Attempt, Display, count, write
from launch.standing import Standing
from launch.watch import Watch
from trainer.observe.progress import duration, number

_REFRESH_SECONDS = 0.25
# The directory of checkpoints may be on a network.
_LOOK_SECONDS = 1.0


class Live(Display):
    """Shows a job in a terminal, until the block is left; the last state stays there."""

    def __init__(
        self,
        logs: str = 'chief',
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares a display; nothing is shown yet.

        Args:
            logs: whose output is shown above, one of `launch.display.LOGS`.
            console: where; None is stdout.
            clock: seconds, never going back.
        """
        # Progress has its place here, so the workers' lines all pass through.
        super().__init__(logs, progress=False, clock=clock)
        self._console = console or Console(file=_Stdout(), force_terminal=True)
        # The launcher's own loop refreshes it: no thread, and nothing while nothing is new.
        self._live = RichLive(
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._render,
        )
        self._waiting: list[str] = []
        self._refreshed = self._looked = float('-inf')
        self._checkpoint = 0

    def __enter__(self) -> 'Live':
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._looked = float('-inf')
        self._live.stop()
        self._put()

    def begin(self, attempt: Attempt) -> None:
        super().begin(attempt)
        self._put()

    def show(self) -> None:
        super().show()
        if self._clock() - self._refreshed < _REFRESH_SECONDS:
            return
        # How a job ended is its last word, below the last state.
        if self._attempt.watch.newest[0].get('phase') != 'ending':
            self._put()
        self._live.refresh()
        self._refreshed = self._clock()

    def say(self, text: str) -> None:
        if not (sys.stderr and sys.stderr.isatty()):
            super().say(text)
            return
        self._waiting += text.split('\n')
        self._put()

    def _print(self, lines: Sequence[str]) -> None:
        self._waiting += lines

    def _put(self) -> None:
        """Prints what waits, above the display if that is on."""
        if not self._waiting:
            return
        # Colours of a line are kept. Whatever moves the cursor would spoil the display, and of a
        # line that was written over and over the last state is left.
        decoded = [AnsiDecoder().decode_line(text.rstrip('\r')) for text in self._waiting]
        self._waiting.clear()
        # The terminal wraps long lines by itself, and what is copied from it stays one line.
        text = Text('\n', no_wrap=True, overflow='ignore').join(decoded)
        # In a group, for `print` would make another text of it, which does not know this.
        self._console.print(Group(text), crop=False)

    def _render(self) -> RenderableType:
        attempt = self._attempt
        if attempt is None:
            return Text()
        if self._clock() - self._looked >= _LOOK_SECONDS:
            self._checkpoint, self._looked = attempt.checkpoint(), self._clock()
        return Group(
            _progress(self._standing),
            _figures(self._standing, attempt, self._checkpoint),
            _workers(attempt.watch, self._codes, self._ended),
        )


def _progress(standing: Standing) -> RenderableType:
    step, last_step, eta = standing.step, standing.last_step, standing.eta_seconds
    grid = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None, None):
        grid.add_column(ratio=ratio, no_wrap=True)
    grid.add_row(
        f'step {step:,}/{last_step:,}' if last_step else 'starting',
        ProgressBar(total=max(last_step, 1), completed=step),
        # Rounded down: 100 % is said of a job that is done.
        f'{100 * step // last_step} %' if last_step else '',
        f'ETA {"-:--:--" if eta is None else duration(eta)}',
    )
    return grid


def _figures(standing: Standing, attempt: Attempt, checkpoint: int) -> RenderableType:
    said, parts = standing.said, []
    if 'loss' in said:
        parts.append(f'loss {number(said["loss"])}')
    if 'examples_per_second' in said:
        parts.append(f'{said["examples_per_second"]:,.0f} examples/s')
    if standing.input_wait is not None:
        parts.append(f'input wait {100 * standing.input_wait:.0f} %')
    parts.append(f'checkpoint {checkpoint:,}' if checkpoint else 'no checkpoint')
    parts += [f'attempt {attempt.number}', count(attempt.restarts, 'restart')]
    return Text('  '.join(parts))


def _workers(watch: Watch, codes: Sequence[int | None], ended: bool) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    for name, justify in (
        ('worker', 'right'),
        ('phase', 'left'),
        ('step', 'right'),
        ('last word', 'right'),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    silences = watch.silences()
    for index, code in enumerate(codes):
        said, word = watch.newest[index], ''
        if code is not None:
            phase = f'ended with {code}'
        elif ended:
            phase = 'ended by the launcher'
        else:
            phase, word = said.get('phase', 'starting'), f'{silences[index]:.0f} s ago'
        step = f'{said["step"]:,}' if 'step' in said else ''
        table.add_row(str(index), phase, step, word, style='red' if code else '')
    return table


class _Stdout:
    """Stdout for rich, which would end the program when it is closed."""

    encoding = property(lambda self: sys.stdout.encoding)

    def write(self, text: str) -> None:
        write(text, sys.stdout)

    def flush(self) -> None:
        pass  # Done by `write`.

    def isatty(self) -> bool:
        return True
