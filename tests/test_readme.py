"""The README's Python example runs as it stands, on a model and a text of the reader's."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parents[1] / "README.md"


def test_python_example_runs(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = {chr(code): code - 60 for code in range(60, 124)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "model")
    tiny_llama.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 30)
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(example.replace("path/to/model", "model").replace("path/to/text.txt", "text.txt"), {})
    perplexity, key_bits, value_bits = map(float, capsys.readouterr().out.split()[-3:])
    assert perplexity > 1
    assert key_bits == pytest.approx(3.0)
    assert value_bits == pytest.approx(3 + 32 / 16)
