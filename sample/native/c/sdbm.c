#include "digest.h"

uint64_t sdbm(const uint8_t *bytes, size_t length)
{
    uint64_t hash = 0;
    for (size_t i = 0; i < length; i++)
        hash = bytes[i] + (hash << 6) + (hash << 16) - hash;
    return hash;
}
