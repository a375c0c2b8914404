// Cuts text into the pieces that byte-pair encoding then works on one by one, as GPT-2 does.
#pragma once

#include <cstddef>
#include <string_view>

namespace fastgpt {

// Returns where the piece that starts at text[begin] ends; needs begin < text.size().
//
// The pieces are those that GPT-2's pattern matches one after the other,
//
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// with the classes of the Unicode version that unicode_tables.inc names. `text` is UTF-8; a byte
// that is not part of a valid character counts as one character of the class [^\s\p{L}\p{N}], so
// every byte lies in exactly one piece whatever the text. Time: linear over all pieces of a text.
std::size_t piece_end(std::string_view text, std::size_t begin);

}  // namespace fastgpt
