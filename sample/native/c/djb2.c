#include "digest.h"

uint64_t djb2(const uint8_t *bytes, size_t length)
{
    uint64_t hash = 5381;
    for (size_t i = 0; i < length; i++)
        hash = hash * 33 + bytes[i];
    return hash;
}
