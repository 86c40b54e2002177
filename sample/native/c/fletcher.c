#include "digest.h"

uint64_t fletcher(const uint8_t *bytes, size_t length)
{
    uint32_t low = 0, high = 0;
    for (size_t i = 0; i < length; i++) {
        low = (low + bytes[i]) % 255;
        high = (high + low) % 255;
    }
    return high << 8 | low;
}
