#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=3
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/digits/logs/slurm-%A_%a.out
#SBATCH --array=0-1%1
export PYTHONPATH=/home/me/project
cd -- /home/me/project || exit 2
case "$SLURM_ARRAY_TASK_ID" in
  0) set -- --gin_bindings=LEARNING_RATE=0.1 ;;
  1) set -- --gin_bindings=LEARNING_RATE=0.2 '--gin_bindings=NAME="it'"'"'s"' ;;
esac
exec /home/me/.venv/bin/python -m launch.backends.slurm_step \
  --model_dir=/shared/runs/digits/"$SLURM_ARRAY_TASK_ID" \
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
  --model_dir=/shared/runs/digits/"$SLURM_ARRAY_TASK_ID" \
  --workers=3 \
  --workers_per_host=1 \
  --max_restarts=3 \
  --grace_seconds=60 \
  --patience_seconds=60 \
  --meeting_seconds=300 \
  --mode=train "$@"
