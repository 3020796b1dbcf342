#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=3
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="/shared/it's \"100%%\" #1;$(x)/logs/slurm-%j.out"
#SBATCH --constraint="a b#\"\\c"
export EMPTY=''
export HOSTILE=$'a b\'c"d`touch {0}`$(touch {0});touch {0}\x0d\x0a#SBATCH --hold\x0a\x09\\x41 % ü'
cd -- '/home/me/a b$(x)' || exit 2
exec /home/me/.venv/bin/python -m launch.backends.slurm_step \
  '--model_dir=/shared/it'"'"'s "100%" #1;$(x)' \
  --max_restarts=3 \
  --grace_seconds=60 \
  -- srun \
  --ntasks-per-node=1 \
  --kill-on-bad-exit=0 \
  --wait=30 \
  --mpi=none \
  --export=ALL \
  --cpu-bind=none \
  /home/me/.venv/bin/python -m launch.task \
  --scheduler=slurm \
  '--gin_script=/shared/it'"'"'s "100%" #1;$(x)/config/submitted-4f53cda18c2baa0c.json' \
  '--model_dir=/shared/it'"'"'s "100%" #1;$(x)' \
  --workers=3 \
  --workers_per_host=1 \
  --max_restarts=3 \
  --grace_seconds=60 \
  --patience_seconds=60 \
  --meeting_seconds=300 \
  $'--gin_bindings=X=a b\'c"d`touch {0}`$(touch {0});touch {0}\x0d\x0a#SBATCH --hold\x0a\x09\\x41 % ü'
