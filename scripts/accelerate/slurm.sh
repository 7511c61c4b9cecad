#!/usr/bin/env bash
# Pretraining on several nodes: sbatch scripts/accelerate/slurm.sh --recipe default --dataset CACHE --output_dir runs/nih
#SBATCH --job-name=mlvicx
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120   # before the time limit the run saves a checkpoint and ends; submit it again with --resume
#SBATCH --requeue           # after a preemption or the failure of a node the job starts again, and resumes
set -euo pipefail
gpus_per_node=${SLURM_GPUS_PER_NODE:-8}
gpus_per_node=${gpus_per_node##*:} # of a type and a number, such as a100:8, the number
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
[ "${SLURM_RESTART_COUNT:-0}" -eq 0 ] || resume=(--resume)
export head gpus_per_node
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since Slurm 22.05 srun does not take it over
# Where a node's name leads to 127.0.1.1, as in Debian, also export GLOO_SOCKET_IFNAME, the interface between the nodes.
# shellcheck disable=SC2016  # the node's own rank is known on the node only
srun bash -c 'exec accelerate launch --config_file scripts/accelerate/several_nodes.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * gpus_per_node))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$head" --main_process_port 29500 \
    scripts/pretrain.py --mixed_precision bf16 "$@"' -- "$@" ${resume[@]+"${resume[@]}"}
