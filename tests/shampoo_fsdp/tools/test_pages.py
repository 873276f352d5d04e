"""Pages of plan and inspect: each stands alone, says what it must, and fits a screen."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from shampoo_fsdp.tools.command import main

OLD = Path(__file__).parents[2] / "data" / "checkpoint-0.1"

MODULE = """
from torch import nn

def build():
    layers = [nn.Linear(256, 256) for _ in range(4)]
    return nn.Sequential(nn.Embedding(512, 256), *layers, nn.Linear(256, 512))
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(MODULE)
    return f"{path}:build"


def check(page: Path, words: tuple[str, ...], pictures: int) -> None:
    text = page.read_text()
    assert text.count("<svg") == pictures
    for word in words:
        assert word in text
    alone = re.sub(r'xmlns[^ >]*="[^"]*"', "", text)
    assert "http" not in alone and "<script" not in alone and "nan" not in alone.lower()
    browsers = map(shutil.which, ("chromium-headless-shell", "chromium"))
    browser = next(filter(None, browsers), None)
    for width in (400, 1100) if browser else ():
        script = "<script>document.title = document.body.scrollWidth - innerWidth</script>"
        opened = page.with_name("opened.html")
        opened.write_text(text.replace("</html>", script + "</html>"))
        command = [browser, "--no-sandbox", "--enable-logging=stderr", f"--window-size={width},900"]
        command += ["--dump-dom", opened.as_uri()]
        out = subprocess.run(command, capture_output=True, text=True, check=True)
        assert int(re.search("<title>(-?[0-9]+)", out.stdout)[1]) <= 0
        assert "CONSOLE" not in out.stderr


def test_the_page_of_a_plan_of_ones_own_module_in_a_pipeline(mine, tmp_path, capsys):
    page = tmp_path / "plan.html"
    arguments = ["--module", mine, "--mesh", "pp=2,dp_shard=2", "--max_preconditioner_dim", "128"]
    assert main(["plan", *arguments, "--gpu", "a100-40gb", "--html", str(page), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 11 and plan["parameters_preconditioned"] == 5
    # The last layer is larger than the embedding's stage, which is left to Adam.
    first, last = plan["stages"]
    assert first["elements"] + last["elements"] == plan["elements"]
    assert last["gflop_per_step"] > first["gflop_per_step"]
    fit = plan["fit"]
    kept = sum(fit[name] for name in ("parameters", "gradients", "state", "connections"))
    assert fit["gpu"] == 39.4 and fit["left"] == pytest.approx(39.4 - kept)
    assert fit["parameters"] * 2**30 == pytest.approx(4 * last["elements"] / 2, rel=0.01)
    words = ("It fits into 39.4 GiB", "communication_dtype = bfloat16", "memory = low", "Balance")
    check(page, (*words, "the dearest is number 1"), pictures=4)


def test_the_page_of_two_checkpoints(tmp_path, capsys):
    page = tmp_path / "inspect.html"
    assert main(["inspect", str(OLD), str(OLD), "--html", str(page), "--json"]) == 0
    _, second = json.loads(capsys.readouterr().out)
    moved = {value for entries in second["moved"].values() for value in entries.values()}
    assert moved == {0.0}
    words = ("Health", "<td class=text>healthy</td>", "What has moved", "effective rank")
    check(page, words, pictures=2)


def test_a_config_of_hugging_face_is_planned(tmp_path, capsys):
    pytest.importorskip("transformers")
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert main(["plan", "--hf", str(path), "--mesh", "dp_shard=2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["title"] == "LlamaForCausalLM on dp_shard=2"
    assert plan["parameters_preconditioned"] == 2 * 7  # neither embeddings nor the output layer
