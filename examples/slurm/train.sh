#!/usr/bin/env bash
# Train on several machines of a Slurm cluster: sbatch --nodes 4 examples/slurm/train.sh
#
# One torchrun a machine, which starts a process for each of its GPUs. What fails is started again up to ten times, from the
# newest whole checkpoint. Ten minutes before the time limit Slurm sends SIGUSR1 to the processes: they finish their step, save
# and end with status 0, and the job puts itself back into the queue. OUTPUT_DIR must be a folder that all machines see.
#SBATCH --job-name=tars
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=tars-%j.log
set -euo pipefail

OUTPUT_DIR=${OUTPUT_DIR:-runs/$SLURM_JOB_ID}
MODEL=${MODEL:-qwen2.5-omni-7b}
DATA=${DATA:-data/items.jsonl}

# The meeting point of the machines; a port of its own for each job.
RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))

# Otherwise torchrun keeps the address of the first process from before machines came or went.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
launch=(
    torchrun --nnodes "1:$SLURM_NNODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 10
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
)
train=(
    -m tars_fast.train --model "$MODEL" --data "$DATA" --output-dir "$OUTPUT_DIR"
    --resume-if-exists --save-minutes 20
)

# torchrun would end on SIGUSR1; told to ignore it, it waits for its processes, which do not.
status=0
srun --kill-on-bad-exit=0 bash -c 'trap "" USR1; exec "$@"' train "${launch[@]}" "${train[@]}" "$@" || status=$?

# Ended without error and not at its end: it has made room.
if [ "$status" -eq 0 ] && [ ! -e "$OUTPUT_DIR/evaluation.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
