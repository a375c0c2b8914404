"""Tokenizers: byte-level BPE as in GPT-2, and character-level."""

from fastgpt.tokenizer.base import BaseTokenizer as BaseTokenizer
from fastgpt.tokenizer.base import StreamDecoder as StreamDecoder
from fastgpt.tokenizer.bpe import Tokenizer as Tokenizer
from fastgpt.tokenizer.characters import CharTokenizer as CharTokenizer
from fastgpt.tokenizer.load import load_tokenizer as load_tokenizer
