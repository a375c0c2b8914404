// Validation and newline conversion of text files before tokenization.
#pragma once

#include <cstddef>
#include <string_view>

namespace fastgpt {

// Returns the size of the longest prefix that is valid UTF-8 (Unicode 16.0, section 3.9: no
// surrogates, no overlong forms, nothing beyond U+10FFFF).
std::size_t valid_utf8(std::string_view text);

// Writes the text to `to` with each "\r\n" replaced by "\n" and returns the number of bytes
// written. `to` must have room for text.size() bytes.
std::size_t unix_newlines(std::string_view text, char* to);

}  // namespace fastgpt
