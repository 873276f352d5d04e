"""The README's first job with Shampoo and with AdamW, each at several learning rates.

    python -m benchmarks.first_job

Runs ./run_train.sh for each optimizer and learning rate, on the same batches, and prints the loss
of the last training step and on held-out files, and the median time of a step, as a Markdown table.
Arguments are passed on to the job (for example --training.steps 200).
"""

import re
import statistics
import subprocess
import sys
import tempfile
from itertools import product

OPTIMIZERS = ("AdamW", "shampoo")
LEARNING_RATES = (1e-3, 3e-3, 1e-2)

_TOKENS_PER_RANK = 8 * 128  # of the job file: local_batch_size x seq_len
_TRAINING = re.compile(r"step: *(\d+) .*?loss: *([\d.]+|nan).*?tps: ([\d,]+)")
_VALIDATION = re.compile(r"validate step: *\d+ .*?loss: *([\d.]+|nan)")
_COLOR = re.compile(r"\x1b\[\d+m")


def run_job(optimizer: str, lr: float, arguments: list[str]) -> tuple[str, str, str, float]:
    """Steps, last training loss, validation loss and median milliseconds per step of one job."""
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
    validation = _VALIDATION.findall(log)[-1]
    training = "\n".join(line for line in log.splitlines() if "validate" not in line)
    steps = _TRAINING.findall(training)
    step, loss, _ = steps[-1]
    # The second half: the grafted method alone runs first, and the first steps warm up.
    rates = [float(tps.replace(",", "")) for _, _, tps in steps[len(steps) // 2 :]]
    return step, loss, validation, 1e3 * _TOKENS_PER_RANK / statistics.median(rates)


def main() -> None:
    """Run all jobs and print the table."""
    print("| optimizer | lr | steps | final training loss | validation loss | ms per step |")
    print("|---|---|---|---|---|---|")
    for optimizer, lr in product(OPTIMIZERS, LEARNING_RATES):
        steps, training, validation, ms = run_job(optimizer, lr, sys.argv[1:])
        print(
            f"| {optimizer} | {lr:g} | {steps} | {float(training):.3f} | {float(validation):.3f} "
            f"| {ms:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
