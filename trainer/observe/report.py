"""Everything a run says of itself beside its checkpoints: lines, curves, configuration, samples."""

from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

from trainer.model_dir import ModelDir
from trainer.observe import phases
from trainer.observe.config_record import record_config
from trainer.observe.progress import Progress, line
from trainer.observe.sample_log import SampleLog
from trainer.observe.tensorboard import TensorBoard


class Report:
    """Adds up what the steps report, and writes it when it is time; only the chief writes.

    Args:
        dirs: of the run.
        writes: whether this worker is the chief; the others only add up.
        step: the step the run goes on from; what was written beyond it is taken back.
        last_step: the length of the run.
        batch_size: global batch size.
        config_text: the configuration, for the record.
        sample_log: whether record numbers are written.
        evaluates: whether the run evaluates by itself.
    """

    def __init__(
        self,
        dirs: ModelDir,
        *,
        writes: bool,
        step: int,
        last_step: int,
        batch_size: int,
        config_text: str,
        sample_log: bool = False,
        evaluates: bool = True,
    ):
        self._batch_size, self._last_step = batch_size, last_step
        self._progress = Progress(last_step, step)
        self._train = self._eval = self._samples = None
        if writes:
            record_config(dirs.config, step, config_text)
            self._train = TensorBoard(dirs.train, resume_step=step)
            self._train.text(step, 'config', f'```\n{config_text}\n```')
            if evaluates:  # Or an evaluator beside the job may be writing there.
                self._eval = TensorBoard(dirs.eval, resume_step=step)
            if sample_log:
                self._samples = SampleLog(dirs.path, resume_step=step)
        self._start()

    def _start(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._steps, self._seconds = 0, 0.0

    def add(self, totals: Mapping[str, np.ndarray], first_step: int, steps: int, seconds: float):
        """Adds what one call of `TrainStep.run` returned.

        Args:
            totals: sums over the steps of the call.
            first_step: how many steps had been taken before it.
            steps: how many it took.
            seconds: how long it took.
        """
        for name, value in totals.items():
            if name == 'ids':
                if self._samples:
                    self._samples.write(first_step, value)
            else:
                self._sums[name] = self._sums.get(name, 0) + value
        self._steps += steps
        self._seconds += seconds

    def figures(
        self, totals: Mapping[str, np.ndarray], steps: int, seconds: float
    ) -> dict[str, float]:
        """Returns what a launcher wants to know of a call of `TrainStep.run`, see `add`."""
        figures = {
            'seconds': round(seconds, 4),
            'input_seconds': round(float(totals['input_seconds']), 4),
            'work_seconds': round(float(totals['work_seconds']), 4),
            'examples_per_second': round(steps * self._batch_size / seconds, 1),
        }
        if totals['finite_steps']:
            figures['loss'] = float(totals['loss'] / totals['finite_steps'])
        return figures

    def train(
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
        if self._train:
            seconds = max(self._seconds, 1e-9)
            pace = self._steps * self._batch_size / seconds
            wait = min(1.0, float(self._sums['input_seconds']) / seconds)
            shown = {name: value for name, value in values.items() if name != 'gradient_norm'}
            text = self._progress.line(step, shown, examples_per_second=pace, input_wait=wait)
            logging.info('%s', text)
            rates = {
                'steps_per_second': self._steps / seconds,
                'examples_per_second': pace,
                'input_wait': wait,
            }
            self._train.scalars(step, {**values, **rates, **extra()})
        self._start()
        return values

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Reports the results of an evaluation."""
        if self._eval:
            logging.info('evaluation at %s', line(step, self._last_step, values))
            self._eval.scalars(step, values)
            # Sweeps go by it while the run is on.
            phases.enter('stepping', step=step, **{f'eval/{n}': v for n, v in values.items()})

    def histograms(self, step: int, arrays: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Writes the distributions of arrays, computed on the chief only."""
        if self._train:
            self._train.histograms(step, arrays())

    def flush(self) -> None:
        """Puts everything into files; a run that resumes will not write it again."""
        for board in (self._train, self._eval):
            if board:
                board.flush()

    def sample_sha256(self) -> str | None:
        """Returns the digest of the sample log, if this worker writes one."""
        return self._samples.sha256() if self._samples else None

    def close(self) -> None:
        """Closes the files, if they are not closed already."""
        files, self._train, self._eval, self._samples = (
            (self._train, self._eval, self._samples),
            None,
            None,
            None,
        )
        for file in files:
            if file:
                file.close()
