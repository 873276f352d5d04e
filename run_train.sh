#!/usr/bin/env bash
# Trains with TorchTitan and Shampoo; sets everything up on the first call. No arguments needed:
#   ./run_train.sh
#   NGPU=4 CONFIG_FILE=configs/llama3_8b.toml ./run_train.sh --training.steps 50
# NGPU: ranks on this machine (default: its GPUs, or 2 ranks on the CPU). LOG_RANK: whose output is
# shown, "0,1" for several. TITAN: another version of TorchTitan than the newest, such as 0.2.2.
# All arguments override settings of the job file; see --help.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

source ./make_venv.sh
make_venv

CONFIG_FILE="${CONFIG_FILE:-configs/llama3_small_cpu.toml}"
export LOG_RANK="${LOG_RANK:-0}"
case " $* " in
  *" --help "* | *" -h "*)  # one process says it
    exec "$venv/bin/python" -m shampoo_torchtitan.train --job.config_file "$CONFIG_FILE" --help
    ;;
esac

if [ -z "${NGPU:-}" ]; then
  NGPU="$("$venv/bin/python" -c 'import torch; print(torch.accelerator.device_count() or 2)')"
fi
export NGPU
threads=$(($(nproc) / NGPU))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"

# Port 0: any free one, so that two trainings fit on a machine.
exec "$venv/bin/python" integrations/launch.py \
  --nproc_per_node="$NGPU" --rdzv_backend c10d --rdzv_endpoint="localhost:0" \
  --local-ranks-filter "$LOG_RANK" --role rank --tee 3 --log-dir outputs/logs \
  -m shampoo_torchtitan.train --job.config_file "$CONFIG_FILE" "$@"
