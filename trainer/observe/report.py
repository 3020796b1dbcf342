"""What a run says of itself at every log: a line, and points in TensorBoard."""

from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from trainer.observe.progress import Progress
from trainer.observe.tensorboard import TensorBoard


class Report:
    """Sums what the steps report until it is time to say it.

    Args:
        progress: of the whole job.
        batch_size: global batch size.
        board: where the chief writes points; None on the other workers, which say nothing.
    """

    def __init__(self, progress: Progress, batch_size: int, board: TensorBoard | None):
        self._progress, self._batch_size, self._board = progress, batch_size, board
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._steps, self._seconds = 0, 0.0

    def add(self, totals: Mapping[str, np.ndarray], num_steps: int, seconds: float) -> None:
        """Adds what one call of `TrainStep.run` returned, how many steps it took and how long."""
        for name, value in totals.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._steps += num_steps
        self._seconds += seconds

    def write(
        self,
        step: int,
        results: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
        extra: Callable[[], dict[str, float]],
    ) -> dict[str, float]:
        """Reports the steps since the last report.

        Args:
            step: steps taken.
            results: turns sums over steps into means, `TrainStep.results`.
            extra: further points for TensorBoard, computed on the chief only.

        Returns:
            The means, on every worker.
        """
        values = results(self._sums)
        if self._board:
            seconds = max(self._seconds, 1e-9)
            rates = {
                'steps_per_second': self._steps / seconds,
                'examples_per_second': self._steps * self._batch_size / seconds,
                'input_wait': min(1.0, float(self._sums['input_seconds']) / seconds),
            }
            shown = {name: value for name, value in values.items() if name != 'gradient_norm'}
            logging.info(
                '%s',
                self._progress.line(
                    step,
                    shown,
                    examples_per_second=rates['examples_per_second'],
                    input_wait=rates['input_wait'],
                ),
            )
            self._board.scalars(step, {**values, **rates, **extra()})
        self._start()
        return values
