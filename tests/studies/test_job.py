"""The study's jobs, shrunk, in this process."""

from pathlib import Path

import pytest

import shampoo_torchtitan.train  # noqa: F401  first: it makes TorchTitan run without a GPU

# isort: split
from shampoo_torchtitan.generation import JOBS_ARE_FUNCTIONS

if JOBS_ARE_FUNCTIONS:
    pytest.skip("the study trains models of TorchTitan 0.2", allow_module_level=True)

import torchtitan.models.llama3 as llama3

from shampoo_torchtitan.demo import BYTE_TOKENIZER
from studies.pretrain import data, job
from studies.pretrain.plan import Study

_STUDY = Path(job.__file__).parent / "study.toml"


@pytest.fixture(scope="module", autouse=True)
def optimizers_of_the_study():
    """Known to TorchTitan during these tests only: all tests share one process."""
    build = llama3.build_optimizers
    from studies.pretrain import extension  # registers when it is imported first

    extension.register()
    yield
    llama3.build_optimizers = build


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Settings that make a job of the study take a second."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "source").mkdir()
    for i in range(60):
        (folder / "source" / f"module_{i}.py").write_text(f"def f_{i}(x):\n    return {i}\n" * 20)
    return {
        "job.dump_folder": str(folder),
        "model.hf_assets_path": str(BYTE_TOKENIZER),
        "training.dataset_path": str(folder / "source"),
        "training.local_batch_size": 2,
        "training.seq_len": 16,
        "training.steps": 6,
        "lr_scheduler.warmup_steps": 2,
        "validation.dataset_path": str(folder / "source"),
        "validation.local_batch_size": 2,
        "validation.seq_len": 16,
        "validation.steps": 1,
        "validation.freq": 2,
        "optimizer.lr": 1e-3,
    }


@pytest.mark.parametrize("contestant", Study(_STUDY).contestants)
def test_every_contestant_trains(small, contestant):
    settings = {**Study(_STUDY).job("1M", contestant), **small}
    curve = job.run(settings)
    assert curve["step"] == [2, 4, 6]
    assert curve["loss"][-1] < curve["loss"][0] < 6.0
    assert curve["seconds"][0] < curve["seconds"][-1]
    assert curve["optimizer_seconds"] < curve["cpu_seconds"][-1]
    assert {"torch", "torchtitan", "shampoo_fsdp", "commit"} <= set(curve["versions"])
    if contestant == "AdamW":
        other = job.run({**settings, "debug.seed": 1})
        assert other["loss"] != curve["loss"]


def test_simulated_shards_cut_blocks_where_shards_end(small):
    """Blocks of half a matrix's rows are the same, whether two shards or the cap cut them."""
    settings = {
        **Study(_STUDY).job("1M", "Shampoo"),
        **small,
        "optimizer.shampoo.start_preconditioning_step": 1,
        "optimizer.shampoo.precondition_frequency": 1,
    }

    def loss(cap: int, shards: int) -> list[float]:
        sizes = {"shampoo.max_preconditioner_dim": cap, "simulated_shards": shards}
        return job.run(settings | {f"optimizer.{name}": n for name, n in sizes.items()})["loss"]

    one = pytest.approx(loss(64, 1), abs=1e-3)
    # 352 rows are cut in 6 of at most 64, or in 2 x 3.
    assert loss(64, 2) == one
    assert loss(128, 1) != one


def test_a_run_that_diverges_is_ended_and_counts_as_lost(small):
    curve = job.run({**Study(_STUDY).job("1M", "AdamW"), **small, "optimizer.lr": 1e6})
    assert curve["loss"][-1] == float("inf")


@pytest.mark.parametrize("contestant", ["Muon", "KL-Shampoo"])
def test_a_killed_run_goes_on_where_it_was(small, contestant, tmp_path, monkeypatch):
    settings = Study(_STUDY).job("1M", contestant) | small
    whole = job.run(settings)

    folder, save = tmp_path / "run", job.StudyTrainer.train_step

    def killed(self, batches):
        if self.step == 4:
            raise KeyboardInterrupt
        save(self, batches)

    monkeypatch.setattr(job.StudyTrainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        job.run(settings, folder)
    monkeypatch.undo()
    steps = []
    monkeypatch.setattr(
        job.StudyTrainer, "train_step", lambda self, b: (steps.append(self.step), save(self, b))
    )
    again = job.run(settings, folder)
    assert steps == [3, 4, 5, 6]  # the last checkpoint was that of step 2
    for name in ("step", "loss", "training_loss"):
        assert again[name] == whole[name]
    assert not folder.exists()


def test_text_that_is_trained_on_is_not_validated_on(small):
    texts = {}
    for name in ("python_source_study", "python_source_tuning", "python_source_validation"):
        entry = data.DATASETS[name]
        texts[name] = set(entry.loader(small["training.dataset_path"])["text"])
    training, tuning, held_out = texts.values()
    assert min(map(len, texts.values())) >= 2
    assert not (training & tuning or training & held_out or tuning & held_out)
    assert len(training | tuning | held_out) == 60
