"""Make a tiny random model and a text, to try every command of the documentation on in seconds.

    python examples/tiny_model.py            writes the folder model/ and the file text.txt

The model is a Qwen3 with random weights and a tokenizer of its own. It knows nothing: commands run
on it as on a real one, but recall is 0 and scores are noise. Name another folder to write there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

NOVEL = Path(__file__).resolve().parent / "data" / "sherlock_holmes.txt"
CHARACTERS = 100_000


def tokenizer(text: str, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer trained on a text; every digit is a token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def model(vocab_size: int = 512, num_hidden_layers: int = 8) -> Qwen3ForCausalLM:
    """Return a random Qwen3 with 8 query heads and 4 KV heads a layer."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16)


def main(folder: Path) -> None:
    """Write `model/` and `text.txt` into a folder."""
    text = NOVEL.read_text(encoding="utf-8")[:CHARACTERS]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    tokenizer(text).save_pretrained(folder / "model")
    logging.disable_progress_bar()
    model().save_pretrained(folder / "model")
    print(f"wrote {folder / 'model'} and {folder / 'text.txt'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
