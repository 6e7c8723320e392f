"""Python examples of the README and the documentation, run as they stand, on a model and a text of the reader's."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]


def run_examples(*pages: str) -> None:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in pages]
    example = "".join("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)) for text in texts)
    exec(example.replace("path/to/model", "model").replace("path/to/text.txt", "text.txt"), {})


@pytest.fixture
def _model_and_text(tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with both, where the examples run."""
    vocabulary = {chr(code): code - 60 for code in range(60, 124)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_model_and_text")
def test_python_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    run_examples("README.md")
    perplexity, key_bits, value_bits, cache_bytes = map(float, capsys.readouterr().out.split()[-4:])
    assert perplexity > 1
    assert key_bits == pytest.approx(3.0)
    assert value_bits == pytest.approx(3 + 32 / 16)
    assert 0 < cache_bytes < 84 * 2 * 2 * 16 * 4  # of tokens, layers, keys and values, channels in float32


@pytest.mark.usefixtures("_model_and_text")
def test_python_examples_of_the_documentation_run(tmp_path: Path) -> None:
    run_examples("docs/quick-start.md", "docs/packed-cache.md")
    assert {f"{name}.safetensors" for name in ("q", "q4", "q3", "q2", "prompt")} <= {p.name for p in tmp_path.iterdir()}
