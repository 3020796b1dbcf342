"""Stands in for `launch.task` where a test is about Slurm: tells what it was given, and ends as the
environment says.

END is what its tasks do, a word for each start, the last one for all further ones: an exit code;
'killed', rank 1 alone, by SIGKILL; 'wait' for a signal, and end with 75 a second later; or 'deaf',
which takes no notice of one. With SAVES they leave a checkpoint before they end with 75.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

model_dir = next(each for each in sys.argv if each.startswith('--model_dir=')).partition('=')[2]
rank = int(os.environ['SLURM_PROCID'])
told = Path(model_dir) / f'told-{rank}.jsonl'
told.parent.mkdir(parents=True, exist_ok=True)


def tell(**facts):
    with open(told, 'a', encoding='utf-8') as file:
        file.write(json.dumps(facts) + '\n')


def stop(number, frame):
    tell(signal=number)
    if what != 'deaf':
        time.sleep(1)
        if os.environ.get('SAVES'):
            step = Path(model_dir) / 'checkpoints' / f'step-{starts + 1:08d}'
            step.mkdir(parents=True, exist_ok=True)
            (step / 'manifest.json').write_text('{}')
        print(f'task {rank} has saved', flush=True)
        os._exit(75)


starts = told.read_text().count('"host"') if told.exists() else 0
ends = os.environ['END'].split()
what = ends[min(starts, len(ends) - 1)]
for each in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(each, stop)
tell(
    host=os.uname().nodename,
    nodes=os.environ['SLURM_STEP_NODELIST'],
    gpus=os.environ.get('CUDA_VISIBLE_DEVICES'),
    value=os.environ.get('VALUE'),
    directory=os.getcwd(),
    arguments=sys.argv[1:],
)
print(f'task {rank} on {os.uname().nodename}', flush=True)
if what == 'killed' and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if what.isdigit():
    sys.exit(int(what))
while True:
    signal.pause()
