"""A tiny random encoder with transformers' own classes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast


def save_bert(folder: Path, num_labels: int = 1, spread: float = 0.6) -> Path:
    """Write a BERT whose words are made of the letters a to h, at most 31 tokens; `spread` of the weights."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    inner = Tokenizer(WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=31, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
        max_position_embeddings=37, num_labels=num_labels, initializer_range=spread,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    torch.nn.init.constant_(model.classifier.bias, 5.0)
    model.save_pretrained(folder)
    return folder
