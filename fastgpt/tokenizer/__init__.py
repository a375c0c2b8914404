"""Tokenizers: byte-level BPE as in GPT-2, and character-level."""

from fastgpt.tokenizer.bpe import BaseTokenizer as BaseTokenizer
from fastgpt.tokenizer.bpe import CharTokenizer as CharTokenizer
from fastgpt.tokenizer.bpe import StreamDecoder as StreamDecoder
from fastgpt.tokenizer.bpe import Tokenizer as Tokenizer
from fastgpt.tokenizer.bpe import load_tokenizer as load_tokenizer
