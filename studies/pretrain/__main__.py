"""Compares optimizers in pretraining small Llama models on real text.

    python -m studies.pretrain run --size 1M --jobs 2     # a killed study goes on where it was
    python -m studies.pretrain report                     # table and figures from the results
    python -m studies.pretrain flops --size 1M            # what they cost in matrix products

study.toml says who takes part and what is tried, jobs/SIZE.toml what all runs have in common.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.command import need_02, parser_of
from studies.pretrain.plan import STAGES, Study
from studies.pretrain.results import Results
from studies.pretrain.toml_files import read_toml

_HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = parser_of("studies.pretrain", __doc__)
    parser.add_argument("what", choices=("run", "report", "flops"))
    parser.add_argument("--study", type=Path, default=_HERE / "study.toml", help="its file")
    parser.add_argument("--results", type=Path, default=_HERE / "results" / "runs.jsonl")
    parser.add_argument("--size", nargs="+", help="of the study's sizes; default: all")
    parser.add_argument("--only", nargs="+", help="of the study's contestants; default: all")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, of OMP_NUM_THREADS each"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of all jobs, as in TOML: training.steps=100 training.dataset='\"c4\"'",
    )
    options = parser.parse_args(arguments)
    try:
        study = Study(options.study, read_toml("\n".join(options.set)))
    except ValueError as error:
        parser.error(str(error))
    sizes = _chosen(parser, "--size", options.size, study.sizes)
    contestants = _chosen(parser, "--only", options.only, list(study.contestants))
    results = Results(options.results)
    if options.what == "report":
        from studies.pretrain import figures, report  # without matplotlib the rest still works

        print(report.markdown(study, sizes, contestants, results))
        figures.draw(study, sizes, contestants, results, options.results.parent)
        return
    if options.what == "flops":
        need_02("studies.pretrain flops")
        from studies.pretrain import flops

        for size in sizes:
            print(flops.table(study, size, contestants, results))
        return
    need_02("studies.pretrain run")
    from studies.pretrain.execute import execute

    execute(study, sizes, contestants, options.stages, results, options.jobs)


def _chosen(parser: Any, option: str, chosen: list[str] | None, known: list[str]) -> list[str]:
    for name in chosen or []:
        if name not in known:
            parser.error(f"{option} {name}: must be of {', '.join(known)}")
    return chosen or known


if __name__ == "__main__":
    sys.exit(main())
