// CRC-32C (Castagnoli), the checksum of RFC 3720 (iSCSI), section 12.1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// The CRC of some bytes; `initial` is that of the bytes before them.
// hardware: use the processor's own instruction where it has one.
std::uint32_t crc32c(const unsigned char* data, std::size_t size, std::uint32_t initial = 0,
                     bool hardware = true);

}  // namespace fastgpt
