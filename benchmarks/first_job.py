"""The README's first job with Shampoo and with AdamW, each at several learning rates.

    python -m benchmarks.first_job

Runs ./run_train.sh for each optimizer and learning rate, on the same batches, and prints the loss
of the last training step and on held-out files as a Markdown table. Arguments are passed on to the
job (for example --training.steps 200).
"""

import re
import subprocess
import sys
import tempfile
from itertools import product

OPTIMIZERS = ("AdamW", "shampoo")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)

_TRAINING = re.compile(r"step: *(\d+) .*?loss: *([\d.]+|nan)")
_VALIDATION = re.compile(r"validate step: *\d+ .*?loss: *([\d.]+|nan)")
_COLOR = re.compile(r"\x1b\[\d+m")


def final_losses(optimizer: str, lr: float, arguments: list[str]) -> tuple[int, float, float]:
    """Steps, last training loss and validation loss of one job."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "./run_train.sh",
            *("--optimizer.name", optimizer, "--optimizer.lr", str(lr)),
            *("--job.dump_folder", folder, "--metrics.log_freq", "1"),
            *("--checkpoint.no-enable", "--metrics.no-enable_tensorboard"),
            *("--validation.enable", "--validation.dataset", "python_source_validation"),
            *("--validation.steps", "20", "--validation.freq", "100"),
            *("--validation.local_batch_size", "8", "--validation.seq_len", "128"),
            *arguments,
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    log = _COLOR.sub("", run.stdout + run.stderr)
    validations = _VALIDATION.findall(log)
    step, loss = _TRAINING.findall(_VALIDATION.sub("", log))[-1]
    return int(step), float(loss), float(validations[-1]) if validations else float("nan")


def main() -> None:
    """Run all jobs and print the table."""
    print("| optimizer | lr | steps | final training loss | validation loss |")
    print("|---|---|---|---|---|")
    for optimizer, lr in product(OPTIMIZERS, LEARNING_RATES):
        steps, training, validation = final_losses(optimizer, lr, sys.argv[1:])
        print(f"| {optimizer} | {lr:g} | {steps} | {training:.3f} | {validation:.3f} |", flush=True)


if __name__ == "__main__":
    main()
