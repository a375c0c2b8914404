// CRC-32C (Castagnoli), the checksum defined in RFC 3720 (iSCSI), section 12.1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// Returns the CRC of data[0 : size]. `initial` is the CRC of the bytes that precede them.
// `hardware` enables the processor's CRC instruction where there is one.
std::uint32_t crc32c(const unsigned char* data, std::size_t size, std::uint32_t initial = 0,
                     bool hardware = true);

}  // namespace fastgpt
