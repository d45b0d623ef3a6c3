#!/usr/bin/env bash
# Train or predict with several processes, on one machine or on several.
#
#   bash examples/torchrun.sh train scans/ --out runs/a        # one machine, a process for each GPU
#   PROCESSES=2 bash examples/torchrun.sh train scans/ --out runs/a --accelerator cpu
#
# On several machines, run the same line on each of them, with the same address of one of them:
#
#   NODES=2 HEAD=node1:29400 bash examples/torchrun.sh train /shared/scans --out /shared/runs/a
#
# NODES      number of machines (1)
# PROCESSES  processes on each machine (its GPUs; 1 without any)
# HEAD       host:port of one of the machines, which the others reach (any free port of this one)
set -euo pipefail

processes=${PROCESSES:-$( (nvidia-smi --list-gpus 2>/dev/null || echo CPU) | wc -l)}
# Its share of the cores; torchrun itself would give each process one, and one process to draw the batches of its GPU.
cores=$(nproc 2>/dev/null || echo 1)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( cores > processes ? cores / processes : 1 ))}

exec python -m torch.distributed.run \
  --nnodes "${NODES:-1}" \
  --nproc-per-node "$processes" \
  --rdzv-backend c10d \
  --rdzv-endpoint "${HEAD:-localhost:0}" \
  --rdzv-id "${JOB:-mlbseg}" \
  --max-restarts 0 \
  -m mlbseg "$@"
