#include "digest.h"

/* A permutation of 0..255, since 167 is odd. */
static uint8_t permuted(uint8_t byte)
{
    return (uint8_t)(byte * 167 + 13);
}

uint64_t pearson(const uint8_t *bytes, size_t length)
{
    uint8_t hash = 0;
    for (size_t i = 0; i < length; i++)
        hash = permuted(hash ^ bytes[i]);
    return hash;
}
