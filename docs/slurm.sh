#!/bin/bash
#SBATCH --job-name=l2m
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1         # one process a host, which takes all of its GPUs
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=0                     # all memory of the host
#SBATCH --time=24:00:00
#SBATCH --requeue                   # after a host failure or a preemption
#SBATCH --signal=TERM@120           # two minutes before the time limit: training saves and ends with status 75
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

# From a clone, with the environment activated:
# sbatch docs/slurm.sh configs/gpt2_small.py /shared/runs/gpt2_small [--config.SETTING=VALUE ...]
# The work directory must be on a file system that all hosts see. A requeued job resumes there.

config=$1
workdir=$2
shift 2

# The processes connect to each other directly, but gRPC would send even these connections through a proxy.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

srun --kill-on-bad-exit=1 --label python -u train.py --config="$config" --workdir="$workdir" "$@"
status=$?

# Status 75: ended by a signal, with everything saved. Status 2: bad input, which a restart would not fix.
if [ "$status" -eq 75 ] ||
    { [ "$status" -ne 0 ] && [ "$status" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; }; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
