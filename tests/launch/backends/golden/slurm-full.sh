#!/bin/bash
#SBATCH --job-name=digits
#SBATCH --nodes=2-4
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=32000M
#SBATCH --gpus-per-node=a100:4
#SBATCH --time=61
#SBATCH --signal=B:USR1@151
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/digits/logs/slurm-%j.out
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --qos=high
#SBATCH --reservation=course
#SBATCH --constraint=a100&nvlink|h100
#SBATCH --nodelist=node[1-3]
#SBATCH --exclude=node7
#SBATCH --mail-type=END
#SBATCH --comment="of ours"
export PYTHONPATH=/home/me/project
cd -- /home/me/project || exit 2
exec /home/me/.venv/bin/python -m launch.backends.slurm_step \
  --model_dir=/shared/runs/digits \
  --max_restarts=5 \
  --grace_seconds=90.5 \
  -- srun \
  --ntasks-per-node=1 \
  --kill-on-bad-exit=0 \
  --wait=30 \
  --mpi=none \
  --export=ALL \
  --cpus-per-task=8 \
  /home/me/.venv/bin/python -m launch.task \
  --scheduler=slurm \
  --gin_script=/shared/runs/digits/config/submitted-4f53cda18c2baa0c.json \
  --model_dir=/shared/runs/digits \
  --workers=4-8 \
  --workers_per_host=2 \
  --max_restarts=5 \
  --grace_seconds=90.5 \
  --patience_seconds=60 \
  --meeting_seconds=300 \
  --elastic \
  --mode=train
