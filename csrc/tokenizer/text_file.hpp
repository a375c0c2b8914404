// What the bytes of a text file go through before they are tokenized.
#pragma once

#include <cstddef>
#include <string_view>

namespace fastgpt {

// Returns how many bytes from the start are whole, valid characters (Unicode 16.0, section 3.9: no
// surrogates, no overlong forms, nothing beyond U+10FFFF).
std::size_t valid_utf8(std::string_view text);

// Writes the text with each "\r\n" as "\n", which may need as much room as the text, and returns
// how many bytes that is.
std::size_t unix_newlines(std::string_view text, char* to);

}  // namespace fastgpt
