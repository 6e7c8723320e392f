"""The Python examples of README and docs run as they stand, on a model and a text of the reader's."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


@pytest.fixture
def reader(tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model and a text, where the examples run."""
    vocabulary = {chr(code): code - 60 for code in range(60, 124)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    monkeypatch.chdir(tmp_path)


def run(page: str, names: dict[str, object]) -> None:
    """Runs all Python blocks of a page in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    exec("".join(blocks).replace("path/to/model", "model").replace("path/to/text.txt", "text.txt"), names)


@pytest.mark.usefixtures("reader")
def test_the_example_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run("README.md", {})
    perplexity, key_bits, value_bits = map(float, capsys.readouterr().out.split()[-3:])
    assert perplexity > 1
    assert key_bits == pytest.approx(3.0)
    assert value_bits == pytest.approx(3 + (32 + 24) / 16)  # range and one outlier of a token


@pytest.mark.usefixtures("reader")
def test_the_examples_of_the_docs_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    run("docs/quick-start.md", names)
    assert [path.name for path in sorted(tmp_path.glob("q?.safetensors"))] == [
        f"q{bits}.safetensors" for bits in (2, 3, 4)
    ]
    run("docs/packed-cache.md", names)
    cache_bytes = int(capsys.readouterr().out.split()[-1])
    assert 0 < cache_bytes < 84 * 2 * 2 * 16 * 4  # of tokens, layers, keys and values, channels in float32
