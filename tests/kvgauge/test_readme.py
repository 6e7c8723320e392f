"""The README's Python examples, `packed_cache` among them, run as they stand, on a model and a text of the reader's."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[2] / "README.md"


def test_python_examples_run(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {chr(code): code - 60 for code in range(60, 124)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    monkeypatch.chdir(tmp_path)
    example = "".join(re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL))
    exec(example.replace("path/to/model", "model").replace("path/to/text.txt", "text.txt"), {})
    perplexity, key_bits, value_bits, cache_bytes = map(float, capsys.readouterr().out.split()[-4:])
    assert perplexity > 1
    assert key_bits == pytest.approx(3.0)
    assert value_bits == pytest.approx(3 + 32 / 16)
    assert 0 < cache_bytes < 84 * 2 * 2 * 16 * 4  # of tokens, layers, keys and values, channels in float32
