"""Text that is on every machine, and the tokenizer for it."""

import pytest
from tokenizers import Tokenizer
from torchtitan.hf_datasets.text_datasets import DATASETS

from shampoo_torchtitan.demo import BYTE_TOKENIZER, VOCABULARY
from shampoo_torchtitan.demo.data import python_source


def test_validation_files_are_not_trained_on(tmp_path):
    for i in range(100):
        (tmp_path / f"m{i}.py").write_text(f"x = {i}")
    train, held_out = python_source(str(tmp_path)), python_source(str(tmp_path), validation=True)
    assert len(held_out) == 5
    assert sorted([*train["text"], *held_out["text"]]) == sorted(f"x = {i}" for i in range(100))
    assert train["text"] == python_source(str(tmp_path))["text"]


def test_installed_packages_and_tests_are_left_out(tmp_path):
    for name in ("a.py", "b.py", "site-packages/c.py", "json/tests/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    everything = [python_source(str(tmp_path), validation=v)["text"] for v in (False, True)]
    assert sorted(text for texts in everything for text in texts) == ["a.py", "b.py"]


def test_an_empty_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        python_source(str(tmp_path))


def test_the_standard_library_is_enough_to_train_on():
    config = DATASETS["python_source"]
    text = config.loader(config.path)["text"]
    assert sum(map(len, text)) > 2_000_000


def test_any_text_survives_the_tokenizer():
    tokenizer = Tokenizer.from_file(str(BYTE_TOKENIZER / "tokenizer.json"))
    text = 'def f(x):\n\treturn "héllo 世界 \x00"  # spaces   kept\n'
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.get_vocab_size() == 258 <= VOCABULARY
