#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=3
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/digits/logs/slurm-%j.out
export PYTHONPATH=/home/me/project
cd -- /home/me/project || exit 2
exec /home/me/.venv/bin/python -m launch.backends.slurm_step \
  --model_dir=/shared/runs/digits \
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
  --gin_script=/shared/runs/digits/config/submitted-4f53cda18c2baa0c.json \
  --model_dir=/shared/runs/digits \
  --workers=3 \
  --workers_per_host=1 \
  --max_restarts=3 \
  --grace_seconds=60 \
  --patience_seconds=60 \
  --meeting_seconds=300 \
  --mode=train
