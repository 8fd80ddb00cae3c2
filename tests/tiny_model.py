"""A real, tiny base model for tests: two random Llama layers and a byte-level tokenizer.

Built in code, without any download, as a folder that ``supernode.prepare`` takes by its path.
"""

from pathlib import Path
from typing import Any

from app.site.prompts import training_prompt
from tests.samples import ROWS

VOCABULARY = 300  # 256 bytes, BOS, EOS and a few merges
# bitsandbytes on a CPU with AVX-512 BF16 needs inputs in multiples of 64, outputs of 32.
HIDDEN = 64


def build_tiny_model(folder: Path, layers: int = 2) -> None:
    """Write config, random weights (always the same) and tokenizer to ``folder``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,  # as many real models pad: EOS must be learned anyway
        tie_word_embeddings=False,
        initializer_range=0.2,  # large enough that the layers matter
    )
    with torch.random.fork_rng():
        torch.manual_seed(2025)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "gptj": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "rotary_dim": 16},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": HIDDEN, "n_layers": 2, "n_heads": 4},
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4},
    "qwen3": {"head_dim": 16},
}  # fmt: skip
# They load as causal language models, and are none without is_decoder.
MASKED: dict[str, dict[str, Any]] = {
    kind: {"initializer_range": 0.02} for kind in ("roberta", "bert")
}


TROCR: dict[str, Any] = {"d_model": HIDDEN, "decoder_layers": 1, "decoder_attention_heads": 4}


def build_tiny_family(folder: Path, kind: str) -> None:
    """The same with a random model of another family, by the name that Transformers has for it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer()
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id, "initializer_range": 0.2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **shape | (FAMILIES | MASKED).get(kind, TROCR))
    with torch.random.fork_rng():
        torch.manual_seed(2025)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [training_prompt(row["input"]) + " " + row["output"] for row in ROWS]
    tokenizer.train_from_iterator(texts, trainer)
    # As Llama-3's: BOS in front, nothing behind.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    start, end = special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=start, eos_token=end)
